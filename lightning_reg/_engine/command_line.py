"""Values that the command line writes as strings: infinite numbers, and functions by their import path."""

from __future__ import annotations

import math
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from lightning_reg._engine.arguments import described_value, readable

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class Infinity(float):
    """The type of ``inf`` in annotations: jsonargparse takes only YAML's ``.inf`` for a float."""


class SelectionFunction(Protocol):
    """The type of a function that selects parameters: jsonargparse writes it as ``"package.module:function"``."""

    def __call__(self, name: str, parameter: Parameter, module: Module, /) -> bool:
        """Return whether a parameter is selected."""
        ...


class ScheduleFunction(Protocol):
    """The type of a schedule function in a mapping: jsonargparse would mistake the mapping of a class for one of schedules."""

    def __call__(self, progress: float, /) -> float:
        """Return the value at a progress in [0, 1]."""
        ...


def is_function_path(text: str) -> bool:
    """Return whether a string has the form of a function's import path.

    Example:
        >>> is_function_path("package.module:function"), is_function_path("package.module.function")
        (True, False)
    """
    return _FUNCTION.fullmatch(text) is not None


def function_at(path: str) -> Any:
    """Import the function at a path such as ``"package.module:function"``.

    Raises:
        ValueError: If there is none. The message says what is missing.

    Example:
        >>> function_at("math:sqrt")(9)
        3.0
    """
    module_name, _, qualified_name = path.partition(":")
    try:
        found: Any = import_module(module_name)
        for name in qualified_name.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{path!r} must be a function, got {described_value(found)}")
    return found


def path_of(function: Any) -> str:
    """Return the import path of a function, or of another callable object that is a global variable of its module.

    Raises:
        ValueError: If it has none, like a ``lambda`` or a nested function.

    Example:
        >>> path_of(math.sqrt)
        'math:sqrt'
    """
    module_name = str(getattr(function, "__module__", None))
    variables = vars(sys.modules.get(module_name, math)).items() if not hasattr(function, "__qualname__") else ()
    name = next((name for name, value in variables if value is function), getattr(function, "__qualname__", None))
    path = f"{module_name}:{name}"
    if not is_function_path(path) or function_at(path) is not function:
        raise ValueError(f"{readable(function)} has no import path: define it with def at the top level of a module")
    return path


def path_suggestion(text: str) -> str:
    """Return the import path that a dotted string may stand for, or an empty string if no package matches.

    Example:
        >>> path_suggestion("math.sqrt"), path_suggestion("encoder.weight")
        ('math:sqrt', '')
    """
    module_name, _, name = text.rpartition(".")
    path = f"{module_name}:{name}"
    package = module_name.partition(".")[0]
    if not is_function_path(path) or not (package in sys.modules or find_spec(package)):
        return ""
    return path


def _infinity(text: Any) -> float:
    """Return the infinite number that a string names.

    Raises:
        ValueError: If it names none.
    """
    number = float(text) if isinstance(text, str) else 0.0
    if not math.isinf(number):
        raise ValueError(f"expected inf, got {text!r}")
    return number


def _is_infinity(value: Any, _: type) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _is_function(value: Any, _: type) -> bool:
    return callable(value) and not isinstance(value, type)


def _schedule_function(text: Any) -> Any:
    """Return the function that a string such as ``"math.sqrt"`` names.

    Raises:
        ValueError: If it names none.
    """
    if isinstance(text, str):
        module_name, _, name = text.rpartition(".")
        function = function_at(f"{module_name}:{name}") if module_name else None
        if callable(function) and not isinstance(function, type):
            return function
    raise ValueError(f"expected the import path of a function progress -> float, got {described_value(text)}")


def _path_with_dots(function: Any) -> str:
    return path_of(function).replace(":", ".")


def _no_function(value: Any) -> Any:
    """Reject anything that is not a function: a string stays a string until the selection is made.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"expected a function (name, parameter, module) -> bool, got {described_value(value)}")


def _register() -> None:
    """Tell jsonargparse, which LightningCLI uses, how to read and write these types."""
    from jsonargparse.typing import register_type

    register_type(Infinity, _infinity, _infinity, type_check=_is_infinity)
    register_type(ScheduleFunction, _path_with_dots, _schedule_function, type_check=_is_function)
    register_type(SelectionFunction, path_of, _no_function, type_check=_is_function)


if find_spec("jsonargparse"):
    _register()
