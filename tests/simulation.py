"""Fits simulated by counting batches, steps, and epochs one by one, for comparison with the clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lightning_reg._engine.plan import Plan, Point

FAR = 60  # epochs and steps beyond any simulated run


class Now(NamedTuple):
    """A moment at which values are set: before the first batch of a step, and in manual optimization before each step."""

    epoch: int
    batch: int  # in the epoch
    batches: int
    steps: int
    length: int  # of the epoch


@dataclass
class Run:
    """A fit, described as a user would.

    Args:
        lengths: The number of batches in each epoch. In an epoch, later ones are taken to have its number.
        accumulation: The number of batches of a step in each epoch, in automatic optimization.
        stepping: The number of steps in each batch, over and over, in manual optimization; empty for automatic optimization.
        sized: Whether the number of batches in an epoch is known.
        max_epochs: The number of epochs, or ``None``.
        max_steps: The number of steps, or ``None``.
        stop: The number of epochs after which an endless run is interrupted.
    """

    lengths: list[int]
    accumulation: list[int]
    stepping: list[int]
    sized: bool
    max_epochs: int | None
    max_steps: int | None
    stop: int = 5

    @property
    def exact(self):
        return self.sized and not self.stepping

    @property
    def endless(self):
        return self.max_epochs is None and self.max_steps is None

    def moments(self):
        """Walk through the run, batch by batch and step by step, to its end."""
        batches = steps = 0
        epochs = self.max_epochs or (self.stop if self.max_steps is None else FAR)
        for epoch in range(epochs):
            length = self.lengths[epoch]
            for batch in range(length):
                if not self.stepping:
                    first = batch - batch % self.accumulation[epoch]
                    yield Now(epoch, first, batches - (batch - first), steps, length)
                    steps += (batch + 1) % self.accumulation[epoch] == 0 or batch + 1 == length
                else:
                    yield Now(epoch, batch, batches, steps, length)
                    for i in range(self.stepping[batches % len(self.stepping)]):
                        if i:
                            yield Now(epoch, batch, batches, steps, length)
                        steps += 1
                batches += 1
                if self.max_steps is not None and steps >= self.max_steps:
                    break
            if (batch + 1 == length and epoch + 1 == epochs) or (self.max_steps is not None and steps >= self.max_steps):
                yield Now(epoch, batch + 1, batches, steps, length)
                return

    def epochs(self, now):
        """Return the number of epochs done. Where the number of their batches is unknown, they have no fractions."""
        return now.epoch + (now.batch / now.length if self.sized else now.batch // now.length)

    def count_batches(self, epoch, steps, *, until_epoch=math.inf, until_step=math.inf):
        """Count the batches from an epoch's start to an epoch or a step, if all epochs are as long as this one."""
        batches = 0
        for later in range(epoch, FAR):
            for batch in range(self.lengths[epoch]):
                if steps >= until_step or later + batch / self.lengths[epoch] >= until_epoch:
                    return batches
                steps += (batch + 1) % self.accumulation[later] == 0 or batch + 1 == self.lengths[epoch]
                batches += 1
        return math.inf

    def plan(self, now):
        """Return what Lightning knows in the epoch of a moment."""
        limits = [math.inf if limit is None else limit for limit in (self.max_epochs, self.max_steps)]
        per_step = dict(enumerate(self.accumulation)) if not self.stepping else {}
        return Plan(*limits, now.length if self.sized else math.inf, per_step, start=self.point(now))

    def point(self, now):
        return Point(now.batches, self.epochs(now), now.steps)


def fraction_left(run, now, start):
    """Return which part of the run is left, as it is planned in the epoch that began at ``start``."""
    if run.exact:
        ends = {"until_epoch": run.max_epochs or math.inf, "until_step": math.inf if run.max_steps is None else run.max_steps}
        return run.count_batches(start.epoch, start.steps, **ends) - (now.batches - start.batches)
    parts = [1 - now.steps / run.max_steps] if run.max_steps is not None else []
    if run.max_epochs and run.sized:
        parts.append(1 - now.batches / (start.batches + (run.max_epochs - start.epoch) * now.length))
    elif run.max_epochs:
        parts.append(1 - math.floor(run.epochs(now)) / run.max_epochs)
    return max(min(parts), 0)


