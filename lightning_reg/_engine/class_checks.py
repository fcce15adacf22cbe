"""Checks of technique classes: common mistakes raise an error that names the mistake and the fix."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from lightning_reg._engine.arguments import Interval, constructor_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RESERVED = frozenset({"current", "has_logger", "logging", "running", "saved_clock", "state"})
"""Attributes of the base class. No argument may have these names."""


def check_class(cls: type) -> None:
    """Check a technique class when it is defined.

    Raises:
        TypeError: If ``valid_ranges`` contains anything other than intervals, or leaves out a parent's value that the
            constructor still takes.
    """
    ranges: Mapping[str, Interval] = getattr(cls, "valid_ranges", {})
    for key, valid in ranges.items():
        if not isinstance(valid, Interval):
            raise TypeError(
                f"{cls.__name__}.valid_ranges[{key!r}] must be an Interval, such as POSITIVE or Interval(0.0, 2.0), got "
                f"{valid!r}"
            )
    arguments = set(_accepted_arguments(cls))
    inherited = {key: parent for parent in reversed(cls.__mro__[1:]) for key in vars(parent).get("valid_ranges", ())}
    for key, parent in inherited.items():
        if key in arguments and key not in ranges:
            raise TypeError(
                f"{cls.__name__}.valid_ranges leaves out {key!r} of {parent.__name__}, which its constructor takes: write "
                f"valid_ranges = {{**{parent.__name__}.valid_ranges, …}}"
            )


def check_arguments(technique: Any) -> None:
    """Check that a technique has stored its constructor arguments, which ``repr``, schedules, and checkpoints read.

    Raises:
        TypeError: If an argument is not stored under its own name or has the name of something else in the base class, if
            ``valid_ranges`` names something that is not stored, or if the class has no ``phase``.
    """
    cls = type(technique)
    names = [argument.name for argument in constructor_arguments(cls)]
    for name in names:
        if name in RESERVED or (_is_taken(cls, name) and name not in vars(technique)):
            raise TypeError(
                f"{cls.__name__}: the argument {name!r} has the same name as an attribute of the base class: rename it"
            )
    missing = [name for name in names if not _is_stored(technique, name)]
    if missing:
        stored = "; ".join(f"self.{name} = {name}" for name in missing)
        raise TypeError(
            f"{cls.__name__}.__init__ must store each argument under its own name before it calls super().__init__: add "
            f"{stored}"
        )
    unknown = [key for key in cls.valid_ranges if not _is_stored(technique, key)]
    if unknown:
        raise TypeError(f"{cls.__name__}.valid_ranges has {', '.join(unknown)}, which __init__ does not store: check the name")
    if not hasattr(cls, "phase"):
        raise TypeError(f"{cls.__name__} must say when it acts in the step: set phase = Phase.…")


def _is_taken(cls: type, name: str) -> bool:
    """Return whether the class has a method, or a parent a property, of this name."""
    owner = next((parent for parent in cls.__mro__ if name in vars(parent)), cls)
    value = getattr(cls, name, None)
    return callable(value) or (owner is not cls and isinstance(value, property))


def _is_stored(technique: Any, name: str) -> bool:
    """Return whether an attribute is set on the instance, or computed by a property."""
    return name in vars(technique) or isinstance(getattr(type(technique), name, None), property)


def _accepted_arguments(cls: type) -> Iterator[str]:
    """Yield the names of a constructor's arguments, including those that it passes on to parents."""
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            parameters = list(inspect.signature(vars(parent)["__init__"]).parameters.values())[1:]
            yield from (parameter.name for parameter in parameters)
            if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                return
