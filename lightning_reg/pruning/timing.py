"""When pruning happens: at the end of each n-th epoch, or after each n-th optimizer step."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from lightning_reg._engine.arguments import described_value
from lightning_reg._engine.plan import parse_marker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_reg._engine.clock import Clock, Moment
    from lightning_reg._engine.plan import Plan, Point

_ROUNDING = 1e-9
_MANY = 1000  # the most planned prunings that are checked; beyond that, a subset


class Every(NamedTuple):
    """How often pruning happens.

    Args:
        number: The number of epochs or steps from one pruning to the next.
        unit: ``"ep"`` for epochs, ``"st"`` for optimizer steps.

    Example:
        >>> every = parse_every("WeightPruning", "100st")
        >>> every.is_due(before=99, done=100), every.is_due(before=100, done=101), str(every)
        (True, False, '100st')
    """

    number: int
    unit: str

    def __str__(self) -> str:
        return f"{self.number}{self.unit}"

    def is_due(self, before: float, done: float) -> bool:
        """Return whether pruning was due between two counts of epochs or steps."""
        return done // self.number > before // self.number


def parse_every(what: str, every: str) -> Every:
    """Parse a string such as ``"1ep"`` or ``"100st"``.

    Args:
        what: The name of the callback, for the error message.
        every: The string.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is malformed, or the number is not an integer ≥ 1.
    """
    expected = f"{what}: every must be a whole number of epochs, as in '1ep', or of optimizer steps, as in '100st', got"
    if not isinstance(every, str):
        raise TypeError(f"{expected} {described_value(every)}")
    try:
        number, unit = parse_marker(every)
    except ValueError:
        raise ValueError(f"{expected} {every!r}") from None
    if number < 1 or number != int(number):
        raise ValueError(f"{expected} {every!r}")
    return Every(int(number), unit)


def planned_targets(schedule: Callable[[Moment], float], clock: Clock, every: Every) -> dict[float, float]:
    """Return the sparsity of each remaining pruning of a fit, or of a subset if there are very many.

    Args:
        schedule: The sparsity as a function of the moment.
        clock: The clock of the fit.
        every: How often pruning happens.

    Returns:
        Sparsities, which never decrease, keyed by the number of batches before the pruning; empty if that number is unknown.
    """
    points = _planned_points(clock.plan, every)
    targets = accumulate((schedule(clock.moment(point)) for point in points), max)
    return {point.batches: target for point, target in zip(points, targets, strict=True)}


def _planned_points(plan: Plan, every: Every) -> list[Point]:
    if not plan.is_sized or math.isinf(plan.total) or (every.unit == "st" and not plan.is_automatic):
        return []
    start, end = (plan.start.epochs, plan.end.epochs) if every.unit == "ep" else (plan.start.steps, plan.end.steps)
    numbers = range((int(start) // every.number + 1) * every.number, int(end + _ROUNDING) + 1, every.number)
    some = {*numbers[:: len(numbers) // _MANY + 1], *numbers[-1:]}
    return [plan.point(f"{number}{every.unit}") for number in sorted(some)]


def check_rewinding(what: str, step: int | None, planned: Mapping[float, float], clock: Clock) -> None:
    """Check that the step to rewind to is not after the first pruning.

    Args:
        what: The name of the callback, for the error message.
        step: The step to rewind to, or ``None`` for no check.
        planned: What ``planned_targets`` returned.
        clock: The clock of the fit.

    Raises:
        ValueError: If it is.
    """
    first = next((batches for batches, target in planned.items() if target), None)
    if first is not None and step and clock.plan.point(f"{step}st").batches > first:
        raise ValueError(late_rewinding_message(what, step, f"{first:g} batches"))


def late_rewinding_message(what: str, step: int, first: str) -> str:
    """Return the error message for a step to rewind to that is after the first pruning."""
    return (
        f"{what}: rewind_to_step={step} is after the first pruning, which happens after {first}: prune later, or rewind to an "
        "earlier step"
    )


def short_schedule_warning(planned: Mapping[float, float], final: float, clock: Clock) -> str:
    """Return a warning if the last pruning of the fit does not reach the final sparsity; otherwise, an empty string.

    Args:
        planned: What ``planned_targets`` returned.
        final: The sparsity at the end of the schedule.
        clock: The clock of the fit.
    """
    last = max(planned, default=None)
    if last is None or planned[last] >= final:
        return ""
    return (
        f"reaches a sparsity of only {planned[last]:.2%}, not the final {final:.2%} of its schedule: the last pruning is after "
        f"{last:g} of {clock.plan.total:g} batches; end the schedule earlier (until=…), or prune at the end of the fit"
    )


def never_warning(every: Every, plan: Plan) -> str:
    """Return a warning if pruning never happens, or may never happen; otherwise, an empty string.

    Args:
        every: How often pruning happens.
        plan: The length of the fit.
    """
    unit = "epoch" if every.unit == "ep" else "step"
    end = plan.end.steps if every.unit == "st" else plan.end.epochs if math.isfinite(plan.total) else math.inf
    if end < every.number - _ROUNDING:
        return (
            f"never prunes: every='{every}', but the fit ends before the end of {unit} {every.number}; prune more often, or "
            "train longer"
        )
    if every.unit == "ep" and not plan.is_sized and math.isinf(plan.max_epochs):
        return (
            f"prunes at the end of epochs (every='{every}'), but the data have no length, and the fit has no max_epochs: if "
            "the data never end, it never prunes. Use steps, as in every='100st'"
        )
    return ""
