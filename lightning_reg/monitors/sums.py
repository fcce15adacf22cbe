"""Norms and numbers of zeros of tensors in few passes: of stacked tensors, of parts of one tensor, and of lists of tensors.

Each function returns a vector on the device of the tensors, so that nothing waits for a device.
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
_ROW, _ROWS = 1024, 256
"""The number of entries in a row of a part, and the most rows."""
_LONG = 1 << 12
"""The most entries whose squares are summed at a time, so that sums are as exact as float32 allows."""


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape into matching parts that fit a processor cache: several rows of a flat tensor, if possible.

    Example:
        >>> [tuple(part.shape) for (part,) in parts(torch.zeros(300, 1025))]
        [(256, 1024), (44, 1024), (1, 300)]
    """
    first = tensors[0]
    if not first.is_contiguous() and len({tensor.stride() for tensor in tensors}) == 1:
        order = sorted(range(first.ndim), key=first.stride, reverse=True)
        tensors = tuple(tensor.permute(order) for tensor in tensors)
    if not all(tensor.is_contiguous() for tensor in tensors):
        return (found if found[0].ndim > 1 else tuple(one[None] for one in found) for found in chunks(*tensors))
    return _parts_in_order([tensor.view(-1) for tensor in tensors])


def _parts_in_order(flat: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    entries = flat[0].numel()
    whole = entries - entries % _ROW
    if whole:
        yield from zip(*(torch.split(one[:whole].view(-1, _ROW), _ROWS) for one in flat), strict=True)
    if whole < entries or not entries:
        yield tuple(one[None, whole:] for one in flat)


def row_norms(rows: Tensor) -> Tensor:
    """Return the norm of each row."""
    flat, dtype = _flat(rows), _norm_dtype(rows)
    entries = flat.shape[1]
    if entries > _LONG:
        whole = entries - entries % _ROW
        pieces = (flat[:, :whole].view(len(flat), -1, _ROW), flat[:, None, whole:])
        flat = torch.cat([torch.linalg.vector_norm(piece, dim=2, dtype=dtype) for piece in pieces], 1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norms


def list_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each tensor of a list."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, _norm_dtype(tensors[0])))


def row_zeros(rows: Tensor, buffer: Tensor) -> Tensor:
    """Return the number of zeros in each row. Overwrites the buffer."""
    return _flat(_is_zero(rows, buffer)).sum(1)


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


def tensor_squares(tensor: Tensor) -> Tensor:
    """Return Σ|x|² of one tensor, as a vector with one value."""
    return joined([row_norms(part) for (part,) in parts(tensor)]).square().sum()[None]


def joined(found: Sequence[Tensor]) -> Tensor:
    """Return the values of several parts as one vector."""
    return found[0] if len(found) == 1 else torch.cat(list(found))


def _flat(rows: Tensor) -> Tensor:
    """Return a tensor with one dimension for the rows and one for their entries."""
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def _norm_dtype(tensor: Tensor) -> torch.dtype | None:
    if tensor.dtype is torch.float32 or tensor.is_complex():
        return None
    return accumulation_dtype(tensor.dtype)


def _is_zero(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return where entries are 0, as a tensor to sum. Overwrites the buffer."""
    if tensor.dtype is torch.float32:  # faster than bool, and exact for the entries of a part
        return torch.eq(tensor, 0, out=buffer)
    return tensor == 0
