"""How tensors are divided into batches, each of which is measured in a few calls.

Small tensors of one shape are stacked. On the CPU, each other tensor is read in parts that fit a processor cache; on other
devices, one call takes a list of them.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from operator import attrgetter, eq, itemgetter
from typing import TYPE_CHECKING

import torch

from lightning_reg._tensors.chunks import chunk_entries
from lightning_reg._tensors.reductions import is_cpu
from lightning_reg.monitors.sums import EXACT, list_norms, row_norms, tensor_squares

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

SMALL = 1 << 16
"""The most entries of a tensor that is stacked with others of its shape."""
_MANY = 16
"""The least number of tensors of one shape that are stacked on other devices than the CPU. For fewer, a list is faster."""


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
        return self.join([squares_of(batch, self.stack(batch) if is_stack(batch) else None) for batch in self.split(tensors)])


def is_stack(batch: Sequence[Tensor]) -> bool:
    """Return whether the tensors of a batch are to be stacked: several small ones of one shape."""
    first = batch[0]
    return len(batch) > 1 and first.numel() <= SMALL and all(tensor.shape == first.shape for tensor in batch)


def is_list(batch: Sequence[Tensor]) -> bool:
    """Return whether one call is to take all tensors of a batch, as a list."""
    return not is_cpu(batch[0]) and not is_stack(batch)


def squares_of(batch: Sequence[Tensor], stacked: Tensor | None) -> Tensor:
    """Return Σ|x|² of each tensor of a batch, which may be stacked."""
    if stacked is not None:
        return row_norms(stacked).square()
    return list_norms(batch).square() if is_list(batch) else tensor_squares(batch[0])


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
            key, most = (entries > EXACT, kept[index]), sys.maxsize  # a list needs no further memory
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
