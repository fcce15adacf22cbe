"""Sums over tensors in few passes: Σ|x|² and the number of zeros of rows, of parts of one tensor, and of lists of tensors.

Each function returns a vector with one value for each tensor, on the device of the tensors, so that nothing waits for a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._tensors.chunks import chunks
from lightning_reg._tensors.reductions import accumulation_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

EXACT = 1 << 24
"""The most entries that float32 can count one by one."""
_ROW = 1024
"""The number of entries that are summed at a time. It makes sums as exact as float32 allows, and is as fast as one sum."""


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape into matching chunks, in the order of the memory if it is the same for all."""
    first = tensors[0]
    if not first.is_contiguous() and len({tensor.stride() for tensor in tensors}) == 1:
        order = sorted(range(first.ndim), key=first.stride, reverse=True)
        tensors = tuple(tensor.permute(order) for tensor in tensors)
    return chunks(*tensors)


def total(sums: Sequence[Tensor]) -> Tensor:
    """Return the sum over parts."""
    return sums[0] if len(sums) == 1 else torch.stack(list(sums)).sum(0)


def tensor_squares(tensor: Tensor) -> Tensor:
    """Return Σ|x|² of one tensor, as a vector with one value."""
    return total([part_squares(part) for (part,) in parts(tensor)])


def part_squares(part: Tensor) -> Tensor:
    """Return Σ|x|² of a part of a tensor, as a vector with one value."""
    row = (torch.view_as_real(part) if part.is_complex() else part).reshape(-1)
    rest = len(row) % _ROW
    if rest == len(row):
        row = row.to(accumulation_dtype(row.dtype))
        return torch.dot(row, row)[None]
    rows = row[: len(row) - rest].view(-1, _ROW)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(row.dtype))
    squares = torch.dot(norms, norms)[None]
    return squares + part_squares(row[-rest:]) if rest else squares


def row_squares(rows: Tensor) -> Tensor:
    """Return Σ|x|² of each of several stacked tensors."""
    norms: Tensor = torch.linalg.vector_norm(rows.view(len(rows), -1), dim=1, dtype=_norm_dtype(rows))
    return norms**2


def list_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ|x|² of each tensor of a list."""
    dtype = _norm_dtype(tensors[0])
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype)) ** 2


def part_zeros(part: Tensor, buffer: Tensor) -> Tensor:
    """Return the number of zeros in a part of a tensor, as a vector with one value. Overwrites the buffer."""
    return _is_zero(part, buffer).sum()[None]


def row_zeros(rows: Tensor, buffer: Tensor) -> Tensor:
    """Return the number of zeros in each of several stacked tensors. Overwrites the buffer."""
    return _is_zero(rows, buffer).view(len(rows), -1).sum(1)


def list_zeros(tensors: Sequence[Tensor], entries: Tensor) -> Tensor:
    """Return the number of zeros in each tensor of a list, all of which or none of which have more than ``EXACT`` entries.

    Args:
        tensors: The tensors.
        entries: The number of entries of each.
    """
    if tensors[0].numel() > EXACT:
        nonzeros = [torch.count_nonzero(tensor) for tensor in tensors]
    else:
        dtype = _norm_dtype(tensors[0])
        nonzeros = [torch.linalg.vector_norm(tensor, 0, dtype=dtype) for tensor in tensors]  # one kernel instead of two
    return entries - torch.stack(nonzeros)


def _norm_dtype(tensor: Tensor) -> torch.dtype | None:
    return None if tensor.is_complex() else accumulation_dtype(tensor.dtype)


def _is_zero(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return where entries are 0, as a tensor to sum. Overwrites the buffer."""
    if tensor.dtype is torch.float32:  # faster than bool, and exact for the entries of a chunk
        return torch.eq(tensor, 0, out=buffer)
    return tensor == 0
