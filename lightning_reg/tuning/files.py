"""Callbacks as the entries of a LightningCLI file."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import lightning_reg
from lightning_reg._engine.arguments import constructor_arguments, readable
from lightning_reg._engine.command_line import path_of
from lightning_reg._engine.technique import Technique
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def config_of(callback: Callback) -> dict[str, Any]:
    """Return a callback as the mapping that ``trainer.callbacks`` of a LightningCLI file takes.

    Args:
        callback: A callback that stores each argument of its constructor as an attribute of the same name.

    Raises:
        TypeError: If an argument is not stored, or YAML cannot express it.

    Example:
        >>> config_of(lightning_reg.L2Penalty(1e-3))
        {'class_path': 'lightning_reg.L2Penalty', 'init_args': {'strength': 0.001}}
    """
    return _instance(callback)


def described_callbacks(callbacks: list[Callback]) -> list[str]:
    """Return strings that distinguish one list of callbacks from another, and are the same in every process.

    Example:
        >>> described_callbacks([lightning_reg.L2Penalty(1e-3)])
        ['L2Penalty(0.001)']
    """
    return [repr(callback) if isinstance(callback, Technique) else _readable_arguments(callback) for callback in callbacks]


def _instance(value: Any) -> dict[str, Any]:
    cls = type(value)
    exported = getattr(lightning_reg, cls.__name__, None) is cls
    path = f"lightning_reg.{cls.__name__}" if exported else f"{cls.__module__}.{cls.__qualname__}"
    arguments = {}
    for argument in constructor_arguments(cls):
        if not hasattr(value, argument.name):
            raise TypeError(f"{cls.__name__} does not store its argument {argument.name!r}, so it cannot be written as YAML")
        given = getattr(value, argument.name)
        if not _is_default(value, argument, given):
            arguments[argument.name] = _plain(given, f"{cls.__name__}: {argument.name}")
    return {"class_path": path, **({"init_args": arguments} if arguments else {})}


def _is_default(value: Any, argument: inspect.Parameter, given: Any) -> bool:
    if argument.name == "name" and isinstance(value, Technique):
        return bool(given == value._default_name())
    return argument.default is not inspect.Parameter.empty and bool(given == argument.default)


def _plain(value: Any, what: str) -> Any:
    """Return a value as numbers, strings, lists, and mappings."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, what) for item in value]
    if isinstance(value, Schedule):
        return _instance(value)
    if inspect.isroutine(value):
        try:
            return path_of(value)
        except ValueError as error:
            raise TypeError(f"{what}: {error}") from error
    raise TypeError(f"{what}={readable(value)} cannot be written as YAML")


def _readable_arguments(callback: Callback) -> str:
    names = [argument.name for argument in constructor_arguments(type(callback))]
    stored = {name: getattr(callback, name) for name in names if hasattr(callback, name)}
    simple = {name: value for name, value in stored.items() if isinstance(value, (bool, int, float, str, type(None)))}
    return f"{type(callback).__name__}({', '.join(f'{name}={value!r}' for name, value in simple.items())})"
