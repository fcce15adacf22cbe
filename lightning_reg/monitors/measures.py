"""Sums over many tensors in few passes: Σ|x|² of each, the size of an update, and the number of zeros.

Small tensors of one shape are stacked. On the CPU, each other tensor is read in chunks that fit a processor cache; on other
devices, one call takes a list of them. Each function returns a vector with one value for each tensor, on the device of the
tensors, so that nothing waits for a device.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from itertools import chain
from operator import attrgetter, eq, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_reg._tensors.chunks import chunk_entries, chunks
from lightning_reg._tensors.reductions import accumulation_dtype, is_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    Squares = Callable[[Any], Tensor]
    """Returns Σ|x|² of each tensor of a part of a batch: of each row of stacked tensors, or of a chunk of a tensor."""

SMALL = 1 << 16
"""The most entries of a tensor that is stacked with others of its shape."""
_MANY = 16
"""The least number of tensors of one shape that are stacked on other devices than the CPU. For fewer, a list is faster."""
_EXACT = 1 << 24
"""The most entries that float32 can count one by one."""
_ROW = 1024
"""The number of entries that are summed at a time. It makes sums as exact as float32 allows, and is as fast as one sum."""


class PartSums(Protocol):
    """Computes sums of tensors and gradients, part by part."""

    @property
    def constants(self) -> Sequence[Sequence[Tensor]]:
        """Lists of other tensors, each with one for each tensor and of its shape."""

    def of_part(
        self, batch: int, squares: Squares, known: Sequence[Tensor], weights: Tensor, gradients: Tensor, *constants: Tensor
    ) -> Sequence[Tensor]:
        """Return the sums for a part of a batch.

        Args:
            batch: The index of the batch.
            squares: Returns Σ|x|² of each tensor of the part.
            known: Σ|θ|² and Σ|g|².
            weights: The weights θ: one row for each tensor, or a chunk of one tensor.
            gradients: The gradients g.
            constants: The matching part of each list of constants.
        """


class Layout:
    """Divides tensors into batches, each of which is measured in a few calls.

    Args:
        tensors: One or more dense tensors.
        kinds: Something hashable for each tensor. Those of different kinds are in different batches.
    """

    def __init__(self, tensors: Sequence[Tensor], kinds: Sequence[Hashable] | None = None) -> None:
        self.batches = _batches(tensors, kinds or [None] * len(tensors))
        positions = [index for batch in self.batches for index in batch]
        self._order = torch.tensor(positions, device=tensors[0].device).argsort()
        self._pick = [_picker(batch) for batch in self.batches]
        self._device = tensors[0].device
        self._shapes = [tensor.shape for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._buffers: dict[Hashable, Tensor] = {}

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors have the expected shapes and dtypes."""
        shapes, dtypes = map(attrgetter("shape"), tensors), map(attrgetter("dtype"), tensors)
        return all(map(eq, self._shapes, shapes)) and all(map(eq, self._dtypes, dtypes))  # lists would trigger the collector

    def split(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the tensors of each batch."""
        return [pick(tensors) for pick in self._pick]

    def stack(self, batch: tuple[Tensor, ...], purpose: Hashable = 0) -> Tensor:
        """Stack tensors in a buffer that the next call for the same purpose overwrites."""
        return torch.stack(batch, out=self.buffer(batch[0], (len(batch), *batch[0].shape), purpose))

    def buffer(self, like: Tensor, shape: tuple[int, ...], purpose: Hashable) -> Tensor:
        """Return memory that the next call for the same purpose returns again, because new memory would cost more than its use.

        Args:
            like: A tensor with the dtype and the device.
            shape: The shape of the result.
            purpose: What the memory is for.
        """
        entries = math.prod(shape)
        kept = self._buffers.get(key := (purpose, like.dtype, like.device))
        if kept is None or len(kept) < entries:
            kept = self._buffers[key] = torch.empty(entries, dtype=like.dtype, device=like.device)
        return kept[:entries].view(shape)

    def join(self, found: Sequence[Tensor]) -> Tensor:
        """Return the values of all batches in the order of the tensors, which is that of the last dimension."""
        dtype = max((values.dtype for values in found), key=lambda dtype: dtype.itemsize)
        return torch.cat([values.to(self._device, dtype) for values in found], -1)[..., self._order]

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Σ|x|² of each tensor.

        Example:
            >>> pair = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
            >>> Layout(pair).squares(pair)
            tensor([25.,  4.])
        """
        batches = self.split(tensors)
        return self.join([_row_squares(self.stack(batch)) if _is_stack(batch) else _squares(batch) for batch in batches])


class Copies:
    """Copies of tensors, to compare with later values. They reuse memory, because new memory would cost more than the rest.

    Args:
        tensors: One or more dense tensors of the shapes, dtypes, and devices to copy.
        kinds: Something hashable for each tensor. Those of different kinds are in different batches.
    """

    def __init__(self, tensors: Sequence[Tensor], kinds: Sequence[Hashable] | None = None) -> None:
        self.layout = Layout(tensors, kinds)
        self._kinds = kinds
        self._held = [_empty_like(batch) for batch in self.layout.split(tensors)]
        views = iter([view for held in self._held for view in held.views])
        by_index = {index: next(views) for batch in self.layout.batches for index in batch}
        self.views = [by_index[index] for index in range(len(tensors))]

    def more(self) -> Copies:
        """Return further memory for copies of the same tensors."""
        return Copies(self.views, self._kinds)

    def take(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, sums: PartSums | None = None
    ) -> Tensor:
        """Copy tensors, and return rows with Σ|x|² of each and, if gradients are given, Σ|g|², and further sums.

        Args:
            tensors: The tensors to copy.
            gradients: A tensor of the same shape and dtype for each.
            sums: Computes further sums of tensors and gradients, part by part, while these are in the cache.

        Example:
            >>> Copies([torch.zeros(2)]).take([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 2.0])])
            tensor([[25.],
                    [ 5.]])
        """
        others = [*([gradients] if gradients else []), *(sums.constants if sums else [])]
        batches = zip(self._held, self.layout.split(tensors), *map(self.layout.split, others), strict=True)
        found = []
        for index, (held, batch, *more) in enumerate(batches):
            parts = []
            for squares, *values in self._taken(held, batch, more):
                known = [squares(one) for one in values[: 2 if gradients else 1]]
                parts.append(torch.stack([*known, *(sums.of_part(index, squares, known, *values) if sums else [])]))
            found.append(_total(parts))
        return self.layout.join(found)

    def _taken(self, held: _Held, batch: tuple[Tensor, ...], others: list[tuple[Tensor, ...]]) -> Iterator[tuple[Any, ...]]:
        """Copy a batch, and yield for each part how to sum squares, the copies, and the matching parts of other tensors."""
        if held.stacked is not None:
            torch.stack(batch, out=held.stacked)
            yield _row_squares, held.stacked, *(self.layout.stack(other, index) for index, other in enumerate(others))
        elif held.is_list:
            torch._foreach_copy_(held.views, batch)
            yield _list_squares, held.views, *others
        else:
            for copy, weights, *more in _parts(held.views[0], batch[0], *(other[0] for other in others)):
                yield _part_squares, copy.copy_(weights), *more

    def fill(self, batches: Sequence[list[int]], add: Callable[[list[int]], None], *, at_once: bool) -> Tensor:
        """Set the copies to zero, let a function add to ``views``, and return Σ|x|² of each.

        Args:
            batches: For each batch, the indices of the views to add to.
            add: Adds to the views with given indices.
            at_once: Whether to call ``add`` once for all views, in their order, rather than for each batch while it is in the
                cache.
        """
        if at_once:
            torch._foreach_zero_(self.views)
            add(sorted(chain(*batches)))
            return self.layout.join([_held_squares(held) for held in self._held])
        found = []
        for held, batch in zip(self._held, batches, strict=True):
            torch._foreach_zero_(held.views if held.stacked is None else [held.stacked])
            if batch:
                add(batch)
            found.append(_held_squares(held))
        return self.layout.join(found)

    def distances(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Σ|x − copy|² of each tensor. The copies are overwritten."""
        batches = zip(self._held, self.layout.split(tensors), strict=True)
        return self.layout.join(
            [_total([squares(change) for squares, _, change, _ in self._changed(*pair)]) for pair in batches]
        )

    def changes(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return rows with Σ|x|², Σ|x − copy|², and the number of zeros of each tensor. The copies are overwritten.

        Example:
            >>> copies = Copies([torch.zeros(2)])
            >>> _ = copies.take([torch.tensor([1.0, 2.0])])
            >>> copies.changes([torch.tensor([1.0, 0.0])])
            tensor([[1.],
                    [4.],
                    [1.]])
        """
        found = []
        for held, batch in zip(self._held, self.layout.split(tensors), strict=True):
            sums = []
            for squares, new, change, zeros in self._changed(held, batch):
                known = [squares(new), squares(change)]
                sums.append(torch.stack([*known, zeros(new, change).to(known[0])]))
            found.append(_total(sums))
        return self.layout.join(found)

    def _changed(
        self, held: _Held, batch: tuple[Tensor, ...]
    ) -> Iterator[tuple[Squares, Any, Any, Callable[[Any, Any], Tensor]]]:
        """Yield each part of a batch with its difference from the copies, and how to sum squares and count zeros."""
        if held.stacked is not None:
            rows = self.layout.stack(batch)
            yield _row_squares, rows, held.stacked.sub_(rows), _row_zeros
        elif held.is_list:
            torch._foreach_sub_(held.views, batch)
            yield _list_squares, batch, held.views, lambda tensors, _: _list_zeros(held, tensors)
        else:
            for copy, new in _parts(held.views[0], batch[0]):  # the buffer stays in the cache, other than the copies
                change = torch.sub(copy, new, out=self.layout.buffer(new, new.shape, "change"))
                yield _part_squares, new, change, _part_zeros


class _Held(NamedTuple):
    """The copies of a batch. Small ones are stacked in one tensor."""

    views: tuple[Tensor, ...]
    stacked: Tensor | None
    entries: Tensor | None = None
    """The number of entries of each, if they are a list."""

    @property
    def is_list(self) -> bool:
        """Whether they are a list, so that one call takes all of them."""
        return self.entries is not None


def _batches(tensors: Sequence[Tensor], kinds: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of tensors that are measured together."""
    kept = [(tensor.dtype, tensor.device, kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    stacks = [(tensor.shape, one) if tensor.numel() <= SMALL else None for tensor, one in zip(tensors, kept, strict=True)]
    counts: Counter[Hashable] = Counter(stacks)
    batches: list[list[int]] = []
    growing: dict[Hashable, list[int]] = {}
    room: dict[Hashable, int] = {}
    for index, tensor in enumerate(tensors):
        entries, most = tensor.numel(), chunk_entries(tensor.device)
        key: Hashable = stacks[index]
        on_cpu = is_cpu(tensor)
        if key is None or counts[key] < (2 if on_cpu else _MANY):
            if on_cpu:
                batches.append([index])
                continue
            key, most = (entries > _EXACT, kept[index]), sys.maxsize  # a list needs no further memory
        if room.get(key, -1) < entries:
            growing[key], room[key] = [], most
            batches.append(growing[key])
        growing[key].append(index)
        room[key] -= entries
    return batches


def _is_stack(batch: Sequence[Tensor]) -> bool:
    """Return whether the tensors of a batch are to be stacked: several small ones of one shape."""
    first = batch[0]
    return len(batch) > 1 and first.numel() <= SMALL and all(tensor.shape == first.shape for tensor in batch)


def _picker(batch: list[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return a function that picks the tensors of a batch."""
    if len(batch) == 1:
        return lambda tensors: (tensors[batch[0]],)
    return itemgetter(*batch)


def _empty_like(batch: tuple[Tensor, ...]) -> _Held:
    first = batch[0]
    if _is_stack(batch):
        stacked = torch.empty((len(batch), *first.shape), dtype=first.dtype, device=first.device)
        return _Held(stacked.unbind(), stacked)
    entries = None if is_cpu(first) else torch.tensor([tensor.numel() for tensor in batch], device=first.device)
    return _Held(tuple(torch.empty_like(tensor) for tensor in batch), None, entries)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape into matching chunks, in the order of the memory if it is the same for all."""
    first = tensors[0]
    if not first.is_contiguous() and len({tensor.stride() for tensor in tensors}) == 1:
        order = sorted(range(first.ndim), key=first.stride, reverse=True)
        tensors = tuple(tensor.permute(order) for tensor in tensors)
    return chunks(*tensors)


def _squares(batch: tuple[Tensor, ...]) -> Tensor:
    """Return Σ|x|² of each tensor of a batch that is not stacked."""
    if is_cpu(batch[0]):
        return _total([_part_squares(part) for (part,) in _parts(batch[0])])
    return _list_squares(batch)


def _held_squares(held: _Held) -> Tensor:
    return _squares(held.views) if held.stacked is None else _row_squares(held.stacked)


def _total(sums: Sequence[Tensor]) -> Tensor:
    """Return the sum over the parts of a batch."""
    return sums[0] if len(sums) == 1 else torch.stack(list(sums)).sum(0)


def _part_squares(part: Tensor) -> Tensor:
    row = (torch.view_as_real(part) if part.is_complex() else part).reshape(-1)
    rest = len(row) % _ROW
    if rest == len(row):
        row = row.to(accumulation_dtype(row.dtype))
        return torch.dot(row, row)[None]
    rows = row[: len(row) - rest].view(-1, _ROW)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(row.dtype))
    squares = torch.dot(norms, norms)[None]
    return squares + _part_squares(row[-rest:]) if rest else squares


def _row_squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.view(len(rows), -1), dim=1, dtype=_norm_dtype(rows))
    return norms**2


def _list_squares(tensors: tuple[Tensor, ...]) -> Tensor:
    dtype = _norm_dtype(tensors[0])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)) ** 2


def _norm_dtype(tensor: Tensor) -> torch.dtype | None:
    return None if tensor.is_complex() else accumulation_dtype(tensor.dtype)


def _part_zeros(part: Tensor, buffer: Tensor) -> Tensor:
    return _is_zero(part, buffer).sum()[None]


def _row_zeros(rows: Tensor, buffer: Tensor) -> Tensor:
    return _is_zero(rows, buffer).view(len(rows), -1).sum(1)


def _list_zeros(held: _Held, tensors: tuple[Tensor, ...]) -> Tensor:
    """Return the number of zeros of each of a list of tensors."""
    assert held.entries is not None, "it is a list"
    if tensors[0].numel() > _EXACT:
        nonzeros = [torch.count_nonzero(tensor) for tensor in tensors]
    else:
        dtype = _norm_dtype(tensors[0])
        nonzeros = [torch.linalg.vector_norm(tensor, 0, dtype=dtype) for tensor in tensors]  # one kernel instead of two
    return held.entries - torch.stack(nonzeros)


def _is_zero(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return where entries are 0, as a tensor to sum. Overwrites the buffer."""
    if tensor.dtype is torch.float32:  # faster than bool, and exact for the entries of a chunk
        return torch.eq(tensor, 0, out=buffer)
    return tensor == 0
