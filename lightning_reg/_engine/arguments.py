"""Constructor arguments: their valid values, readable errors, and a ``repr`` that shows them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True)
class Interval:
    """The range of an argument, and its notation in error messages.

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
        """Return ``number`` as a float if it is in the interval.

        Args:
            what: The name of the argument, for the error message.
            number: The value to check. NaN is in no interval.

        Raises:
            TypeError: If it is not a real number.
            ValueError: If it is not in the interval.
        """
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{what} must be a number in {self}, got {described_value(number)} of type {type(number).__name__}")
        if float(number) not in self:
            raise ValueError(f"{what} must be a number in {self}, got {number!r}")
        return float(number)


NON_NEGATIVE = Interval(0.0, math.inf, open_high=True)
POSITIVE = Interval(0.0, math.inf, open_low=True)
PROBABILITY = Interval(0.0, 1.0)


def check_integer(what: str, number: Any, low: int, below: int | None = None) -> int:
    """Return an integer if it is in range.

    Args:
        what: The name of the argument, for the error message.
        number: The value to check.
        low: The smallest integer allowed.
        below: The smallest integer above ``low`` that is not allowed. There is no upper limit by default.

    Raises:
        ValueError: If it is not an integer, or out of range.

    Example:
        >>> check_integer("patience", 2.5, 1)
        Traceback (most recent call last):
        ValueError: patience must be an integer ≥ 1, got 2.5
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < low or (below is not None and number >= below):
        expected = f"≥ {low}" if below is None else f"in [{low}, {below})"
        raise ValueError(f"{what} must be an integer {expected}, got {number!r}")
    return number


def check_seed(what: str, seed: Any) -> int:
    """Return a seed if it is an integer in [0, 2^31).

    Raises:
        ValueError: If it is not.
    """
    return check_integer(what, seed, 0, 2**31)


def check_choice(what: str, value: Any, choices: Sequence[Any], other: str | None = None) -> None:
    """Raise an error if a value is not one of the choices.

    Args:
        what: The name of the argument, for the error message.
        value: The value to check.
        choices: The allowed values.
        other: A description of allowed callables, if any.

    Raises:
        ValueError: If it is not one of them.

    Example:
        >>> check_choice("scope", "modle", ("model", "tensor"))
        Traceback (most recent call last):
        ValueError: scope must be 'model' or 'tensor', got 'modle'
    """
    if value in choices or (other and callable(value)):
        return
    *names, last = [*map(repr, choices), *([other] if other else [])]
    raise ValueError(f"{what} must be {', '.join(names)} or {last}, got {value!r:.80}")


def check_module(what: str, module: Any) -> None:
    """Raise an error if a value is not a module.

    Raises:
        TypeError: If it is not a module. The message says what to pass.
    """
    if not isinstance(module, nn.Module):
        fix = f"create one, as in {module.__name__}(…)" if isinstance(module, type) else "pass the model itself"
        raise TypeError(f"{what}: expected a module, got {described_value(module)}: {fix}")


class SignatureRepr:
    """A ``repr`` that shows the constructor's arguments, except those at their defaults.

    Each argument must be stored as an attribute of the same name.
    """

    def __repr__(self) -> str:
        shown = []
        for parameter in constructor_arguments(type(self)):
            value = self._repr_value(parameter.name)
            if parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                shown.append(readable(value))
            elif not _equal(value, parameter.default):
                shown.append(f"{parameter.name}={readable(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_value(self, argument: str) -> Any:
        return getattr(self, argument)


def constructor_arguments(cls: type) -> list[inspect.Parameter]:
    """Return the named arguments of a class's constructor: neither ``*args`` nor ``**kwargs``."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter for parameter in inspect.signature(cls).parameters.values() if parameter.kind not in variadic]


def close_matches(wanted: str, names: Iterable[str], limit: int = 5, shown: Sequence[str] = ()) -> str:
    """List the names closest to one that was not found, for an error message.

    Args:
        wanted: The name that was not found. Its case does not matter.
        names: The existing names.
        limit: The largest number of names to list.
        shown: The names to list if none is close; all by default.

    Example:
        >>> close_matches("encodr.weight", ["encoder.weight", "head.bias"])
        'encoder.weight'
        >>> close_matches("relu", ["ReLU", "Linear"])
        'ReLU'
    """
    known = list(dict.fromkeys(names))
    by_lower: dict[str, list[str]] = {}
    for name in known:
        by_lower.setdefault(name.lower(), []).append(name)
    found = get_close_matches(wanted.strip("!*").lower(), by_lower, n=limit, cutoff=0.4)
    close = [name for lower in found for name in by_lower[lower]][:limit]
    if close:
        return ", ".join(close)
    listed = list(shown) or known
    return ", ".join(listed[:limit]) + (", …" if len(listed) > limit else "")


def quoting_hint(example: str) -> str:
    """Return how to write a list on the command line, where ``!`` and ``*`` have special meanings in YAML.

    Example:
        >>> print(quoting_hint("ReLU"))
        quote each entry of the list, as in '["ReLU", "!head.*"]'
    """
    return f'quote each entry of the list, as in \'["{example}", "!head.*"]\''


def text_keys(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a mapping with integer keys converted to strings: YAML reads the module name ``"2"`` as a number.

    Example:
        >>> text_keys({2: 0.1, "head.*": 0.5})
        {'2': 0.1, 'head.*': 0.5}
    """
    return {str(key) if isinstance(key, int) and not isinstance(key, bool) else key: value for key, value in mapping.items()}


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # an array or tensor of several elements
        return False


def described_value(value: Any) -> str:
    """Describe a value of the wrong type in one line, for an error message.

    Example:
        >>> described_value(Interval), described_value([1, 2])
        ('the class Interval', '[1, 2]')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"a module of class {type(value).__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{' '.join(repr(value).split()):.80}"


def readable(value: Any) -> str:
    """Return the ``repr`` of an argument, or the name of a function.

    Example:
        >>> readable("weights"), readable(len)
        ("'weights'", 'len')
    """
    return getattr(value, "__name__", repr(value)) if callable(value) and inspect.isroutine(value) else repr(value)
