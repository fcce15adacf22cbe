"""Values that change over training: a schedule is any callable from progress in [0, 1] to a float.

Progress is training batches done over training batches planned. Where a schedule starts and ends is a *marker*: a fraction
of training (``0.25``), a number of epochs (``"3ep"``) or of optimizer steps (``"500st"``). Epochs and steps are turned
into progress when training starts, so they also work in a run without an end, where a fraction means nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise

from lightning_reg._engine.arguments import POSITIVE, PROBABILITY, Interval, SignatureRepr
from lightning_reg._engine.plan import Plan, parse_marker

__all__ = ["Cosine", "Cubic", "Exponential", "Linear", "Schedule", "Steps", "Value"]

_REAL = Interval(-math.inf, math.inf, open_low=True, open_high=True)


class Schedule(SignatureRepr, ABC):
    """A value that depends on the progress of training, with markers that say where it changes.

    Write your own as a plain function of progress: a schedule is any callable ``progress -> float``. Subclass this only for
    markers in epochs or steps.
    """

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the value at a progress in [0, 1]."""

    @abstractmethod
    def resolve(self, plan: Plan) -> Schedule:
        """Return the same schedule with every marker turned into progress."""

    @property
    @abstractmethod
    def extremes(self) -> Sequence[float]:
        """Values between which all others lie; they are checked when the callback is made."""

    @property
    def needs_end(self) -> bool:
        """Whether a marker is a fraction of training other than 0, which only a run with an end has."""
        return any(not isinstance(marker, str) and marker > 0 for marker in self._markers)

    @property
    @abstractmethod
    def _markers(self) -> Sequence[float | str]: ...

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))


Value = float | Schedule | Callable[[float], float]
"""A number, a schedule, or any callable ``progress -> float``."""


class _Ramp(Schedule):
    """From ``start`` to ``end`` between two markers, constant before and after."""

    def __init__(self, start: float, end: float, *, begin: float | str = 0.0, until: float | str = 1.0) -> None:
        kind = type(self).__name__
        self.start = _REAL.check(f"{kind}: start", start)
        self.end = _REAL.check(f"{kind}: end", end)
        self.begin = _check_marker(f"{kind}: begin", begin)
        self.until = _check_marker(f"{kind}: until", until)
        _check_order(kind, [self.begin, self.until])

    def __call__(self, progress: float) -> float:
        """Return the value at a progress in [0, 1]."""
        begin, until = _number(self.begin), _number(self.until)
        if progress < begin:
            return self.start
        if progress >= until:
            return self.end
        return self._between((progress - begin) / (until - begin))

    @abstractmethod
    def _between(self, x: float) -> float:
        """Return the value at ``x`` in [0, 1) between the markers."""

    def resolve(self, plan: Plan) -> Schedule:
        """Return the same schedule with every marker turned into progress."""
        resolved = copy(self)
        resolved.begin, resolved.until = (plan.batches(marker) / plan.horizon for marker in self._markers)
        _check_order(repr(self), [resolved.begin, resolved.until])
        return resolved

    @property
    def extremes(self) -> Sequence[float]:
        """The two ends: every value lies between them."""
        return (self.start, self.end)

    @property
    def _markers(self) -> Sequence[float | str]:
        return (self.begin, self.until)


class Linear(_Ramp):
    r"""A straight line: :math:`v(x) = start + (end - start)\,x`.

    Here :math:`x` runs from 0 at ``begin`` to 1 at ``until``.

    Args:
        start: The value up to ``begin``.
        end: The value from ``until`` on.
        begin: Where the change begins: a fraction of training, ``"3ep"`` (epochs) or ``"500st"`` (optimizer steps).
        until: Where the change is complete, in the same units.

    Raises:
        ValueError: If a marker is malformed, or ``until`` lies before ``begin``.

    Example:
        >>> warmup = Linear(0.0, 1e-3, until=0.5)
        >>> [warmup(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.0005, 0.001, 0.001]
    """

    def _between(self, x: float) -> float:
        return self.start + (self.end - self.start) * x


