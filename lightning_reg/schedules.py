"""Values that change over training. A schedule is any callable from progress in [0, 1] to a float.

Progress is the number of training batches done, divided by the number planned. If the length of the training data is unknown,
progress is the fraction of epochs or steps done. Schedules start and end at *markers*: fractions of training (``0.25``),
epochs (``"3ep"``), or optimizer steps (``"500st"``, counted as ``trainer.global_step`` does). Epochs and steps also work in an
endless run, where fractions raise an error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lightning_reg._engine.arguments import POSITIVE, PROBABILITY, Interval, SignatureRepr, described_value, readable
from lightning_reg._engine.clock import Moment, marker_in_whole
from lightning_reg._engine.command_line import Infinity, ScheduleFunction
from lightning_reg._engine.plan import parse_marker

__all__ = ["Cosine", "Cubic", "Exponential", "Linear", "Schedule", "SequentialSchedule", "Steps", "Value", "Values"]

_REAL = Interval(-math.inf, math.inf, open_low=True, open_high=True)


class Schedule(SignatureRepr, ABC):
    """Base class of schedules: a value that depends on the progress of training, with markers where it changes.

    Write your own schedule as a plain function of progress. A callback calls it once with 0.0 when the callback is created.
    Subclass this class only if your schedule needs markers in epochs or steps.

    Example:
        >>> from lightning_reg import L2Penalty
        >>> callback = L2Penalty(lambda progress: 1e-3 * progress**2)
    """

    def __call__(self, progress: float) -> float:
        """Return the value at a progress in [0, 1], for a schedule without markers in epochs or steps."""
        return self.at_moment(Moment(progress))

    @abstractmethod
    def at_moment(self, moment: Moment) -> float:
        """Return the value at a point of a fit.

        A moment has the ``progress``, ``epochs``, and ``steps`` so far, and the methods ``has_passed(marker)`` and
        ``between(begin, until)``, which returns the position between two markers in [0, 1].
        """

    @property
    @abstractmethod
    def extremes(self) -> Sequence[float]:
        """Values that bound all others. They are checked when a callback is created."""

    @property
    def needs_end(self) -> bool:
        """Whether a marker is a nonzero fraction of training, so that the run must have an end."""
        return any(not isinstance(marker, str) and marker > 0 for marker in self.markers)

    @property
    @abstractmethod
    def markers(self) -> Sequence[float | str]:
        """The markers, in their required order."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))


Value = float | Infinity | Schedule | Callable[[float], float]
"""A number, a schedule, or any callable ``progress -> float``, which a callback calls once with 0.0 when it is created."""

Values = float | Infinity | Schedule | dict[str, float | Infinity | Schedule | ScheduleFunction] | Callable[[float], float]
"""A value, or a mapping from glob to value. In this order, jsonargparse saves a mapping as a mapping and a class as a class."""


class _Ramp(Schedule):
    """Base class of schedules that go from ``start`` to ``end`` between two markers, and are constant before and after."""

    def __init__(self, start: float, end: float, *, begin: float | str = 0.0, until: float | str = 1.0) -> None:
        kind = type(self).__name__
        self.start = _REAL.check(f"{kind}: start", start)
        self.end = _REAL.check(f"{kind}: end", end)
        self.begin = _check_marker(f"{kind}: begin", begin)
        self.until = _check_marker(f"{kind}: until", until)
        _check_order(kind, [self.begin, self.until])

    def at_moment(self, moment: Moment) -> float:
        """Return the value at a point of a fit."""
        x = moment.between(self.begin, self.until)
        return self.start if x <= 0.0 else self.end if x >= 1.0 else self._between(x)

    @abstractmethod
    def _between(self, x: float) -> float:
        """Return the value at x in (0, 1), the position between the markers."""

    @property
    def extremes(self) -> Sequence[float]:
        """The first and the last value. All others lie between them."""
        return (self.start, self.end)

    @property
    def markers(self) -> Sequence[float | str]:
        """Where the change begins and ends."""
        return (self.begin, self.until)


class Linear(_Ramp):
    """A straight line: v(x) = start + (end − start) · x.

    x runs from 0 at ``begin`` to 1 at ``until``.

    Args:
        start: The value before ``begin``.
        end: The value after ``until``.
        begin: When the change begins: a fraction of training, ``"3ep"`` (epochs), or ``"500st"`` (optimizer steps).
        until: When the change ends, in the same units.

    Raises:
        ValueError: If a marker is malformed, or ``until`` is before ``begin``.

    Example:
        >>> warmup = Linear(0.0, 1e-3, until=0.5)
        >>> [warmup(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.0005, 0.001, 0.001]
    """

    def _between(self, x: float) -> float:
        return self.start + (self.end - self.start) * x


