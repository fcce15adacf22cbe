"""Checks of the state in a checkpoint, so that the state of another class or version raises an error with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_reg._engine.arguments import described_value
from lightning_reg._engine.plan import parse_marker

STATE_LAYOUT = 2
"""The layout of a technique's state in a checkpoint. Raise it whenever an older state could be misread."""

_PARTS = ("layout", "metrics", "state", "clock")


def check_keys(what: str, found: Any, needed: Collection[str], allowed: Collection[str] | None = ()) -> None:
    """Raise an error unless a value is a dictionary with certain keys.

    Args:
        what: The name of the value, for the error message.
        found: The value to check.
        needed: The keys that it must have.
        allowed: Further keys that it may have, or ``None`` for any.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_keys("metrics", {"sums": {}}, ("sums", "steps"))
        Traceback (most recent call last):
        ValueError: metrics has the keys ['sums'], expected ['steps', 'sums']
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{what} is {described_value(found)}, expected a dictionary")
    extra = set() if allowed is None else {*found} - {*needed, *allowed}
    if extra or not {*needed} <= {*found}:
        raise ValueError(f"{what} has the keys {sorted(map(str, found))}, expected {sorted(needed)}")


def check_state(found: Any, *, has_own: bool) -> None:
    """Raise an error unless a value is the state of a technique, as far as can be told without the technique.

    Args:
        found: The value in the checkpoint.
        has_own: Whether the class of the technique saves additional state of its own.

    Raises:
        ValueError: If it has another layout, or a part of it is missing or malformed.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"it is {described_value(found)}, expected a dictionary")
    if found.get("layout") != STATE_LAYOUT:
        has = f"layout {described_value(found['layout'])}" if "layout" in found else f"the keys {sorted(map(str, found))}"
        raise ValueError(f"it has {has}, expected layout {STATE_LAYOUT}")
    check_keys("it", found, _PARTS[:3], None if has_own else _PARTS)
    _check_metrics(found["metrics"])
    if "clock" in found:
        _check_clock(found["clock"])


def check_entries(found: Any, entries: Collection[str]) -> None:
    """Raise an error unless the state itself is empty or a dictionary of dictionaries with these names.

    Raises:
        ValueError: If it is not.
    """
    check_keys("state", found, entries if found else ())
    for entry, values in found.items():
        check_keys(f"state[{entry!r}]", values, (), None)


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, and not a Boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_metrics(found: Any) -> None:
    check_keys("metrics", found, ("sums", "steps") if found else ())
    for part, kind in (("sums", Tensor), ("steps", int)) if found else ():
        check_keys(f"metrics[{part!r}]", found[part], (), None)
        for key, value in found[part].items():
            if not isinstance(value, kind) or (isinstance(value, Tensor) and value.ndim):
                expected = "a scalar tensor" if kind is Tensor else "an integer"
                raise ValueError(f"metrics[{part!r}][{key!r}] is {described_value(value)}, expected {expected}")
    if found and not {*found["steps"]} <= {*found["sums"]}:
        raise ValueError(f"metrics has counts for {sorted(found['steps'])} and sums for {sorted(found['sums'])}")


def _check_clock(found: Any) -> None:
    check_keys("clock", found, ("length", "is_exact", "line", "ramps"))
    ramps = found["ramps"]
    parts = {
        "length": _are_numbers(found["length"], 3),
        "is_exact": isinstance(found["is_exact"], bool),
        "line": _are_numbers(found["line"], 3),
        "ramps": isinstance(ramps, list) and all(map(_is_ramp, ramps)),
    }
    for part, is_right in parts.items():
        if not is_right:
            raise ValueError(f"clock[{part!r}] is {described_value(found[part])}, which does not belong in a clock")


def _is_ramp(found: Any) -> bool:
    return isinstance(found, list) and all(map(_is_marker, found[:2])) and _are_numbers(found[2:], 3)


def _is_marker(found: Any) -> bool:
    try:
        return is_number(found) or bool(parse_marker(found))
    except (AttributeError, ValueError):
        return False


def _are_numbers(found: Any, count: int) -> bool:
    return isinstance(found, list) and len(found) == count and all(map(is_number, found))
