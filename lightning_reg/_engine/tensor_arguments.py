"""Tensor arguments of the public functions: one tensor or any iterable becomes a list. Anything else raises an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_reg._engine.arguments import described_value
from lightning_reg._tensors.units import Units

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensors: TypeAlias = Tensor | Iterable[Tensor]
"""One tensor, or an iterable of tensors such as a list or ``model.parameters()``."""

Entry = TypeVar("Entry")

_PLAIN = {Tensor, nn.Parameter}


def tensor_list(what: str, tensors: Any, count: int | None = None) -> list[Tensor]:
    """Return one tensor, or an iterable of tensors, as a list.

    Args:
        what: The name of the function and its argument, for the error message.
        tensors: The argument.
        count: The required number of tensors, if another argument sets it.

    Raises:
        TypeError: If it is neither a tensor nor an iterable of tensors.
        ValueError: If there are more or fewer than ``count``.

    Example:
        >>> import torch
        >>> tensor_list("f: params", torch.zeros(2)), tensor_list("f: params", (p for p in [torch.zeros(1)]))
        ([tensor([0., 0.])], [tensor([0.])])
        >>> tensor_list("f: params", nn.Linear(2, 1))
        Traceback (most recent call last):
        TypeError: f: params must be a tensor or an iterable of tensors, got a module of class Linear: pass its .parameters()
    """
    if isinstance(tensors, Tensor):
        found = [tensors]
    elif isinstance(tensors, Iterable):
        found = list(tensors)
    else:
        raise TypeError(_wrong_type_message(what, tensors))
    if not set(map(type, found)) <= _PLAIN:  # one set is cheaper than an isinstance check for each tensor
        for index, tensor in enumerate(found):
            if not isinstance(tensor, Tensor):
                raise TypeError(_wrong_type_message(what, tensors, index, tensor))
    _check_count(what, found, count)
    return found


def units_list(what: str, units: Any, params: Sequence[Tensor]) -> list[Units]:
    """Return the output units of each tensor as a list, from a list, a single entry for a single tensor, or the default.

    Args:
        what: The name of the function, for the error message.
        units: The argument.
        params: The tensors.

    Raises:
        TypeError: If it is neither ``Units`` nor an iterable of them.
        ValueError: If there are more or fewer than tensors.

    Example:
        >>> import torch
        >>> units_list("f", Units(1), [torch.zeros(2, 3)]), units_list("f", None, [torch.zeros(2, 3)])
        ([Units(dim=1, groups=1)], [Units(dim=0, groups=1)])
    """
    if units is None:
        return [Units()] * len(params)
    listed: list[Any] = [units] if isinstance(units, Units) or not isinstance(units, Iterable) else list(units)
    if not all(isinstance(entry, Units) for entry in listed):
        expected = "what units_of(module) returns, or a list of these with one for each tensor"
        raise TypeError(f"{what}: units must be {expected}, got {described_value(units)}")
    _check_count(f"{what}: units", listed, len(params))
    return listed


def optional_list(what: str, entries: Any, kind: type[Entry], count: int) -> list[Entry | None]:
    """Return one entry or ``None`` for each tensor as a list, from a list or, for a single tensor, one entry.

    Raises:
        TypeError: If an entry is neither ``None`` nor of the right type.
        ValueError: If there are more or fewer than ``count``.

    Example:
        >>> optional_list("f: rows", None, int, 2), optional_list("f: rows", 3, int, 1)
        ([None, None], [3])
    """
    if entries is None:
        return [None] * count
    listed = [entries] if isinstance(entries, kind) or not isinstance(entries, Iterable) else list(entries)
    for entry in listed:
        if not (entry is None or isinstance(entry, kind)):
            raise TypeError(f"{what}: each entry must be None or of type {kind.__name__}, got {described_value(entry)}")
    _check_count(what, listed, count)
    return listed


def check_tensor(what: str, tensor: Any) -> None:
    """Raise an error if a value is not a tensor.

    Raises:
        TypeError: If it is not a tensor.

    Example:
        >>> check_tensor("dropout: x", [1.0, 2.0])
        Traceback (most recent call last):
        TypeError: dropout: x must be a tensor, got [1.0, 2.0]
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor, got {described_value(tensor)}")


def _check_count(what: str, found: Sequence[Any], count: int | None) -> None:
    if count is not None and len(found) != count:
        raise ValueError(f"{what} must have one entry for each of the {count} tensors in params, got {len(found)}")


def _wrong_type_message(what: str, given: Any, index: int | None = None, entry: Any = None) -> str:
    got = described_value(given) if index is None else f"{described_value(entry)} at position {index}"
    return f"{what} must be a tensor or an iterable of tensors, got {got}{_fix(given, entry)}"


def _fix(given: Any, entry: Any) -> str:
    """Return what to pass instead, if that is evident from the argument."""
    if any(isinstance(value, nn.Module) for value in (given, entry)):
        return ": pass its .parameters()"
    if isinstance(given, Optimizer) or (isinstance(entry, dict) and "params" in entry):
        return ": pass [p for group in optimizer.param_groups for p in group['params']]"
    if isinstance(given, dict):
        return ": pass its .values()"
    if isinstance(entry, tuple):
        return ": pass .parameters() instead of .named_parameters()"
    return ""
