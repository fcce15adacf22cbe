"""The attributes of modules and datasets: finds out whether a step collects something in them, and restores them."""

from __future__ import annotations

import itertools
import math
from collections import deque
from contextlib import contextmanager
from numbers import Number
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_DEPTH = 3  # how deep to look into containers and objects
_MANY = 1000  # the most entries of a container that is searched, and the most parts of an attribute
_LARGE = 1_000_000  # the entries of an array that is too large to be copied
_CONTAINERS = (list, dict, set, deque)
_DATA = (Number, str, bytes, type(None), torch.Tensor, np.ndarray, torch.device, torch.dtype, tuple, *_CONTAINERS)

_OF_LIGHTNING = frozenset(vars(LightningModule()))
"""Attributes that each module has."""


class Attributes:
    """The attributes of a module and of the modules in it.

    Args:
        module: The module. Containers, arrays, and plain objects inside its attributes count too.
        metrics: Metrics to leave out, since something else restores them.
    """

    def __init__(self, module: nn.Module, metrics: Iterable[nn.Module] = ()) -> None:
        self._module = module
        inside_metrics = {id(part) for metric in metrics for part in metric.modules()}
        modules = [part for part in module.modules() if id(part) not in inside_metrics]
        self._before = [(part, dict(vars(part)), _contents(part)) for part in modules]
        self._parts = {name: [_part(found) for found in _parts_of(value)] for name, value in _own(module)}

    def kept(self) -> list[str]:
        """Return the attributes of the module itself in which something has been collected since."""
        _, before, contents = next(entry for entry in self._before if entry[0] is self._module)
        return [
            name
            for name, value in _own(self._module)
            if _gathers(value, before.get(name), contents.get(name)) or any(map(_has_collected, self._parts.get(name, ())))
        ]

    def restore(self) -> None:
        """Restore all attributes, and the contents of containers and plain objects."""
        for part in itertools.chain.from_iterable(self._parts.values()):
            _restore(part)
        for module, attributes, contents in self._before:
            for name, content in contents.items():
                _refill(attributes[name], content)
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


@contextmanager
def state_restored(loader: Any) -> Iterator[None]:
    """Restore what the dataset, the samplers, and the collate function of a loader hold, such as counters and caches.

    This covers their attributes, and those of all objects in them that can be called, indexed, or iterated over. In these, it
    covers containers, plain objects, and small arrays and tensors, even if they have been changed in place. It does not cover
    iterators and ``__slots__``.
    """
    roots = [getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler", "collate_fn")]
    holders = [obj for obj in reachable(roots, _held) if _has_state(obj)]
    inside = [part for holder in holders for value in vars(holder).values() for part in _parts_of(value)]
    parts = {id(obj): obj for obj in (*holders, *inside)}.values()  # each once
    before = [copied for copied in map(_copied, parts) if copied]
    try:
        yield
    finally:
        for part in before:
            _restore(part)


def reachable(root: Any, inside: Callable[[Any], Iterable[Any]], depth: float = math.inf) -> Iterator[Any]:
    """Yield an object and all that is inside it, level by level, and nothing again that was on an earlier level.

    Args:
        root: The object.
        inside: Returns what is directly inside an object.
        depth: How many levels to go down.

    Example:
        >>> list(reachable([1, [2]], lambda obj: obj if isinstance(obj, list) else ()))
        [[1, [2]], 1, [2], 2]
    """
    level, seen = [root], {id(root)}
    while level and depth >= 0:
        inner: list[Any] = []
        for obj in level:
            yield obj
            inner += [found for found in inside(obj) if id(found) not in seen]
            seen.update(map(id, inner))
        level, depth = inner, depth - 1


def entries(container: Any) -> Iterable[Any]:
    """Return the entries of a container, or none if there are too many to search.

    Example:
        >>> list(entries({"first": 1, "second": 2})), list(entries([0] * 1001))
        ([1, 2], [])
    """
    if len(container) > _MANY:
        return ()
    return container.values() if isinstance(container, dict) else container


def _has_state(obj: Any) -> bool:
    if isinstance(obj, (nn.Module, type, MethodType, *_DATA)) or not isinstance(getattr(obj, "__dict__", None), dict):
        return False
    return callable(obj) or hasattr(type(obj), "__getitem__") or hasattr(type(obj), "__iter__")


def _held(obj: Any) -> Iterable[Any]:
    """Return what is directly in a container or in an object with a state."""
    if isinstance(obj, (list, tuple, dict)):
        return entries(obj)
    return vars(obj).values() if _has_state(obj) else ()


def _copied(obj: Any) -> _Part | None:
    """Return an object with a copy of its content, unless it is a large array or tensor."""
    if isinstance(obj, torch.Tensor):
        return _Part(obj, obj.clone()) if obj.numel() <= _MANY else None
    return None if isinstance(obj, np.ndarray) and obj.size > _MANY else _part(obj)


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in vars(module).items() if name not in _OF_LIGHTNING)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return copies of the containers among a module's attributes."""
    return {name: value.copy() for name, value in _own(module) if isinstance(value, _CONTAINERS)}


