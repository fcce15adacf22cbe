"""The clock of a fit: its progress in batches, optimizer steps, and epochs, and the markers that it has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_reg._engine.plan import Plan, Point, fraction_done, parse_marker

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROUNDING = 1e-9


class Line(NamedTuple):
    """A straight line from ``value`` at ``since`` to 1 at ``until``, in any unit."""

    value: float
    since: float
    until: float

    def at(self, position: float) -> float:
        """Return the value at a position; 1 after the end."""
        if position >= self.until:
            return 1.0
        return self.value + (1.0 - self.value) * max(position - self.since, 0.0) / (self.until - self.since)

    def position(self, value: float) -> float:
        """Return where a value is reached: the inverse of ``at``, or the start for a value that was reached earlier."""
        if value <= self.value:
            return self.since
        return self.since + (self.until - self.since) * (value - self.value) / (1.0 - self.value)

    def to(self, until: float, position: float, here: float) -> Line:
        """Return the line that continues from the value at a position to another end. The position becomes ``here``."""
        return self if (until, here) == (self.until, position) else Line(self.at(position), here, until)


@dataclass(frozen=True)
class Moment:
    """A point of a fit, as a schedule sees it.

    Args:
        progress: The fraction of the fit that is done. In an endless run, the number of batches.
        epochs: The number of epochs that are done, with the fraction of the current one; NaN outside of a fit.
        steps: The number of optimizer steps that are done; NaN outside of a fit.
        batches: The number of training batches that are done; NaN outside of a fit.
        clock: The clock of the fit, which knows the positions of markers.

    Example:
        >>> moment = Moment(progress=0.25, epochs=1.0, steps=500.0)
        >>> moment.has_passed("500st"), moment.has_passed(0.5), moment.between("0ep", "4ep")
        (True, False, 0.25)
    """

    progress: float
    epochs: float = math.nan
    steps: float = math.nan
    batches: float = math.nan
    clock: Clock | None = field(default=None, repr=False, compare=False)

    def has_passed(self, marker: float | str) -> bool:
        """Return whether a marker has been reached: a fraction of training, ``"3ep"``, or ``"500st"``."""
        number, unit = _split(marker)
        if number and math.isnan(self.count(unit)):
            raise RuntimeError(f"the position of the marker {marker!r} is unknown until a fit starts")
        return not number or self.count(unit) >= number - _ROUNDING

    def between(self, begin: float | str, until: float | str) -> float:
        """Return the position x in [0, 1] between two markers: 0 before the first one, and 1 after the second."""
        if self.has_passed(until):
            return 1.0
        if not self.has_passed(begin):
            return 0.0
        if self.clock is not None:
            return self.clock.between(begin, until, self)
        return line_in_unit(begin, until, self).at(self.count(_split(until)[1]))

    def within(self, since: float | str, until: float | str) -> StretchMoment:
        """Return this point as seen by a schedule between two markers, where everything counts from the first one."""
        (first, unit), progress = _split(since), self.between(since, until)
        epochs, steps = (self.count(of) - first if unit == of or not first else math.nan for of in ("ep", "st"))
        return StretchMoment(progress, epochs, steps, whole=self, since=since, until=until)

    def count(self, unit: str) -> float:
        """Return the progress in a unit: ``"ep"`` (epochs), ``"st"`` (optimizer steps), or an empty string (fraction)."""
        return {"": self.progress, "ep": self.epochs, "st": self.steps}[unit]


@dataclass(frozen=True)
class StretchMoment(Moment):
    """A point within a stretch of a fit. Markers are relative to the stretch.

    Args:
        whole: The point in the whole fit.
        since: The marker where the stretch begins.
        until: The marker where it ends.

    Example:
        >>> moment = Moment(progress=0.5, epochs=6.0, steps=60.0).within("4ep", "8ep")
        >>> moment.progress, moment.epochs, moment.has_passed("2ep"), moment.has_passed(0.75)
        (0.5, 2.0, True, False)
    """

    whole: Moment = field(kw_only=True)
    since: float | str = field(kw_only=True)
    until: float | str = field(kw_only=True)

    def has_passed(self, marker: float | str) -> bool:
        """Return whether a marker, relative to the stretch, has been reached."""
        absolute = marker_in_whole(marker, self.since, self.until)
        if absolute is not None:
            return self.whole.has_passed(absolute)
        return self.progress >= _split(marker)[0] - _ROUNDING

    def between(self, begin: float | str, until: float | str) -> float:
        """Return the position x in [0, 1] between two markers that are relative to the stretch."""
        first, last = (marker_in_whole(marker, self.since, self.until) for marker in (begin, until))
        if first is not None and last is not None:
            return self.whole.between(first, last)
        return super().between(begin, until)


@lru_cache
def marker_in_whole(marker: float | str, since: float | str, until: float | str) -> float | str | None:
    """Return a marker within a stretch as a marker of the whole fit, or ``None`` if that cannot be expressed.

    Raises:
        ValueError: If its unit differs from that of the stretch's beginning.

    Example:
        >>> marker_in_whole("2ep", "5ep", 1.0), marker_in_whole(0.5, "2ep", "6ep"), marker_in_whole(0.5, "5ep", 1.0)
        ('7ep', '4ep', None)
    """
    (number, unit), (first, first_unit), (last, last_unit) = map(_split, (marker, since, until))
    if unit and first and unit != first_unit:
        raise ValueError(f"{marker!r} counts from {since!r}, which has a different unit")
    if number == 0.0:
        return since
    if unit:
        return _joined(first + number, unit)
    if number == 1.0:
        return until
    return _joined(first + number * (last - first), last_unit) if first_unit == last_unit or not first else None


def line_in_unit(begin: float | str, until: float | str, now: Moment) -> Line:
    """Return the line between two markers in the unit of the second. A first marker in another unit counts as passed now."""
    (first, unit), (last, other) = _split(begin), _split(until)
    return Line(0.0, first if unit == other or not first else now.count(other), last)


END = Moment(1.0, math.inf, math.inf)
"""A moment after the end of any schedule."""


_WHOLE = Line(0.0, 0.0, 1.0)


class Clock:
    """The clock of one fit.

    Progress is the fraction of the planned training batches that are done. If their number is unknown, it is the fraction of
    the epochs or optimizer steps. If the plan changes during a fit, because epochs change their length or a resumed run has
    other limits, progress continues from its current value, and reaches 1 at the new end.

    Args:
        plan: The length of the fit, as far as it is known when it starts.
        is_trial: Whether the fit only tries the code, so that its end says nothing about markers.

    Example:
        >>> clock = Clock(Plan(max_epochs=4, per_epoch=10))
        >>> clock.advance(Point(batches=20, epochs=2.0, steps=20)).progress
        0.5
        >>> clock.begin_epoch(Plan(max_epochs=4, per_epoch=40, start=Point(20, 2, 20)))  # epochs are longer from now on
        >>> clock.advance(Point(batches=60, epochs=3.0, steps=60)).progress
        0.75
    """

    def __init__(self, plan: Plan, *, is_trial: bool = False) -> None:
        self.plan = plan
        self.is_trial = is_trial
        self._length = plan.length
        self._is_exact = plan.is_exact
        self._line = _WHOLE  # progress over the fraction of the plan that is done
        self._ramps: dict[tuple[float | str, float | str], Line] = {}  # those that have begun, between their markers
        self.now = self.moment(plan.start)

    def begin_epoch(self, plan: Plan, here: Point | None = None) -> None:
        """Adopt the plan when an epoch starts, or when it continues after a resume, at a point within it."""
        here, length = here or plan.start, plan.length
        positions = {ramp: self._position(ramp[1], self.moment(here)) for ramp in self._ramps}
        if _has_end(length) and _has_end(self._length):
            self._line = self._line.to(1.0, fraction_done(here, self._length), fraction_done(here, length))
        else:
            self._line = _WHOLE
        self.plan, self._length, self._is_exact = plan, length, plan.is_exact
        self.now = now = self.moment(here)
        self._ramps = {ramp: line for ramp, line in self._ramps.items() if not now.has_passed(ramp[1])}
        for (begin, until), line in self._ramps.items():
            end = self._line_between(begin, until, now).until
            self._ramps[begin, until] = line.to(end, positions[begin, until], self._position(until, now))

    def advance(self, point: Point) -> Moment:
        """Return the moment at a point. Ramps that have begun continue from there if the plan changes."""
        self.now = self.moment(point)
        return self.now

    def moment(self, point: Point) -> Moment:
        """Return the moment at a point, which may lie ahead."""
        fraction = fraction_done(point, self._length)
        return Moment(
            self._line.at(fraction) if _has_end(self._length) else fraction, point.epochs, point.steps, point.batches, self
        )

    def moment_at(self, marker: str) -> Moment:
        """Return the moment at a marker according to the plan."""
        return self.moment(self.plan.point(marker))

    def between(self, begin: float | str, until: float | str, moment: Moment) -> float:
        """Return the position between two markers at a moment that lies between them."""
        line = self._ramps.get((begin, until)) or self._line_between(begin, until, moment)
        if moment is self.now:
            self._ramps[begin, until] = line
        return line.at(self._position(until, moment))

    def knows(self, markers: Iterable[float | str]) -> bool:
        """Return whether the plan determines the positions of markers. In manual optimization, steps cannot be predicted."""
        return self.plan.is_automatic or "st" not in [_split(marker)[1] for marker in markers]

    def ends_before(self, marker: float | str) -> bool:
        """Return whether the fit ends before a marker."""
        number, unit = _split(marker)
        return (
            bool(unit)
            and not self.is_trial
            and number > {"ep": self.plan.end.epochs, "st": self.plan.end.steps}[unit] + _ROUNDING
        )

    def comes_before(self, marker: float | str, other: float | str) -> bool:
        """Return whether a marker certainly comes before another one. The plan does not cover the past."""
        (first, unit), (last, other_unit) = _split(marker), _split(other)
        if unit == other_unit or not last:
            return first < last
        if self.is_trial or not self.plan.is_exact or not _has_end(self._length) or self.now.has_passed(marker):
            return False
        return self._progress_at(marker) < self._progress_at(other) - _ROUNDING

    def describe_end(self, marker: float | str) -> str:
        """Return when the fit ends, in the unit of a marker in epochs or steps."""
        unit = _split(marker)[1]
        end = {"ep": self.plan.end.epochs, "st": self.plan.end.steps}[unit]
        return f"after {end:g} {'epoch' if unit == 'ep' else 'optimizer step'}{'' if end == 1 else 's'}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain numbers."""
        ramps = [[*markers, *line] for markers, line in self._ramps.items()]
        return {"length": list(self._length), "is_exact": self._is_exact, "line": list(self._line), "ramps": ramps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of the resumed run."""
        self._length, self._is_exact, self._line = Point(*state["length"]), state["is_exact"], Line(*state["line"])
        self._ramps = {(begin, until): Line(*line) for begin, until, *line in state["ramps"]}

    def _position(self, until: float | str, moment: Moment) -> float:
        """Return the position of a moment on the way to a marker, in batches if they are known, else in the marker's unit."""
        unit = _split(until)[1]
        return moment.batches if unit and self._is_exact else moment.count(unit)

    def _line_between(self, begin: float | str, until: float | str, now: Moment) -> Line:
        """Return the line between two markers according to the plan."""
        if not self._is_exact:
            return line_in_unit(begin, until, now)
        at = self._batches_at if isinstance(until, str) else self._progress_at
        return Line(0.0, min(at(begin), self._position(until, now)), at(until))

    def _progress_at(self, marker: float | str) -> float:
        return self.moment_at(marker).progress if isinstance(marker, str) else marker

    def _batches_at(self, marker: float | str) -> float:
        if isinstance(marker, str):
            return self.plan.point(marker).batches
        return self._line.position(marker) * self._length.batches if marker else 0.0


def _has_end(length: Point) -> bool:
    return math.isfinite(min(length))


def _joined(number: float, unit: str) -> float | str:
    """Return the marker with a number and a unit: the reverse of ``_split``."""
    return f"{number:.12f}".rstrip("0").rstrip(".") + unit if unit else number


def _split(marker: float | str) -> tuple[float, str]:
    """Return the number and the unit of a marker, which is empty for a fraction of training."""
    return parse_marker(marker) if isinstance(marker, str) else (marker, "")
