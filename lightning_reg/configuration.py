"""How arguments are checked, shown and told apart: intervals, readable errors, ``repr`` from the signature."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["NON_NEGATIVE", "POSITIVE", "PROBABILITY", "Configured", "Interval", "check_choice", "check_whole", "near_names"]


@dataclass(frozen=True)
class Interval:
    """The numbers that an argument may take, and how an error message calls them.

    Args:
        low: The smallest number.
        high: The largest number.
        open_low: Whether ``low`` itself is excluded.
        open_high: Whether ``high`` itself is excluded.

    Example:
        >>> PROBABILITY.check("p", 0.5)
        0.5
        >>> PROBABILITY.check("p", 1.5)
        Traceback (most recent call last):
        ValueError: p must be a number in [0, 1], got 1.5
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below

    def check(self, what: str, number: Any) -> float:
        """Return ``number`` as a float, or raise an error that says what came and what was expected.

        Args:
            what: How the message names the argument.
            number: The value to check; NaN lies in no interval.

        Raises:
            TypeError: If it is no real number.
            ValueError: If it lies outside.
        """
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{what} must be a number in {self}, got {number!r} of type {type(number).__name__}")
        if float(number) not in self:
            raise ValueError(f"{what} must be a number in {self}, got {number!r}")
        return float(number)


def check_whole(what: str, number: Any, low: int) -> int:
    """Return a whole number, or raise an error that says what came and what was expected.

    Raises:
        ValueError: If it is none, or smaller than ``low``.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < low:
        raise ValueError(f"{what} must be a whole number ≥ {low}, got {number!r}")
    return number


def check_choice(what: str, value: Any, choices: Sequence[Any], other: str | None = None) -> None:
    """Refuse what is none of some choices, with an error that says what came and what was expected.

    Args:
        what: How the message names the argument.
        value: The value to check.
        choices: The values that it may have.
        other: What else is accepted, where a callable is.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> check_choice("scope", "modle", ("model", "tensor"))
        Traceback (most recent call last):
        ValueError: scope must be 'model' or 'tensor', got 'modle'
    """
    if value in choices or (other and callable(value)):
        return
    *names, last = [*map(repr, choices), *([other] if other else [])]
    raise ValueError(f"{what} must be {', '.join(names)} or {last}, got {value!r:.80}")


NON_NEGATIVE = Interval(0.0, math.inf, open_high=True)
POSITIVE = Interval(0.0, math.inf, open_low=True)
PROBABILITY = Interval(0.0, 1.0)


class Configured:
    """A ``repr`` made of the constructor's arguments, those at their default left out.

    It asks that each argument is kept under its own name.
    """

    def __repr__(self) -> str:
        shown = []
        for parameter in inspect.signature(type(self)).parameters.values():
            if not hasattr(self, parameter.name):  # such as **kwargs of a subclass
                continue
            value = self._as_given(parameter.name)
            if parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                shown.append(_readable(value))
            elif value != parameter.default:
                shown.append(f"{parameter.name}={_readable(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _as_given(self, argument: str) -> Any:
        return getattr(self, argument)


def near_names(wanted: str, names: Iterable[str], limit: int = 5) -> str:
    """List the names nearest to one that was not found, for an error message.

    Example:
        >>> near_names("encodr.weight", ["encoder.weight", "head.bias"])
        'encoder.weight'
    """
    known = list(dict.fromkeys(names))
    near = get_close_matches(wanted.strip("!*"), known, n=limit, cutoff=0.4) or known[:limit]
    return ", ".join(near) + (", …" if len(known) > len(near) and near == known[:limit] else "")


def _readable(value: Any) -> str:
    return getattr(value, "__name__", repr(value)) if callable(value) and inspect.isroutine(value) else repr(value)
