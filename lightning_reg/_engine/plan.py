"""The planned length of a fit, and conversions between batches, optimizer steps, epochs, and progress."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_MARKER = re.compile(r"(\d+(?:\.\d+)?)(ep|st)")


class Step(NamedTuple):
    """The number of an optimizer step, equal on every rank and after a resume.

    Args:
        number: The number of optimizer steps before it. In manual optimization, where optimizers may take turns, the number of
            batches before it.
        index_in_batch: Its index among the steps of its batch; always 0 in automatic optimization.
    """

    number: int
    index_in_batch: int = 0


@dataclass(frozen=True)
class Plan:
    """The planned length of a fit, in training batches.

    Args:
        total: The number of batches in the fit; infinite if the run has no end.
        per_epoch: The number of batches in an epoch; infinite if the length of the data is unknown.
        per_step: The number of batches per optimizer step (``accumulate_grad_batches``), keyed by the first epoch to which
            it applies.

    Example:
        >>> plan = Plan(total=100, per_epoch=10, per_step={0: 4})
        >>> plan.batches("2ep"), plan.batches("4st"), plan.batches(0.5)  # the third step of each epoch has 2 batches
        (20.0, 14.0, 50.0)
    """

    total: float
    per_epoch: float = math.inf
    per_step: Mapping[int, int] = field(default_factory=lambda: {0: 1})

    @property
    def horizon(self) -> float:
        """The number of batches at progress 1: those of the fit, or a single one if the run has no end."""
        return self.total if math.isfinite(self.total) else 1.0

    def progress(self, batches: float) -> float:
        """Return the progress after a number of batches. It exceeds 1 only in a run without an end."""
        return min(batches / self.horizon, 1.0) if math.isfinite(self.total) else batches

    def batches(self, marker: float | str) -> float:
        """Return the number of training batches before a marker.

        Args:
            marker: A fraction of training, epochs such as ``"3ep"``, or optimizer steps such as ``"500st"``.

        Raises:
            ValueError: If this run has no such point, or the marker is malformed.
        """
        if not isinstance(marker, str):
            return self._fraction(marker)
        number, unit = parse_marker(marker)
        return self._epochs(marker, number) if unit == "ep" else self.steps(number)

    def steps(self, number: float) -> float:
        """Return the number of batches in a number of optimizer steps. The last step of an epoch may have fewer batches."""
        changes = sorted(self.per_step)
        if math.isinf(self.per_epoch):
            return number * self.per_step[changes[0]]
        for begin, end in pairwise([*changes, math.inf]):
            per_step = self.per_step[int(begin)]
            steps_per_epoch = math.ceil(self.per_epoch / per_step)
            if number <= steps_per_epoch * (end - begin):
                epochs, rest = divmod(number, steps_per_epoch)
                return (begin + epochs) * self.per_epoch + rest * per_step
            number -= steps_per_epoch * (end - begin)
        raise AssertionError("the last range of epochs has no end")

    def why_no_end(self) -> str:
        """Return why this run has no end, and what to do about it."""
        if math.isinf(self.per_epoch):
            return "the length of the training data is unknown; set max_steps, or count steps, as in '500st'"
        return "the run has no end; set max_epochs or max_steps, or count epochs or steps, as in '3ep' or '500st'"

    def _epochs(self, marker: str, number: float) -> float:
        if math.isinf(self.per_epoch):
            raise ValueError(
                f"the marker {marker!r} counts epochs, but the length of an epoch is unknown; count steps, as in '500st'"
            )
        return number * self.per_epoch

    def _fraction(self, fraction: float) -> float:
        if fraction and math.isinf(self.total):
            raise ValueError(f"the marker {fraction:g} is a fraction of training, but {self.why_no_end()}")
        return fraction * self.horizon


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