class Cosine(_Ramp):
    r"""Half a cosine wave, flat at both ends: :math:`v(x) = end + (start - end)\,(1 + \cos \pi x) / 2`.

    Args:
        start: The value up to ``begin``.
        end: The value from ``until`` on.
        begin: Where the change begins: a fraction of training, ``"3ep"`` (epochs) or ``"500st"`` (optimizer steps).
        until: Where the change is complete, in the same units.

    Raises:
        ValueError: If a marker is malformed, or ``until`` lies before ``begin``.

    Example:
        >>> [round(Cosine(1.0, 0.0)(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.854, 0.5, 0.0]

    Reference:
        The annealing of I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
    """

    def _between(self, x: float) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * x)) / 2.0


class Cubic(_Ramp):
    r"""Fast at first, then ever slower: :math:`v(x) = end + (start - end)\,(1 - x)^3`.

    Args:
        start: The value up to ``begin``.
        end: The value from ``until`` on.
        begin: Where the change begins: a fraction of training, ``"3ep"`` (epochs) or ``"500st"`` (optimizer steps).
        until: Where the change is complete, in the same units.

    Raises:
        ValueError: If a marker is malformed, or ``until`` lies before ``begin``.

    Example:
        >>> [Cubic(0.0, 0.8)(progress) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.7000000000000001, 0.8]

    Reference:
        M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """

    def _between(self, x: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - x) ** 3


class Exponential(_Ramp):
    r"""The same factor in every batch: :math:`v(x) = start\,(end / start)^x`.

    Args:
        start: The value up to ``begin``; positive.
        end: The value from ``until`` on; positive.
        begin: Where the change begins: a fraction of training, ``"3ep"`` (epochs) or ``"500st"`` (optimizer steps).
        until: Where the change is complete, in the same units.

    Raises:
        ValueError: If ``start`` or ``end`` is not positive, a marker is malformed, or ``until`` lies before ``begin``.

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
    """A staircase: ``values[i]`` from the i-th marker on.

    Args:
        values: One value more than there are markers.
        at: Where the next value sets in, in increasing order: fractions of training, ``"3ep"`` or ``"500st"``.

    Raises:
        ValueError: If the lengths do not fit, a marker is malformed, or the markers do not increase.

    Example:
        >>> early = Steps([0.5, 0.0], at=["10ep"]).resolve(Plan(total=1000, per_epoch=20))
        >>> early(0.19), early(0.2)
        (0.5, 0.0)
    """

    def __init__(self, values: list[float], at: list[float | str]) -> None:
        if len(values) != len(at) + 1:
            raise ValueError(
                f"Steps: values must hold one value more than there are markers, got {len(values)} values and "
                f"{len(at)} markers: the first value holds before the first marker"
            )
        self.values = [_REAL.check("Steps: each of values", value) for value in values]
        self.at = [_check_marker("Steps: each of at", marker) for marker in at]
        _check_order("Steps", self.at)

    def __call__(self, progress: float) -> float:
        """Return the value at a progress in [0, 1]."""
        return self.values[bisect_right([_number(marker) for marker in self.at], progress)]

    def resolve(self, plan: Plan) -> Schedule:
        """Return the same schedule with every marker turned into progress."""
        resolved = copy(self)
        resolved.at = [plan.batches(marker) / plan.horizon for marker in self.at]
        _check_order(repr(self), resolved.at)
        return resolved

    @property
    def extremes(self) -> Sequence[float]:
        """All its values."""
        return self.values

    @property
    def _markers(self) -> Sequence[float | str]:
        return self.at


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
    for (earlier, unit), (later, other) in pairwise(numbers):
        if unit == other and later < earlier:
            raise ValueError(f"{what}: the markers must not decrease, got {earlier:g}{unit} before {later:g}{other}")


def _number(marker: float | str) -> float:
    if isinstance(marker, str):
        raise RuntimeError(f"the marker {marker!r} is known only once a fit has started: call resolve(plan) first")
    return marker