class Cosine(_Ramp):
    """Half a cosine wave, flat at both ends: v(x) = end + (start − end) · (1 + cos πx) / 2.

    x runs from 0 at ``begin`` to 1 at ``until``.

    Args:
        start: The value before ``begin``.
        end: The value after ``until``.
        begin: When the change begins: a fraction of training, ``"3ep"`` (epochs), or ``"500st"`` (optimizer steps).
        until: When the change ends, in the same units.

    Raises:
        ValueError: If a marker is malformed, or ``until`` is before ``begin``.

    Example:
        >>> [round(Cosine(1.0, 0.0)(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.854, 0.5, 0.0]

    Reference:
        I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
    """

    def _between(self, x: float) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * x)) / 2.0


class Cubic(_Ramp):
    """A cubic curve, fast at first and then slower: v(x) = end + (start − end) · (1 − x)³.

    x runs from 0 at ``begin`` to 1 at ``until``.
    This is the curve of gradual pruning.

    Args:
        start: The value before ``begin``.
        end: The value after ``until``.
        begin: When the change begins: a fraction of training, ``"3ep"`` (epochs), or ``"500st"`` (optimizer steps).
        until: When the change ends, in the same units.

    Raises:
        ValueError: If a marker is malformed, or ``until`` is before ``begin``.

    Example:
        >>> [Cubic(0.0, 0.8)(progress) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.7000000000000001, 0.8]

    Reference:
        M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """

    def _between(self, x: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - x) ** 3


class Exponential(_Ramp):
    """Exponential growth or decay, by the same factor in each batch: v(x) = start · (end / start)^x.

    x runs from 0 at ``begin`` to 1 at ``until``.

    Args:
        start: The value before ``begin``, > 0.
        end: The value after ``until``, > 0.
        begin: When the change begins: a fraction of training, ``"3ep"`` (epochs), or ``"500st"`` (optimizer steps).
        until: When the change ends, in the same units.

    Raises:
        ValueError: If ``start`` or ``end`` is not positive, a marker is malformed, or ``until`` is before ``begin``.

    Example:
        >>> [round(Exponential(1.0, 0.01)(progress), 4) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.1, 0.01]
    """

    def __init__(self, start: float, end: float, *, begin: float | str = 0.0, until: float | str = 1.0) -> None:
        super().__init__(start, end, begin=begin, until=until)
        POSITIVE.check("Exponential: start", start)
        POSITIVE.check("Exponential: end", end)

    def _between(self, x: float) -> float:
        return float(self.start * (self.end / self.start) ** x)


class Steps(Schedule):
    """A staircase: ``values[0]`` before the first marker, ``values[1]`` from it on, and so on.

    Args:
        values: The values, one more than there are markers.
        at: The markers in increasing order: fractions of training, ``"3ep"`` (epochs), or ``"500st"`` (optimizer steps).

    Raises:
        TypeError: If ``values`` or ``at`` is not a list.
        ValueError: If the numbers of values and markers do not match, a marker is malformed, or the markers decrease.

    Example:
        >>> early = Steps([0.5, 0.0], at=[0.2])
        >>> early(0.19), early(0.2)
        (0.5, 0.0)
        >>> in_epochs = Steps([0.5, 0.0], at=["10ep"])
    """

    def __init__(self, values: list[float], at: list[float | str]) -> None:
        _check_lists("Steps", "value", values, at)
        self.values = [_REAL.check("Steps: each value", value) for value in values]
        self.at = [_check_marker("Steps: each marker", marker) for marker in at]
        _check_order("Steps", self.at)

    def at_moment(self, moment: Moment) -> float:
        """Return the value at a point of a fit."""
        return self.values[sum(moment.has_passed(marker) for marker in self.at)]

    @property
    def extremes(self) -> Sequence[float]:
        """All values."""
        return self.values

    @property
    def markers(self) -> Sequence[float | str]:
        """Where the value changes."""
        return self.at


