"""Output units of a parameter: rows of a linear layer, filters of a convolution, vectors of an embedding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lightning_reg._tensors.reductions import accumulation_dtype, in_accumulation_dtype, is_cpu
from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like

_SMALL, _SCALE = 2.0**-50, 2.0**100
"""The norm below which squares may underflow in float32, and a factor that prevents it. Its inverse prevents overflow."""


class Units(NamedTuple):
    """Where a tensor has its output units.

    Args:
        dim: The dimension whose indices are the units.
        groups: The number of groups into which the input channels (dimension 0) are divided, each with its own output units.
    """

    dim: int = 0
    groups: int = 1


def input_dim(tensor: Tensor, units: Units) -> int:
    """Return the input dimension of a layer: the one after the output units, or before them if these are not first.

    Example:
        >>> input_dim(torch.zeros(6, 4, 3, 3), Units()), input_dim(torch.zeros(4, 6), Units(1))
        (1, 0)
    """
    return units.dim - 1 if units.dim else min(1, max(tensor.ndim - 1, 0))


def unit_view(tensor: Tensor, units: Units) -> Tensor:
    """Return a view of this rank's part, shaped so that the result of :func:`local_unit_norms` broadcasts against it."""
    return local_tensor(tensor) if _is_scattered(tensor, units) else _grouped(local_tensor(tensor), units)


def unit_norms(tensor: Tensor, units: Units) -> Tensor:
    """Return the L2 norm of each unit in float32 or better, with reduced dimensions kept, sharded like the tensor.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), Units())
        tensor([[5.],
                [0.]])
    """
    return _norms(*_reduction(tensor, units))


def wide_unit_norms(tensor: Tensor, units: Units, *, above: float = 0.0) -> Tensor:
    """Return the same norms, without overflow and underflow in their squares: in float64 where float32 is not enough.

    Args:
        tensor: The tensor.
        units: Where it has its output units.
        above: The norms at and below this number need not be exact, only no larger than it.

    Example:
        >>> weight = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
        >>> unit_norms(weight, Units()).flatten(), wide_unit_norms(weight, Units()).flatten()
        (tensor([inf, 0.]), tensor([5.0000e+30, 5.0000e-30], dtype=torch.float64))
    """
    view, reduced = _reduction(tensor, units)
    if _computes_in_float64(view):
        return _norms(view, reduced, torch.float64)
    return in_wide_range(_norms(view, reduced), view, reduced, above=above)


def in_wide_range(norms: Tensor, view: Tensor, reduced: list[int], *, above: float = 0.0) -> Tensor:
    """Return L2 norms that may have overflowed or underflowed, in float64 where float32 is not enough.

    On the CPU, where the norms can be read without waiting, the second computation runs only if there are such norms.

    Args:
        norms: The norms, with reduced dimensions kept.
        view: The tensor whose norms they are.
        reduced: The dimensions that were reduced.
        above: The norms at and below this number need not be exact, only no larger than it.
    """
    if norms.dtype != torch.float32 or view.dtype == torch.float16 or not norms.numel():
        return norms
    if isinstance(norms, DTensor) or not is_cpu(norms):
        return _norms(view, reduced, torch.float64) if _computes_in_float64(view) else norms
    smallest, largest = norms.aminmax() if above < _SMALL else (None, norms.max())
    overflows = not largest.item() < math.inf  # also for NaN
    underflows = smallest is not None and smallest.item() < _SMALL
    if not (overflows or underflows):
        return norms
    wide = norms.double()
    if underflows:
        wide = torch.where(norms < _SMALL, _norms(view * _SCALE, reduced).double() / _SCALE, wide)
    if overflows:
        wide = torch.where(norms == math.inf, _norms(view / _SCALE, reduced).double() * _SCALE, wide)
    zeros_only = not (overflows or bool(((wide > 0) & (wide < _SMALL)).any()))
    return norms if zeros_only else wide


def _computes_in_float64(view: Tensor) -> bool:
    """Return whether norms are computed in float64 at once, because reading those in float32 would wait for the device."""
    is_wide = view.dtype in (torch.float32, torch.bfloat16, torch.complex64)
    return is_wide and view.device.type != "mps" and (isinstance(view, DTensor) or not is_cpu(view))


