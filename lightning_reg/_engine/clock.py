"""The clock of a fit: how far it is in batches, optimizer steps, and epochs, and which markers it has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_reg._engine.plan import Plan, Point, fraction_done, parse_marker

if TYPE_CHECKING:
    from collections.abc import Callable

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Moment:
    """A point of a fit, as a schedule sees it.

    Args:
        progress: The fraction of the fit that is done; in a run without an end, the number of batches.
        epochs: The number of epochs that are done, with the fraction of the current one; NaN outside of a fit.
        steps: The number of optimizer steps that are done; NaN outside of a fit.
        progress_at: Returns the progress at a marker in epochs or steps.
        is_exact: Whether that is exact: then values change with progress between markers, else in the unit of the markers.

    Example:
        >>> moment = Moment(progress=0.25, epochs=1.0, steps=500.0)
        >>> moment.has_passed("500st"), moment.has_passed(0.5), moment.between("0ep", "4ep")
        (True, False, 0.25)
    """

    progress: float
    epochs: float = math.nan
    steps: float = math.nan
    progress_at: Callable[[str], float] | None = None
    is_exact: bool = False

    def has_passed(self, marker: float | str) -> bool:
        """Return whether a marker is here or was before: a fraction of training, ``"3ep"``, or ``"500st"``."""
        number, unit = _split(marker)
        return self._count(unit, marker) >= number - _ROUNDING

    def between(self, begin: float | str, until: float | str) -> float:
        """Return the position x in [0, 1] between two markers: 0 before the first one, and 1 after the second."""
        if self.has_passed(until):
            return 1.0
        if not self.has_passed(begin):
            return 0.0
        (first, first_unit), (last, last_unit) = _split(begin), _split(until)
        now = self._count(last_unit, until)
        if self.is_exact or (first_unit != last_unit and first):
            now, first, last = self.progress, self._progress_at(begin), self._progress_at(until)
        return min(max((now - first) / (last - first), 0.0), 1.0) if last > first and math.isfinite(last) else 0.0

    def _count(self, unit: str, marker: float | str) -> float:
        count = {"": self.progress, "ep": self.epochs, "st": self.steps}[unit]
        if math.isnan(count) and _split(marker)[0]:
            raise RuntimeError(f"the position of the marker {marker!r} is unknown until a fit starts")
        return 0.0 if math.isnan(count) else count

    def _progress_at(self, marker: float | str) -> float:
        if not isinstance(marker, str):
            return marker
        assert self.progress_at is not None, "only a fit knows its epochs and steps"
        return self.progress_at(marker)


END = Moment(1.0, math.inf, math.inf)
"""A moment after the end of any schedule."""


class Clock:
    """The clock of one fit.

    Progress is the fraction of the planned training batches that are done. Where their number is unknown, it is the fraction of
    the epochs or of the optimizer steps. If the plan changes in the course of a fit, because epochs change their length or a
    resumed run has other limits, what is done stays done: progress goes on from where it is, and reaches 1 at the new end.

    Args:
        plan: The length of the fit, as far as it is known when it starts.

    Example:
        >>> clock = Clock(Plan(max_epochs=4, per_epoch=10))
        >>> clock.advance(Point(batches=20, epochs=2.0, steps=20)).progress
        0.5
        >>> clock.begin_epoch(Plan(max_epochs=4, per_epoch=40, start=Point(20, 2, 20)))  # epochs are longer from now on
        >>> clock.advance(Point(batches=60, epochs=3.0, steps=60)).progress
        0.75
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._length = plan.length
        self._anchor = (0.0, 0.0)  # a progress, and the fraction of the length that was done there
        self._passed: dict[str, float | None] = {}  # the progress at markers; None while they lie ahead
        self._ahead: dict[str, float] = {}  # the progress at markers according to the plan
        self.now = self.moment(Point(0, 0, 0))

    def begin_epoch(self, plan: Plan, here: Point | None = None) -> None:
        """Take over what is known when an epoch starts, or when it goes on after a resume, at a point within it."""
        here, length = here or plan.start, plan.length
        if length != self._length and math.isfinite(min(*length)) and math.isfinite(min(*self._length)):
            self._anchor = (self._progress(fraction_done(here, self._length)), fraction_done(here, length))
        self.plan, self._length = plan, length
        self._ahead.clear()

    def advance(self, point: Point) -> Moment:
        """Return the moment at a point, and remember which markers it has passed."""
        self.now = self.moment(point)
        for marker, progress in self._passed.items():
            if progress is None and self.now.has_passed(marker):
                self._passed[marker] = self.now.progress
        return self.now

    def moment(self, point: Point) -> Moment:
        """Return the moment at a point, which may lie ahead."""
        progress = self._progress(fraction_done(point, self._length))
        return Moment(progress, point.epochs, point.steps, self.progress_at, self.plan.is_sized and self.plan.is_automatic)

    def moment_at(self, marker: str) -> Moment:
        """Return the moment at a marker, as far as it is known."""
        return self.moment(self.plan.point(marker))

    def progress_at(self, marker: str) -> float:
        """Return the progress at a marker: where it was passed, or else where it will be passed according to the plan."""
        passed = self._passed.setdefault(marker, None)
        if passed is not None:
            return passed
        if marker not in self._ahead:
            self._ahead[marker] = self.moment_at(marker).progress
        return self._ahead[marker]

    def ends_before(self, marker: float | str) -> bool:
        """Return whether the fit ends before a marker."""
        number, unit = _split(marker)
        return bool(unit) and number > {"ep": self.plan.end.epochs, "st": self.plan.end.steps}[unit] + _ROUNDING

    def comes_before(self, marker: float | str, other: float | str) -> bool:
        """Return whether a marker comes before another one, as far as that is certain."""
        (first, unit), (last, other_unit) = _split(marker), _split(other)
        if unit == other_unit or not last:
            return first < last
        if not (self.plan.is_sized and self.plan.is_automatic) or math.isinf(min(self._length)):
            return False
        return self._expected(marker) < self._expected(other) - _ROUNDING

    def describe_end(self, marker: float | str) -> str:
        """Return when the fit ends, in the unit of a marker in epochs or steps."""
        unit = _split(marker)[1]
        end = {"ep": self.plan.end.epochs, "st": self.plan.end.steps}[unit]
        return f"after {end:g} {'epoch' if unit == 'ep' else 'optimizer step'}{'' if end == 1 else 's'}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain numbers."""
        return {"length": list(self._length), "anchor": list(self._anchor), "passed": dict(self._passed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of the run that is resumed."""
        self._length, self._passed = Point(*state["length"]), dict(state["passed"])
        progress, fraction = state["anchor"]
        self._anchor = (progress, fraction)

    def _expected(self, marker: float | str) -> float:
        return self.moment_at(marker).progress if isinstance(marker, str) else marker

    def _progress(self, fraction: float) -> float:
        """Return the progress at a fraction of the plan; both are equal unless the plan has changed."""
        progress, since = self._anchor
        if not progress and not since:
            return fraction
        return progress if since >= 1.0 else min(progress + (1.0 - progress) * (fraction - since) / (1.0 - since), 1.0)


def _split(marker: float | str) -> tuple[float, str]:
    """Return the number and the unit of a marker, which is empty for a fraction of training."""
    return parse_marker(marker) if isinstance(marker, str) else (marker, "")
