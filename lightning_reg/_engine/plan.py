"""How long a fit lasts, and where in it a marker lies: the arithmetic between batches, optimizer steps, epochs and progress."""

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
    """Which optimizer step it is: the same on every rank and after a resume.

    Args:
        number: The optimizer steps done before it; in manual optimization, where optimizers may step in turn, the batches.
        turn: Which of the steps within one batch it is, in manual optimization.
    """

    number: int
    turn: int = 0


@dataclass(frozen=True)
class Plan:
    """How long a fit is meant to last, in training batches.

    Args:
        total: Batches in all, infinite for a run without an end.
        per_epoch: Batches in an epoch, infinite where the length of the data is unknown.
        per_step: Batches per optimizer step (``accumulate_grad_batches``), by the first epoch for which it holds.

    Example:
        >>> plan = Plan(total=100, per_epoch=10, per_step={0: 4})
        >>> plan.batches("2ep"), plan.batches("4st"), plan.batches(0.5)  # the third step of an epoch has 2 batches
        (20.0, 14.0, 50.0)
    """

    total: float
    per_epoch: float = math.inf
    per_step: Mapping[int, int] = field(default_factory=lambda: {0: 1})

    @property
    def horizon(self) -> float:
        """What progress is measured against: the planned batches, or a single one where there is no end."""
        return self.total if math.isfinite(self.total) else 1.0

    def progress(self, batches: float) -> float:
        """Return the progress after a number of batches; it goes beyond 1 only in a run without an end."""
        return min(batches / self.horizon, 1.0) if math.isfinite(self.total) else batches

    def batches(self, marker: float | str) -> float:
        """Return the number of training batches that lie before a marker.

        Raises:
            ValueError: If the marker cannot be placed, with the kind of marker that can.
        """
        if not isinstance(marker, str):
            return self._fraction(marker)
        number, unit = parse_marker(marker)
        return self._epochs(marker, number) if unit == "ep" else self.steps(number)

    def steps(self, number: float) -> float:
        """Return the batches of a number of optimizer steps, the last step of an epoch being as short as it is."""
        changes = sorted(self.per_step)
        if math.isinf(self.per_epoch):
            return number * self.per_step[changes[0]]
        for begin, end in pairwise([*changes, math.inf]):
            per_step = self.per_step[int(begin)]
            in_epoch = math.ceil(self.per_epoch / per_step)
            if number <= in_epoch * (end - begin):
                epochs, rest = divmod(number, in_epoch)
                return (begin + epochs) * self.per_epoch + rest * per_step
            number -= in_epoch * (end - begin)
        raise AssertionError("the last stretch has no end")

    def why_no_end(self) -> str:
        """Say why progress cannot be told in this run, and what to do."""
        if math.isinf(self.per_epoch):
            return "the length of the training data is unknown; set max_steps, or count steps, as in '500st'"
        return "the run has no end; set max_epochs or max_steps, or count epochs or steps, as in '3ep' or '500st'"

    def _epochs(self, marker: str, number: float) -> float:
        if math.isinf(self.per_epoch):
            raise ValueError(f"{marker!r} cannot be placed: the epoch's length is unknown; count steps, as in '500st'")
        return number * self.per_epoch

    def _fraction(self, fraction: float) -> float:
        if fraction and math.isinf(self.total):
            raise ValueError(f"the fraction {fraction:g} of training means nothing here: {self.why_no_end()}")
        return fraction * self.horizon


def parse_marker(marker: str) -> tuple[float, str]:
    """Split a marker such as ``"3ep"`` into its number and its unit, ``"ep"`` (epochs) or ``"st"`` (optimizer steps).

    Raises:
        ValueError: If it is malformed, with examples of what is expected.
    """
    match = _MARKER.fullmatch(marker.strip())
    if match is None:
        raise ValueError(
            f"expected a fraction of training in [0, 1], epochs as in '3ep' or steps as in '500st', got {marker!r}"
        )
    return float(match[1]), match[2]
