"""How long a fit lasts, and where in it a marker lies: the arithmetic between batches, optimizer steps, epochs and progress."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["Plan", "parse_marker"]

_MARKER = re.compile(r"(\d+(?:\.\d+)?)(ep|st)")


@dataclass(frozen=True)
class Plan:
    """How long a fit is meant to last, in training batches.

    Args:
        total: Batches in all, infinite for a run without an end.
        per_epoch: Batches in an epoch, infinite where the length of the data is unknown.
        per_step: Batches per optimizer step (``accumulate_grad_batches``), or ``None`` where it varies.

    Example:
        >>> plan = Plan(total=100, per_epoch=10, per_step=4)
        >>> plan.batches("2ep"), plan.batches("4st"), plan.batches(0.5)  # the third step of an epoch has 2 batches
        (20.0, 14.0, 50.0)
    """

    total: float
    per_epoch: float = math.inf
    per_step: int | None = 1

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
        return self._epochs(marker, number) if unit == "ep" else self.steps(number, marker)

    def steps(self, number: float, marker: str = "") -> float:
        """Return the batches of a number of optimizer steps, the last step of an epoch being as short as it is."""
        if self.per_step is None:
            raise ValueError(f"{marker!r} cannot be placed: accumulate_grad_batches varies; count epochs, as in '3ep'")
        if math.isinf(self.per_epoch):
            return number * self.per_step
        epochs, rest = divmod(number, math.ceil(self.per_epoch / self.per_step))
        return epochs * self.per_epoch + rest * self.per_step

    def _epochs(self, marker: str, number: float) -> float:
        if math.isinf(self.per_epoch):
            raise ValueError(f"{marker!r} cannot be placed: the epoch's length is unknown; count steps, as in '500st'")
        return number * self.per_epoch

    def _fraction(self, fraction: float) -> float:
        if fraction and math.isinf(self.total):
            raise ValueError(
                f"a schedule over the fraction {fraction:g} of training needs a run with an end, but neither max_epochs "
                "nor max_steps gives one: set one of them, or count epochs or steps (until='3ep', until='500st')"
            )
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
