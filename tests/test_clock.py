"""The clock of a fit against a simulation that counts batches, steps, and epochs one by one."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from lightning_reg import Linear, Steps
from lightning_reg._engine import clock as clock_module
from lightning_reg._engine.clock import Clock, Line
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


def random_run(rng):
    """Return a random fit."""
    changes = rng.random() < 0.4
    length = rng.randint(1, 9)
    lengths = [rng.randint(1, 9) if changes else length for _ in range(FAR)]
    windows = rng.choice([[1], [2], [3], [4], [3, 1, 4]])
    accumulation = [windows[min(epoch, len(windows) - 1)] for epoch in range(FAR)]
    stepping = rng.choice([[], [], [1], [2], [3], [0, 0, 0, 1], [0, 2, 1]])
    max_epochs = rng.choice([None, rng.randint(1, 6)])
    max_steps = rng.choice([None, None, rng.randint(1, 20)])
    return Run(lengths, accumulation, stepping, rng.random() < 0.7, max_epochs, max_steps)


def random_markers(rng, run):
    """Return pairs of markers in all units, as far as the run knows them."""
    whole = [f"{rng.randint(0, 4)}ep", f"{rng.randint(0, 12)}st"]
    begins = [0.0, *whole] if run.endless else [0.0, rng.uniform(0, 0.6), *whole]
    untils = [f"{rng.choice([1, 2, 2.5, 4])}ep", f"{rng.randint(1, 15)}st"]
    return list(itertools.product(begins, untils if run.endless else [*untils, 1.0, rng.uniform(0.4, 1)]))


def follow(run, pairs, *, schedules=None, resume_at=None, as_run=None):
    """Yield the same as ``simulate``, from the clock; resume at a moment from a state that was pickled."""
    clock = epoch = first = None
    schedules = schedules or {pair: Linear(0.0, 1.0, begin=pair[0], until=pair[1]) for pair in pairs}
    for i, now in enumerate(run.moments()):
        first = now if epoch != now.epoch else first
        plan = run.plan(first)
        if clock is None:
            clock = Clock(plan)
        elif i == resume_at:
            run, plan = as_run or run, (as_run or run).plan(first)
            state = pickle.loads(pickle.dumps(clock.state_dict()))
            clock = Clock(plan)
            clock.load_state_dict(state)
            clock.begin_epoch(plan, run.point(now))
        if epoch != now.epoch:
            clock.begin_epoch(plan, run.point(now))
        epoch = now.epoch
        moment = clock.advance(run.point(now))
        yield now, moment.progress, {pair: schedule.at_moment(moment) for pair, schedule in schedules.items()}


def valid(pair):
    begin, until = pair
    return unit_of(begin) != unit_of(until) or float(str(begin).rstrip("epst")) <= float(str(until).rstrip("epst"))


def cases(numbers):
    """Yield random fits with pairs of markers."""
    for number in numbers:
        rng = random.Random(number)
        run = random_run(rng)
        yield run, [pair for pair in random_markers(rng, run) if valid(pair)]


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_clock_agrees_with_simulation(start):
    for run, pairs in cases(range(start, start + 100)):
        for expected, found in itertools.zip_longest(simulate(run, pairs), follow(run, pairs)):
            now, progress, positions = expected
            assert found[1] == pytest.approx(progress, abs=1e-9), (run, now)
            if positions:
                assert found[2] == pytest.approx(positions, abs=1e-7), (run, now)


def test_simulation_covers_every_kind_of_run():
    runs = [run for run, _ in cases(range(400))]
    kinds = {(run.sized, bool(run.stepping), run.max_epochs is None, run.max_steps is None) for run in runs}
    assert len(kinds) == 16
    assert {len(set(run.lengths)) > 1 for run in runs if run.exact and run.accumulation[0] > 1} == {True, False}


def test_a_wrong_clock_is_caught(monkeypatch):
    """Each comparison can fail."""
    for name, wrong in (
        ("fraction_done", lambda point, length: min(point.epochs / 5, 1.0)),
        ("line_in_unit", lambda begin, until, now: Line(0.0, 0.0, float(str(until).rstrip("epst")))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(clock_module, name, wrong)
            with pytest.raises(AssertionError):
                test_clock_agrees_with_simulation(0)


def test_markers_act_at_their_moments():
    for run, _ in cases(range(200)):
        units = [1.0, 0.37] if not run.endless else []
        schedules = {marker: Steps([0.0, 1.0], at=[marker]) for marker in ("1ep", "2.5ep", "1st", "4st", "7st", *units)}
        for now, progress, values in follow(run, [], schedules=schedules):
            assert values == {marker: float(passed(run, marker, now, progress)) for marker in schedules}, (run, now)


def test_progress_and_ramps_rise_steadily():
    for run, pairs in cases(range(400)):
        seen = list(follow(run, pairs))
        values = [{"progress": progress, **positions} for _, progress, positions in seen]
        assert values[0]["progress"] == 0.0
        assert run.endless or values[-1]["progress"] == 1.0, run
        for before, after in itertools.pairwise(values):
            assert all(after[key] >= before[key] for key in after), run


def test_resumed_clock_equals_uninterrupted_one_to_the_last_bit():
    for run, pairs in cases(range(200)):
        whole = list(follow(run, pairs))
        for i in range(1, len(whole)):
            assert list(follow(run, pairs, resume_at=i)) == whole, (run, i)


@pytest.mark.parametrize("stepping", [[], [2]], ids=["automatic", "manual"])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_resume_with_other_limits_goes_on_from_where_it_was(sized, stepping):
    limits = [(4, None), (9, None), (6, 20), (None, 17), (None, None)]
    pairs = [(0.0, "5ep"), ("1ep", "20st"), ("2st", "3ep"), ("3st", "12st")]
    for first, second, stop in itertools.product(limits, limits, range(4, 20)):
        run = Run([4] * FAR, [1] * FAR, stepping, sized, *first)
        moments = list(itertools.islice(run.moments(), stop))
        if len(moments) < stop:
            continue
        *_, (now, progress, before) = itertools.islice(follow(run, pairs), stop)
        resumed = Run(run.lengths, run.accumulation, stepping, sized, *second)
        goes_on = follow(run, pairs, resume_at=stop - 1, as_run=resumed)
        *_, (_, progress_after, after) = itertools.islice(goes_on, stop)
        assert after == pytest.approx(before), (first, second, now)
        is_over = now.epoch >= (resumed.max_epochs or FAR) or now.steps >= (resumed.max_steps or FAR)
        if not run.endless and not resumed.endless and not is_over:
            assert progress_after == pytest.approx(progress), (first, second, now)


def test_ramp_beyond_the_end_rises_as_if_the_run_were_longer():
    run = Run([4] * FAR, [1] * FAR, [], sized=True, max_epochs=3, max_steps=None)
    *_, (_, _, values) = follow(run, [(0.0, "6ep"), (0.0, "24st")])
    assert list(values.values()) == [0.5, 0.5]


def test_clock_survives_much_shorter_epochs_before():
    """Markers that lie behind have no place in a plan of long epochs."""
    run = Run([1, 1, 50, 50], [1] * 4, [], sized=True, max_epochs=4, max_steps=None)
    *_, (_, _, values) = follow(run, [("1ep", "2ep"), ("1st", "3ep"), ("1ep", 1.0)])
    assert list(values.values()) == [1.0, 1.0, 1.0]
