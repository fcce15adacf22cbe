"""Tensors a few at a time: large ones in pieces, small ones of one shape stacked, so that a call is for what fits a cache."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from lightning_reg.tensors import locals_of, sum_over_shards, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["ENTRIES", "Bunch", "bunches", "pieces", "sum_entries"]

ENTRIES, TENSORS = 1 << 20, 128
"""How many entries, of how many tensors, are worked on at a time: few enough for a cache, many enough to be worth a call."""


class Bunch(NamedTuple):
    """Some tensors of one shape, and room for as many.

    Args:
        source: The tensors to read: one as it is, or several stacked in the room.
        room: As large as the source, to write to.
        parts: Views of the room, one for each tensor.
        beside: What lies beside each tensor.
    """

    source: Tensor
    room: Tensor
    parts: tuple[Tensor, ...]
    beside: list[Tensor]


def pieces(*beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat pieces of tensors of one shape that lie beside each other, or rows where their memory is not in order.

    Small ones are yielded as they are.

    Example:
        >>> [tuple(piece.shape) for piece, in pieces(torch.zeros(2000, 1000))]
        [(1048576,), (951424,)]
        >>> [tuple(piece.shape) for piece, in pieces(torch.zeros(1000, 2000).t())]
        [(1048, 1000), (952, 1000)]
    """
    entries = beside[0].numel()
    if entries <= ENTRIES:
        return iter([beside])
    if all(tensor.is_contiguous() for tensor in beside):
        beside, rows = tuple(tensor.view(-1) for tensor in beside), ENTRIES
    else:
        rows = max(ENTRIES * len(beside[0]) // entries, 1)
    return zip(*(torch.split(tensor, rows) for tensor in beside), strict=True)


def bunches(tensors: Sequence[Tensor], beside: Sequence[Tensor] | None = None, *, precise: bool = False) -> Iterator[Bunch]:
    """Yield tensors by their shape, dtype and device, in bunches whose room is used again for the next one.

    Args:
        tensors: In any order; it is not kept.
        beside: A tensor of the same shape for each; the tensors themselves by default.
        precise: Whether the room is in float32 or better, whatever the dtype of the tensors.

    Example:
        >>> [bunch.source.tolist() for bunch in bunches([torch.ones(2), torch.ones(1), torch.zeros(2)])]
        [[[1.0, 1.0], [0.0, 0.0]], [1.0]]
    """
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for kind, one, other in zip(map(_kind_in(tensors), tensors), tensors, tensors if beside is None else beside, strict=True):
        ones, others = alike[kind]
        ones.append(one)
        others.append(other)
    for ones, others in alike.values():
        dtype = torch.promote_types(ones[0].dtype, torch.float32) if precise else ones[0].dtype
        yield from _in_pieces(ones, others, dtype) if ones[0].numel() > ENTRIES else _stacked(ones, others, dtype)


def sum_entries(tensors: Sequence[Tensor], of_entries: Callable[..., Tensor]) -> Tensor:
    """Return the sum of a function of every entry, over all shards, to the last digits.

    Args:
        tensors: One or more, sharded or not.
        of_entries: From entries to as many, which takes ``out``.

    Example:
        >>> sum_entries([torch.tensor([1.0, -2.0]), torch.tensor(3.0)], torch.abs)
        tensor(6.)
    """
    alike = defaultdict(list)
    for tensor in tensors:
        alike[(tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None].append(tensor)
    return total([sum_over_shards(_local_sum(some, of_entries), some[0]) for some in alike.values()])


def _local_sum(tensors: Sequence[Tensor], of_entries: Callable[..., Tensor]) -> Tensor:
    return total([of_entries(bunch.source, out=bunch.room).sum() for bunch in bunches(locals_of(tensors), precise=True)])


def _kind_in(tensors: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """Return what tells apart tensors that cannot be stacked: the shape alone where nothing else differs, which is quicker."""
    uniform = len(set(map(attrgetter("dtype"), tensors))) == 1 and all(map(attrgetter("is_cpu"), tensors))
    return attrgetter("shape") if uniform else attrgetter("shape", "dtype", "device")


def _in_pieces(tensors: list[Tensor], beside: list[Tensor], dtype: torch.dtype) -> Iterator[Bunch]:
    """Yield the pieces of large tensors one by one."""
    room = torch.empty(ENTRIES, dtype=dtype, device=tensors[0].device)
    for source, other in chain.from_iterable(map(pieces, tensors, beside)):
        if source.numel() > len(room):  # a long row
            room = torch.empty(source.numel(), dtype=dtype, device=source.device)
        part = room[: source.numel()].view(source.shape)
        yield Bunch(source if source.dtype == dtype else part.copy_(source), part, (part,), [other])


def _stacked(tensors: list[Tensor], beside: list[Tensor], dtype: torch.dtype) -> Iterator[Bunch]:
    """Yield small tensors, many at a time."""
    first = tensors[0]
    most = min(max(ENTRIES // max(first.numel(), 1), 1), TENSORS, len(tensors))
    room = torch.empty((most, *first.shape), dtype=dtype, device=first.device)
    parts = tuple(room.unbind())
    for begin in range(0, len(tensors), most):
        some, others = tensors[begin : begin + most], beside[begin : begin + most]
        if len(some) == 1 and first.dtype == dtype:
            yield Bunch(some[0], parts[0], parts[:1], others)
        else:
            filled = torch.stack(some, out=room[: len(some)])
            yield Bunch(filled, filled, parts[: len(some)], others)
