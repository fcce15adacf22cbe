"""Sums over many tensors in few passes: Σ|x|² of each, the size of an update, and the number of zeros.

Small tensors of one shape are stacked. On the CPU, large ones are read in chunks that fit a processor cache; on other devices,
one call takes a list of them. Each function returns a vector with one value for each tensor, on the device of the
tensors, so that nothing waits for a device.
"""

from __future__ import annotations

import sys
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_reg._tensors.chunks import chunk_entries, chunks
from lightning_reg._tensors.reductions import accumulation_dtype, is_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    _Stack = Callable[[tuple[Tensor, ...]], Tensor]

SMALL = 1 << 16
"""The most entries of a tensor that is stacked with others of its shape."""


class Layout:
    """Divides tensors into batches, each of which is measured in a few calls.

    Args:
        tensors: One or more dense tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.batches = _batches(tensors)
        positions = [index for batch in self.batches for index in batch]
        self._order = torch.tensor(positions, device=tensors[0].device).argsort()
        self._pick = [_picker(batch) for batch in self.batches]
        self._device = tensors[0].device
        self._kinds = _kinds(tensors)
        self._buffers: dict[Hashable, Tensor] = {}

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors have the expected shapes and dtypes."""
        return self._kinds == _kinds(tensors)

    def split(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the tensors of each batch."""
        return [pick(tensors) for pick in self._pick]

    def stack(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Stack tensors in a buffer that the next call overwrites, because new memory would cost more than the copy."""
        first, entries = batch[0], len(batch) * batch[0].numel()
        buffer = self._buffers.get(key := (first.dtype, first.device))
        if buffer is None or len(buffer) < entries:
            buffer = self._buffers[key] = torch.empty(entries, dtype=first.dtype, device=first.device)
        return torch.stack(batch, out=buffer[:entries].view(len(batch), *first.shape))

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
        return self.join([_squares(batch, self.stack) for batch in self.split(tensors)])


class Copies:
    """Copies of tensors, to compare with later values. They reuse memory, because new memory would cost more than the rest.

    Args:
        tensors: One or more dense tensors of the shapes, dtypes, and devices to copy.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.layout = Layout(tensors)
        self._held = [_empty_like(batch) for batch in self.layout.split(tensors)]
        views = iter([view for held in self._held for view in held.views])
        by_index = {index: next(views) for batch in self.layout.batches for index in batch}
        self.views = [by_index[index] for index in range(len(tensors))]

    def take(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy tensors, and return Σ|x|² of each.

        Example:
            >>> Copies([torch.zeros(2)]).take([torch.tensor([3.0, 4.0])])
            tensor([25.])
        """
        batches = zip(self._held, self.layout.split(tensors), strict=True)
        return self.layout.join([_copied_squares(held, batch) for held, batch in batches])

    def fill(self, batches: Sequence[list[int]], add: Callable[[list[int]], None], *, at_once: bool) -> Tensor:
        """Set the copies to zero, let a function add to ``views``, and return Σ|x|² of each.

        Args:
            batches: For each batch, the indices of the views to add to.
            add: Adds to the views with given indices.
            at_once: Whether to call ``add`` once for all views, rather than for each batch while it is in the cache.
        """
        if at_once:
            torch._foreach_zero_(self.views)
            add([index for batch in batches for index in batch])
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
        return self._join(_distances, tensors)

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
        return self._join(_changes, tensors)

    def _join(self, function: Callable[[_Held, tuple[Tensor, ...], _Stack], Tensor], tensors: Sequence[Tensor]) -> Tensor:
        batches = zip(self._held, self.layout.split(tensors), strict=True)
        return self.layout.join([function(held, batch, self.layout.stack) for held, batch in batches])


class _Held(NamedTuple):
    """The copies of a batch. Small ones are stacked in one tensor."""

    views: tuple[Tensor, ...]
    stacked: Tensor | None
    entries: Tensor | None = None
    """The number of entries of each, if they are a list."""

    @property
    def is_list(self) -> bool:
        """Whether there are several copies that are not stacked."""
        return self.stacked is None and len(self.views) > 1


def _kinds(tensors: Sequence[Tensor]) -> tuple[list[torch.Size], list[torch.dtype]]:
    return list(map(attrgetter("shape"), tensors)), list(map(attrgetter("dtype"), tensors))


def _batches(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of tensors that are measured together."""
    batches: list[list[int]] = []
    growing: dict[Hashable, list[int]] = {}
    room: dict[Hashable, int] = {}
    for index, tensor in enumerate(tensors):
        entries, most = tensor.numel(), chunk_entries(tensor.device)
        if entries > (SMALL if is_cpu(tensor) else most):  # read in chunks
            batches.append([index])
            continue
        if entries > SMALL:  # in a list, which needs no further memory
            most = sys.maxsize
        key = (tensor.shape if entries <= SMALL else None, tensor.dtype, tensor.device)
        if room.get(key, -1) < entries:
            growing[key], room[key] = [], most
            batches.append(growing[key])
        growing[key].append(index)
        room[key] -= entries
    return batches


def _picker(batch: list[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return a function that picks the tensors of a batch."""
    if len(batch) == 1:
        return lambda tensors: (tensors[batch[0]],)
    return itemgetter(*batch)


def _empty_like(batch: tuple[Tensor, ...]) -> _Held:
    first = batch[0]
    if len(batch) == 1 or first.numel() > SMALL:
        sizes = torch.tensor([float(tensor.numel()) for tensor in batch], device=first.device)
        return _Held(tuple(torch.empty_like(tensor) for tensor in batch), None, sizes)
    stacked = torch.empty((len(batch), *first.shape), dtype=first.dtype, device=first.device)
    return _Held(stacked.unbind(), stacked)


def _squares(batch: tuple[Tensor, ...], stack: _Stack) -> Tensor:
    if len(batch) == 1:
        return _total(_square(chunk) for (chunk,) in chunks(batch[0]))
    return _list_squares(batch) if batch[0].numel() > SMALL else _row_squares(stack(batch))


def _held_squares(held: _Held) -> Tensor:
    return _row_squares(held.stacked) if held.stacked is not None else _squares(held.views, torch.stack)


def _copied_squares(held: _Held, batch: tuple[Tensor, ...]) -> Tensor:
    if held.stacked is not None:
        torch.stack(batch, out=held.stacked)
    elif held.is_list:
        torch._foreach_copy_(held.views, batch)
    else:
        return _total(_square(copy.copy_(chunk)) for copy, chunk in chunks(held.views[0], batch[0]))
    return _held_squares(held)


def _distances(held: _Held, batch: tuple[Tensor, ...], stack: _Stack) -> Tensor:
    if held.stacked is not None:
        held.stacked.sub_(stack(batch))
    elif held.is_list:
        torch._foreach_sub_(held.views, batch)
    else:
        return _total(_square(copy.sub_(chunk)) for copy, chunk in chunks(held.views[0], batch[0]))
    return _held_squares(held)


def _changes(held: _Held, batch: tuple[Tensor, ...], stack: _Stack) -> Tensor:
    if held.stacked is not None:
        rows = stack(batch)
        squares, change = _row_squares(rows), _row_squares(held.stacked.sub_(rows))
        return torch.stack([squares, change, _zeros(rows, held.stacked).view(len(rows), -1).sum(1).to(squares)])
    if held.is_list:
        torch._foreach_sub_(held.views, batch)
        squares = _list_squares(batch)
        nonzero = torch.stack([torch.linalg.vector_norm(tensor, 0, dtype=_norm_dtype(tensor)) for tensor in batch])
        assert held.entries is not None, "there are several that are not stacked"
        return torch.stack([squares, _list_squares(held.views), (held.entries - nonzero).to(squares)])
    return _total(_changes_of_chunk(copy, chunk) for copy, chunk in chunks(held.views[0], batch[0]))


def _changes_of_chunk(copy: Tensor, chunk: Tensor) -> Tensor:
    square, change = _square(chunk), _square(copy.sub_(chunk))  # while the entries are in the cache
    return torch.stack([square, change, _zeros(chunk, copy).sum().to(square)])


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum over the chunks of a tensor, in a new last dimension."""
    return torch.stack(list(parts)).sum(0)[..., None]


def _square(tensor: Tensor) -> Tensor:
    entries = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    row = entries.reshape(-1).to(accumulation_dtype(entries.dtype))
    return torch.dot(row, row)  # faster than a norm


def _row_squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.view(len(rows), -1), dim=1, dtype=_norm_dtype(rows))
    return norms**2


def _list_squares(tensors: tuple[Tensor, ...]) -> Tensor:
    dtype = _norm_dtype(tensors[0])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)) ** 2


def _norm_dtype(tensor: Tensor) -> torch.dtype | None:
    return None if tensor.is_complex() else accumulation_dtype(tensor.dtype)


def _zeros(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return where entries are 0, as a tensor to sum. Overwrites the buffer."""
    if tensor.dtype is torch.float32:  # faster than bool, and exact for the entries of a chunk
        return torch.eq(tensor, 0, out=buffer)
    return tensor == 0