def _gathers(value: Any, old: Any, content: Any = None) -> bool:
    """Return whether the value that replaces an old one has more in it, or is another number."""
    if isinstance(value, _CONTAINERS) and content is not None:
        return len(value) > len(content)
    if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
        return value.numel() > old.numel()
    are_numbers = isinstance(value, Number) and isinstance(old, Number)
    return are_numbers and not isinstance(value, bool) and bool(value != old)


# Inside an attribute ------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A container, an array, a tensor, or a plain object in an attribute, with a copy of what it held.

    Args:
        itself: The object.
        content: Its content, or the version of a tensor that must not change.
    """

    itself: Any
    content: Any


def _parts_of(value: Any) -> Iterator[Any]:
    """Return the containers, arrays, tensors, and plain objects in the value of an attribute, which is one of them itself."""
    return itertools.islice(filter(_is_part, reachable(value, _inside, _DEPTH)), _MANY)


def _is_part(obj: Any) -> bool:
    if isinstance(obj, np.ndarray):
        return obj.size <= _LARGE and not obj.dtype.hasobject
    if isinstance(obj, torch.Tensor):
        return not obj.is_inference()
    return isinstance(obj, _CONTAINERS) or _is_plain(obj)


def _is_plain(obj: Any) -> bool:
    """Return whether an object has attributes, and all of them are data, as in an average meter."""
    if isinstance(obj, (nn.Module, type, *_DATA)) or callable(obj):
        return False
    attributes = getattr(obj, "__dict__", None)
    return isinstance(attributes, dict) and all(isinstance(value, _DATA) for value in attributes.values())


def _inside(obj: Any) -> list[Any]:
    if isinstance(obj, (tuple, *_CONTAINERS)):
        return list(entries(obj))
    return list(vars(obj).values()) if _is_plain(obj) else []


def _part(itself: Any) -> _Part:
    if isinstance(itself, torch.Tensor):
        return _Part(itself, itself._version)
    return _Part(itself, itself.copy() if isinstance(itself, (np.ndarray, *_CONTAINERS)) else dict(vars(itself)))


def _has_collected(part: _Part) -> bool:
    itself, content = part
    if isinstance(itself, torch.Tensor):
        return bool(itself._version != content)
    if isinstance(itself, np.ndarray):
        return bool(itself.shape != content.shape) or itself.tobytes() != content.tobytes()
    if isinstance(itself, _CONTAINERS):
        has_other = isinstance(itself, dict) and any(_gathers(value, content.get(key)) for key, value in itself.items())
        return len(itself) > len(content) or has_other
    return any(_gathers(value, content.get(name)) for name, value in vars(itself).items())


def _restore(part: _Part) -> None:
    itself, content = part
    if isinstance(itself, torch.Tensor):
        if isinstance(content, torch.Tensor) and not torch.equal(itself, content):  # else a change has been an error
            itself.detach().copy_(content)
    elif isinstance(itself, np.ndarray):
        if itself.flags.writeable and itself.tobytes() != content.tobytes():
            itself[...] = content
    else:
        _refill(itself if isinstance(itself, _CONTAINERS) else vars(itself), content)


def _refill(container: Any, content: Any) -> None:
    """Give a container its earlier content again."""
    if _same(container, content):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _same(container: Any, content: Any) -> bool:
    """Return whether a container holds exactly the same objects as its copy."""
    if isinstance(container, dict):
        return _same(list(container.items()), list(content.items()))
    return len(container) == len(content) and all(map(_is, container, content))


def _is(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, tuple) and isinstance(other, tuple) and all(map(_is, one, other)))