def simulate(run, schedule_markers):
    """Yield each moment, the progress, and the position between each pair of markers."""
    progress, before, start = 0.0, None, None
    changed = 0  # the number of batches when the plan changed
    begun = {}  # by pair of markers: the position, and the place where it was
    for now in run.moments():
        if start is None or now.epoch != start.epoch:  # the plan is made again, and counts from here
            if before is not None:  # the way up to here is measured by the old plan
                here = now._replace(length=before.length)
                if not run.endless and (left := fraction_left(run, before, start)):
                    progress += (1 - progress) * (left - fraction_left(run, here, start)) / left
                begun = {pair: go_on(run, pair, x, place, here, start, progress) for pair, (x, place) in begun.items()}
                if not run.endless and fraction_left(run, here, start) != fraction_left(run, now, now):
                    changed = now.batches
            start = before = now
        if run.endless:
            progress = now.batches
        elif left := fraction_left(run, before, start):
            progress += (1 - progress) * (left - fraction_left(run, now, start)) / left
        before = now
        if progress == 1 and not run.endless:
            yield now, progress, {}  # nothing is between two markers any more
            continue
        positions = {}
        for pair in schedule_markers:
            if passed(run, pair[1], now, progress):
                positions[pair] = 1.0
            elif not passed(run, pair[0], now, progress):
                positions[pair] = 0.0
            else:
                if pair not in begun:
                    begun[pair] = (0.0, first_place(run, pair, now, start, progress, changed))
                begun[pair] = go_on(run, pair, *begun[pair], now, start, progress)
                positions[pair] = begun[pair][0]
        yield now, progress, positions


def passed(run, marker, now, progress):
    """Return whether a marker is passed: the number of its unit is reached."""
    if isinstance(marker, float):
        return progress >= marker - 1e-9
    number, unit = float(marker[:-2]), marker[-2:]
    return (now.steps if unit == "st" else run.epochs(now)) >= number - 1e-9


def place_of(run, marker, now, progress):
    """Return where the moment is on the way to a marker: in batches if they can be counted, else in the marker's unit."""
    if isinstance(marker, float):
        return progress
    if run.exact:
        return now.batches
    return now.steps if marker.endswith("st") else run.epochs(now)


def place_of_marker(run, marker, now, start):
    """Return where a marker lies on the same scale."""
    number = marker if isinstance(marker, float) else float(marker[:-2])
    if isinstance(marker, float) or not run.exact:
        return number
    if marker.endswith("st"):
        return start.batches + run.count_batches(start.epoch, start.steps, until_step=number)
    whole = max(math.floor(number), start.epoch)
    return start.batches + run.count_batches(start.epoch, start.steps, until_epoch=whole) + (number - whole) * now.length


def first_place(run, pair, now, start, progress, changed):
    """Return where the first marker was, on the way to the second: it was passed since the moment before.

    A fraction of the old plan that nobody saw pass counts from the first batch of the new plan.
    """
    begin, until = pair
    if begin == 0.0 or (not run.exact and unit_of(begin) == unit_of(until)):
        return float(str(begin).rstrip("epst"))
    if not run.exact:
        return place_of(run, until, now, progress)
    per_batch = 0.0 if run.endless else (1 - progress) / fraction_left(run, now, start)
    if unit_of(until) and not unit_of(begin):
        return now.batches - min((progress - begin) / per_batch, now.batches - changed)
    if unit_of(until):
        return min(place_of_marker(run, begin, now, start), now.batches)
    if not unit_of(begin):
        return begin
    return progress - per_batch * (now.batches - place_of_marker(run, begin, now, start))


def unit_of(marker):
    return marker[-2:] if isinstance(marker, str) else ""


def go_on(run, pair, x, place, now, start, progress):
    """Return how far the way to the second marker has gone on, and the place that is reached."""
    here, there = place_of(run, pair[1], now, progress), place_of_marker(run, pair[1], now, start)
    return (x + (1 - x) * (here - place) / (there - place) if there > place else 1.0), here


def valid(pair):
    begin, until = pair
    return unit_of(begin) != unit_of(until) or float(str(begin).rstrip("epst")) <= float(str(until).rstrip("epst"))
