"""The planned length of a fit in batches, optimizer steps, and epochs, as known at the start of an epoch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MARKER = re.compile(r"(\d+(?:\.\d+)?)(ep|st)")


class Step(NamedTuple):
    """The number of an optimizer step, equal on every rank and after a resume.

    Args:
        number: The number of optimizer steps before it. In manual optimization, where optimizers may take turns, the number of
            batches before it.
        index_in_batch: Its index among the steps of its batch; always 0 in automatic optimization.
        evaluation: How many times the optimizer has already evaluated its closure in this step. All evaluations draw the same
            random numbers, and only the first one counts in statistics.
        is_penalized: Whether the loss of the step contains the penalties that are added to the loss. It does not if the
            ``training_step`` of the last accumulated batch returned ``None``; then the gradients get them.
    """

    number: int
    index_in_batch: int = 0
    evaluation: int = 0
    is_penalized: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """A key that distinguishes this step from others."""
        return self.number, self.index_in_batch


class Point(NamedTuple):
    """A point of a fit, as counts.

    Args:
        batches: The number of training batches.
        epochs: The number of epochs, with the fraction of the current one if the number of its batches is known.
        steps: The number of optimizer steps.
    """

    batches: float
    epochs: float
    steps: float


_NOTHING = Point(0, 0, 0)


def fraction_done(point: Point, length: Point) -> float:
    """Return the fraction of a fit that is done at a point, or the number of batches if the fit is endless.

    The unit that is farthest along counts. Epochs count as a whole, since without a number of batches they have no fractions.
    """
    if math.isinf(min(length)):
        return point.batches
    done = (point.batches / length.batches, math.floor(point.epochs) / length.epochs, point.steps / length.steps)
    return float(min(max(done), 1.0))


@dataclass(frozen=True)
class Plan:
    """The length of a fit, as far as it is known at the start of an epoch.

    Args:
        max_epochs: The number of epochs in the fit; infinite without a limit.
        max_steps: The number of optimizer steps in the fit; infinite without a limit.
        per_epoch: The number of batches in each epoch from now on; infinite if the length of the data is unknown.
        per_step: The number of batches per optimizer step (``accumulate_grad_batches``), keyed by the first epoch to which
            it applies; empty if it is unknown, in manual optimization.
        start: The point at which the epoch starts.

    Example:
        >>> plan = Plan(max_epochs=10, per_epoch=10, per_step={0: 4})  # the third step of each epoch has 2 batches
        >>> plan.end
        Point(batches=100.0, epochs=10.0, steps=30.0)
        >>> [plan.point(marker).batches for marker in ("2ep", "4st")]
        [20.0, 14.0]
    """

    max_epochs: float = math.inf
    max_steps: float = math.inf
    per_epoch: float = math.inf
    per_step: Mapping[int, int] = field(default_factory=lambda: {0: 1})
    start: Point = _NOTHING

    @property
    def is_sized(self) -> bool:
        """Whether the number of batches in an epoch is known."""
        return math.isfinite(self.per_epoch)

    @property
    def is_automatic(self) -> bool:
        """Whether the number of batches per optimizer step is known."""
        return bool(self.per_step)

    @property
    def is_exact(self) -> bool:
        """Whether the numbers of batches in an epoch and in an optimizer step are both known."""
        return self.is_sized and self.is_automatic

    @property
    def total(self) -> float:
        """The number of batches in the fit; infinite if it is unknown."""
        if not self.is_sized:
            return math.inf
        by_epochs = self.start.batches + (self.max_epochs - self.start.epochs) * self.per_epoch
        by_steps = self._batches_at_step(self.max_steps) if self.is_automatic and math.isfinite(self.max_steps) else math.inf
        return float(min(by_epochs, by_steps))

    @property
    def end(self) -> Point:
        """The end of the fit. Unknown counts are infinite."""
        total = self.total
        epochs = self.max_epochs
        if self.is_automatic and math.isfinite(total):
            epochs = self.start.epochs + (total - self.start.batches) / self.per_epoch
            return Point(total, epochs, self._step_at(total))
        return Point(total, epochs, self.max_steps)

    @property
    def length(self) -> Point:
        """The measure of the fit's progress: batches if their number is known, otherwise epochs and steps.

        Units that do not count are infinite.
        """
        steps = math.inf if self.is_exact else self.max_steps
        return Point(self.total, math.inf if self.is_sized else self.max_epochs, steps)

    def point(self, marker: str) -> Point:
        """Return the point that a marker names, such as ``"3ep"`` (epochs) or ``"500st"`` (optimizer steps).

        The number of batches in an epoch must be known. Without the number of batches in a step, steps are NaN. Earlier epochs
        are assumed to be like this one.
        """
        number, unit = parse_marker(marker)
        ahead = (number - self.start.epochs) * self.per_epoch
        batches = max(self.start.batches + ahead, 0.0) if unit == "ep" else self._batches_at_step(number)
        epochs = number if unit == "ep" else self.start.epochs + (batches - self.start.batches) / self.per_epoch
        return Point(float(batches), float(epochs), float(number if unit == "st" else self._step_at(batches)))

    def _batches_at_step(self, number: float) -> float:
        """Return the number of batches in a number of optimizer steps. The last step of an epoch may have fewer batches."""
        if not self.is_automatic:
            return math.nan
        if number < self.start.steps:  # it is over; earlier epochs are assumed to be like this one
            return replace(self, start=_NOTHING)._batches_at_step(number)
        steps, batches = self.start.steps, self.start.batches
        for epochs, per_step in self._stretches():
            steps_per_epoch = math.ceil(self.per_epoch / per_step)
            if number - steps <= steps_per_epoch * epochs:
                whole, rest = divmod(number - steps, steps_per_epoch)
                return batches + whole * self.per_epoch + rest * per_step
            steps, batches = steps + steps_per_epoch * epochs, batches + self.per_epoch * epochs
        raise AssertionError("the last stretch of epochs has no end")

    def _step_at(self, batches: float) -> float:
        """Return the number of optimizer steps in a number of batches: the inverse of ``_batches_at_step``."""
        if not self.is_automatic:
            return math.nan
        if batches < self.start.batches:
            return replace(self, start=_NOTHING)._step_at(batches)
        steps, done = self.start.steps, self.start.batches
        for epochs, per_step in self._stretches():
            if batches - done <= self.per_epoch * epochs:
                whole, rest = divmod(batches - done, self.per_epoch)
                return steps + whole * math.ceil(self.per_epoch / per_step) + math.ceil(rest / per_step)
            steps, done = steps + math.ceil(self.per_epoch / per_step) * epochs, done + self.per_epoch * epochs
        raise AssertionError("the last stretch of epochs has no end")

    def _stretches(self) -> Iterator[tuple[float, int]]:
        """Yield stretches of epochs from the start on: their number, and the number of batches per optimizer step."""
        for begin, end in pairwise([*sorted(self.per_step), math.inf]):
            if end > self.start.epochs:
                yield end - max(begin, self.start.epochs), self.per_step[int(begin)]


@lru_cache
def parse_marker(marker: str) -> tuple[float, str]:
    """Split a marker such as ``"3ep"`` into its number and its unit, ``"ep"`` (epochs) or ``"st"`` (optimizer steps).

    Raises:
        ValueError: If it is malformed.

    Example:
        >>> parse_marker("3ep")
        (3.0, 'ep')
    """
    match = _MARKER.fullmatch(marker.strip())
    if match is None:
        raise ValueError(
            f"expected a fraction of training in [0, 1], epochs as in '3ep', or steps as in '500st', got {marker!r}"
        )
    return float(match[1]), match[2]
