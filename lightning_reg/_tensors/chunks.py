"""Work on many tensors in chunks that fit a processor cache.

On the CPU, large tensors are split, and small tensors of one shape are stacked, so that each call has about ``CHUNK_ENTRIES``
entries: few enough that a second operation finds them in the cache, and many enough that the overhead of a call does not
matter. On other devices, a call costs more, and one call takes a list of tensors, so chunks have ``DEVICE_CHUNK_ENTRIES``.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_reg._tensors.reductions import accumulation_dtype, sum_scalars
from lightning_reg._tensors.shards import local_tensors, sharding, sum_over_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

CHUNK_ENTRIES, CHUNK_TENSORS = 1 << 20, 128
"""The most entries, and the most stacked tensors, in a chunk."""
DEVICE_CHUNK_ENTRIES = 1 << 24
"""The most entries in a chunk on devices other than the CPU."""


class Chunk(NamedTuple):
    """A part of one large tensor, or several small tensors of one shape, with a buffer of the same size.

    Args:
        source: What to read: a part of a tensor, or tensors stacked in the buffer.
        buffer: Where to write results. The next chunk reuses it.
        views: Views of the buffer, one for each tensor.
        others: The matching part of the second list of tensors, one for each view.
    """

    source: Tensor
    buffer: Tensor
    views: tuple[Tensor, ...]
    others: list[Tensor]


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape into matching chunks: flat ones, or rows if the memory is not contiguous.

    A small tensor is a single chunk.

    Example:
        >>> [tuple(chunk.shape) for chunk, in chunks(torch.zeros(2000, 1000))]
        [(1048576,), (951424,)]
        >>> [tuple(chunk.shape) for chunk, in chunks(torch.zeros(1000, 2000).t())]
        [(1048, 1000), (952, 1000)]
    """
    entries, most = tensors[0].numel(), chunk_entries(tensors[0].device)
    if entries <= most:
        return iter([tensors])
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors, rows = tuple(tensor.view(-1) for tensor in tensors), most
    else:
        rows = max(most * len(tensors[0]) // entries, 1)
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def batched_chunks(
    tensors: Sequence[Tensor], others: Sequence[Tensor] | None = None, *, accumulate: bool = False
) -> Iterator[Chunk]:
    """Group tensors by shape, dtype, and device, and yield each group in chunks.

    Args:
        tensors: The tensors. The chunks may come in another order.
        others: A second tensor of the same shape for each; the tensors themselves by default.
        accumulate: Whether the buffer has the dtype to accumulate in, float32 or better, rather than that of the tensors.

    Example:
        >>> [chunk.source.tolist() for chunk in batched_chunks([torch.ones(2), torch.ones(1), torch.zeros(2)])]
        [[[1.0, 1.0], [0.0, 0.0]], [1.0]]
    """
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for key, tensor, other in zip(
        map(_grouping(tensors), tensors), tensors, tensors if others is None else others, strict=True
    ):
        grouped_tensors, grouped_others = groups[key]
        grouped_tensors.append(tensor)
        grouped_others.append(other)
    for grouped_tensors, grouped_others in groups.values():
        first = grouped_tensors[0]
        dtype = accumulation_dtype(first.dtype) if accumulate else first.dtype
        split = _split if first.numel() > chunk_entries(first.device) else _stacked
        yield from split(grouped_tensors, grouped_others, dtype)


def chunk_entries(device: torch.device) -> int:
    """Return the most entries in a chunk on a device.

    Example:
        >>> chunk_entries(torch.device("cpu")), chunk_entries(torch.device("cuda"))
        (1048576, 16777216)
    """
    return CHUNK_ENTRIES if device.type == "cpu" else DEVICE_CHUNK_ENTRIES


def list_chunks(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Divide two lists of tensors of equal shapes into matching shorter lists, and split large contiguous tensors.

    Example:
        >>> tensors = [torch.zeros(2), torch.zeros(3), torch.zeros(2000, 1000)]
        >>> [[tuple(part.shape) for part in parts] for parts, _ in list_chunks(tensors, tensors)]
        [[(2,), (3,)], [(1048576,)], [(951424,)]]
    """
    first: list[Tensor] = []
    second: list[Tensor] = []
    most, room = chunk_entries(tensors[0].device) if tensors else 0, 0
    for tensor, other in zip(tensors, others, strict=True):
        for part, other_part in ((tensor, other),) if tensor.numel() <= most else chunks(tensor, other):
            room -= part.numel()
            if room < 0 and first:
                yield first, second
                first, second = [], []
            if not first:
                room = most - part.numel()
            first.append(part)
            second.append(other_part)
    if first:
        yield first, second


def sum_entries(tensors: Sequence[Tensor], function: Callable[..., Tensor]) -> Tensor:
    """Return the sum of an elementwise function over all entries and shards, accurate to the last digits.

    Args:
        tensors: One or more, sharded or not.
        function: An elementwise function that takes ``out``.

    Example:
        >>> sum_entries([torch.tensor([1.0, -2.0]), torch.tensor(3.0)], torch.abs)
        tensor(6.)
    """
    by_sharding = defaultdict(list)
    for tensor in tensors:
        by_sharding[sharding(tensor)].append(tensor)
    return sum_scalars([sum_over_shards(_local_sum(group, function), group[0]) for group in by_sharding.values()])


def _local_sum(tensors: Sequence[Tensor], function: Callable[..., Tensor]) -> Tensor:
    batches = batched_chunks(local_tensors(tensors), accumulate=True)
    return sum_scalars([function(chunk.source, out=chunk.buffer).sum() for chunk in batches])


def _grouping(tensors: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """Return the key for stacking tensors. If nothing else differs, it is the shape, which is faster to compare."""
    uniform = len(set(map(attrgetter("dtype"), tensors))) == 1 and all(map(attrgetter("is_cpu"), tensors))
    return attrgetter("shape") if uniform else attrgetter("shape", "dtype", "device")


def _split(tensors: list[Tensor], others: list[Tensor], dtype: torch.dtype) -> Iterator[Chunk]:
    """Yield the chunks of large tensors one by one."""
    buffer = torch.empty(chunk_entries(tensors[0].device), dtype=dtype, device=tensors[0].device)
    for source, other in chain.from_iterable(map(chunks, tensors, others)):
        if source.numel() > len(buffer):  # a long row of a tensor that is not contiguous
            buffer = torch.empty(source.numel(), dtype=dtype, device=source.device)
        view = buffer[: source.numel()].view(source.shape)
        yield Chunk(source if source.dtype == dtype else view.copy_(source), view, (view,), [other])


def _stacked(tensors: list[Tensor], others: list[Tensor], dtype: torch.dtype) -> Iterator[Chunk]:
    """Yield small tensors, many at a time."""
    first = tensors[0]
    count = min(max(chunk_entries(first.device) // max(first.numel(), 1), 1), CHUNK_TENSORS, len(tensors))
    buffer = torch.empty((count, *first.shape), dtype=dtype, device=first.device)
    views = tuple(buffer.unbind())
    for begin in range(0, len(tensors), count):
        batch, batch_others = tensors[begin : begin + count], others[begin : begin + count]
        if len(batch) == 1 and first.dtype == dtype:
            yield Chunk(batch[0], views[0], views[:1], batch_others)
        else:
            filled = torch.stack(batch, out=buffer[: len(batch)])
            yield Chunk(filled, filled, views[: len(batch)], batch_others)