class SequentialSchedule(Schedule):
    """Several schedules in turn, such as a warm-up and a decay, each over its own stretch of training.

    The first schedule acts up to the first marker, the second one from there to the second marker, and so on. The last one acts
    until the end of training.
    Markers of a schedule are relative to its stretch: fractions of it, or epochs or steps since it began. A stretch that
    begins at ``"5ep"`` takes fractions and epochs, and one that begins at ``"500st"`` takes fractions and steps. The first
    stretch takes all three.

    Args:
        schedules: The schedules, one more than there are markers. A number is a constant, and a function ``progress -> float``
            gets the fraction of its stretch.
        at: The markers in increasing order: fractions of training, ``"3ep"`` (epochs), or ``"500st"`` (optimizer steps).

    Raises:
        TypeError: If an argument is not a list, or a schedule is neither a schedule, a number, nor a function.
        ValueError: If the numbers of schedules and markers do not match, a marker is malformed, the markers decrease, or a
            schedule has a marker outside its stretch or in a unit that its stretch does not take.

    Example:
        >>> rise_and_fall = SequentialSchedule([Linear(0.0, 1.0), Linear(1.0, 0.0, until=0.5)], at=[0.2])
        >>> [rise_and_fall(progress) for progress in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
        >>> in_epochs = SequentialSchedule([Linear(0.0, 1e-3), Cosine(1e-3, 0.0)], at=["5ep"])
    """

    def __init__(self, schedules: list[Value], at: list[float | str]) -> None:
        _check_lists("SequentialSchedule", "schedule", schedules, at)
        self.schedules = schedules
        self.at = [_check_marker("SequentialSchedule: each marker", marker) for marker in at]
        self._parts = [_as_schedule(f"SequentialSchedule: schedule {i}", given) for i, given in enumerate(schedules)]
        self._begins, self._ends = [0.0, *self.at], [*self.at, 1.0]
        self._markers = self._absolute_markers()
        _check_order("SequentialSchedule", self._markers)

    def at_moment(self, moment: Moment) -> float:
        """Return the value at a point of a fit."""
        index = sum(moment.has_passed(marker) for marker in self.at)
        return self._parts[index].at_moment(moment.within(self._begins[index], self._ends[index]))

    @property
    def extremes(self) -> Sequence[float]:
        """The extremes of all schedules, in their order."""
        return [value for part in self._parts for value in part.extremes]

    @property
    def needs_end(self) -> bool:
        """Whether a marker is a fraction of training, or the last schedule depends on where training ends."""
        return any(not isinstance(marker, str) and marker > 0 for marker in self.at) or self._parts[-1].needs_end

    @property
    def markers(self) -> Sequence[float | str]:
        """The markers of all schedules over all of training, including those between schedules."""
        return self._markers

    def _absolute_markers(self) -> list[float | str]:
        """Return the markers in order, except for fractions of a stretch that cannot be expressed over all of training."""
        found: list[float | str] = []
        for part, since, until in zip(self._parts, self._begins, self._ends, strict=True):
            found += [marker for marker in _in_stretch(part, since, until) if marker is not None]
            found += [until] if until in self.at else []
        return found


def _in_stretch(part: Schedule, since: float | str, until: float | str) -> list[float | str | None]:
    """Return the markers of a schedule over all of training, or ``None`` for a fraction that cannot be expressed there.

    Raises:
        ValueError: If a marker has a unit that the stretch does not take, or cannot be compared with another one.
    """
    what = f"SequentialSchedule: {part!r} acts from {since!r} to {until!r}"
    try:
        absolute = [marker_in_whole(marker, since, until) for marker in part.markers]
    except ValueError as error:
        unit = f", or the unit of {since!r}" if isinstance(since, str) else ""
        raise ValueError(f"{what}, but its marker {error}: use fractions of the stretch{unit}") from None
    if None in absolute and any(isinstance(marker, str) for marker in part.markers):
        raise ValueError(f"{what}, where fractions cannot be compared with its other markers: use only one of the two")
    return absolute


class _Function(Schedule):
    """A number, or a function of progress, as a schedule."""

    def __init__(self, given: float | Callable[[float], float]) -> None:
        self.given = given

    def __repr__(self) -> str:
        return readable(self.given)

    def at_moment(self, moment: Moment) -> float:
        return self.given(moment.progress) if callable(self.given) else self.given

    @property
    def extremes(self) -> Sequence[float]:
        return (self.at_moment(Moment(0.0)),)

    @property
    def needs_end(self) -> bool:
        return callable(self.given)

    @property
    def markers(self) -> Sequence[float | str]:
        return ()


def _as_schedule(what: str, given: Any) -> Schedule:
    """Return a value as a schedule."""
    if isinstance(given, Schedule):
        return given
    if isinstance(given, type) or not callable(given):
        _REAL.check(f"{what}, unless it is a schedule or a function,", given)
    return _Function(given)


def _check_lists(kind: str, entry: str, entries: Any, at: Any) -> None:
    """Check that there is one more value, or schedule, than markers."""
    for name, given in ((f"{entry}s", entries), ("at", at)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"{kind}: {name} must be a list, got {described_value(given)}")
    if len(entries) != len(at) + 1:
        raise ValueError(
            f"{kind}: expected one more {entry} than markers, got {len(entries)} {entry}s and {len(at)} "
            f"markers: the first {entry} applies before the first marker"
        )


def _check_marker(what: str, marker: float | str) -> float | str:
    if not isinstance(marker, str):
        return PROBABILITY.check(f"{what}, as a fraction of training,", marker)
    try:
        parse_marker(marker)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return marker


def _check_order(what: str, markers: Sequence[float | str]) -> None:
    numbers = [parse_marker(marker) if isinstance(marker, str) else (marker, "") for marker in markers]
    for (earlier, earlier_unit), (later, later_unit) in pairwise(numbers):
        if earlier_unit == later_unit and later < earlier:
            raise ValueError(
                f"{what}: the markers must not decrease, got {earlier:g}{earlier_unit} before {later:g}{later_unit}"
            )