def _norms(view: Tensor, reduced: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return norms in at least this dtype, with reduced dimensions kept."""
    dtype = torch.promote_types(view.dtype, dtype)
    if not reduced:
        return view.abs().to(dtype.to_real())
    norms: Tensor = torch.linalg.vector_norm(view, dim=reduced, keepdim=True, dtype=dtype)
    return _joined(norms)


def _joined(norms: Tensor) -> Tensor:
    """Join the norms of the parts of units that span ranks. DTensor would sum over units before it joins these."""
    if not isinstance(norms, DTensor):
        return norms
    placements = [Replicate() if placement.is_partial() else placement for placement in norms.placements]
    return norms.redistribute(placements=placements)


def smooth_unit_norms(tensor: Tensor, units: Units) -> Tensor:
    """Return the L2 norm of each unit through operations that can be differentiated any number of times.

    All derivatives are 0 for a unit of zeros.
    """
    view, reduced = _reduction(in_accumulation_dtype(tensor), units)
    if not reduced or not tensor.numel():
        return view.abs().sum(reduced, keepdim=True) if reduced else view.abs()
    largest = view.detach().abs().amax(reduced, keepdim=True)
    is_zero = largest == 0
    scale = torch.where(is_zero, 1.0, largest)  # a constant, so that squares neither overflow nor underflow
    scaled = view / scale
    squares = scaled.real.square() + scaled.imag.square() if view.is_complex() else scaled.square()
    return scale * torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares.sum(reduced, keepdim=True)).sqrt())


def local_unit_norms(tensor: Tensor, units: Units, *, above: float = 0.0) -> Tensor:
    """Return the wide norms, over all shards, of the units that this rank holds in part, for :func:`unit_view`."""
    return _aligned(wide_unit_norms(tensor, units, above=above), tensor, units)


def narrow_local_unit_norms(tensor: Tensor, units: Units) -> Tensor:
    """Return the same norms, cheaper on a GPU. Their squares may overflow or underflow in float32."""
    return _aligned(unit_norms(tensor, units), tensor, units)


def local_unit_means(tensor: Tensor, units: Units) -> Tensor:
    """Return the means, over all shards, of the units that this rank holds in part, for :func:`unit_view`."""
    view, reduced = _reduction(tensor, units)
    sums = view.sum(reduced, keepdim=True, dtype=accumulation_dtype(tensor.dtype))
    return _aligned(sums, tensor, units) / unit_size(tensor, units)


def unit_size(tensor: Tensor, units: Units) -> int:
    """Return the number of entries in a unit. In a vector, each entry is a unit."""
    if tensor.ndim < 2:
        return 1
    kept = _unit_dims(tensor, units)
    count = units.groups if len(kept) > 1 else 1
    return tensor.numel() // max(count * tensor.shape[units.dim], 1)


def _reduction(tensor: Tensor, units: Units) -> tuple[Tensor, list[int]]:
    """Return a view of a tensor, gathered if its shards cut across groups, and the dimensions within a unit."""
    view = _grouped(full_tensor(tensor) if _is_scattered(tensor, units) else tensor, units)
    kept = _unit_dims(tensor, units)
    return view, [dim for dim in range(view.ndim) if dim not in kept]


def _is_scattered(tensor: Tensor, units: Units) -> bool:
    """Return whether shards cut across the groups of channels, so that a shard cannot be divided into groups."""
    return isinstance(tensor, DTensor) and units.groups > 1


def _aligned(values: Tensor, tensor: Tensor, units: Units) -> Tensor:
    """Return the values of the units that this rank holds in part, reduced over the other ranks."""
    if _is_scattered(tensor, units):
        shape = (units.groups, tensor.shape[0] // units.groups, *tensor.shape[1:])
        return local_tensor(shard_like(values.expand(shape).reshape(tensor.shape), tensor))
    if not isinstance(values, DTensor) or not isinstance(tensor, DTensor):
        return values
    pairs = zip(values.placements, tensor.placements, strict=True)
    aligned = [placement if placement == source else Replicate() for placement, source in pairs]
    return values.redistribute(placements=aligned).to_local()


def _grouped(tensor: Tensor, units: Units) -> Tensor:
    if units.groups == 1 or tensor.ndim < 2:
        return tensor
    return tensor.view(units.groups, tensor.shape[0] // units.groups, *tensor.shape[1:])


def _unit_dims(tensor: Tensor, units: Units) -> tuple[int, ...]:
    if tensor.ndim < 2:
        return tuple(range(tensor.ndim))
    return (0, units.dim + 1) if units.groups > 1 else (units.dim,)
