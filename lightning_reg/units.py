"""What an output unit of a parameter is: a row of a linear layer, a filter of a convolution, the vector of a token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_reg.tensors import local, shard_like, whole

__all__ = ["Units", "local_unit_means", "local_unit_norms", "unit_norms", "unit_size", "unit_view", "units_of"]


class Units(NamedTuple):
    """Where a tensor keeps its output units.

    Args:
        dim: The dimension that counts them.
        groups: In how many groups the input channels, in dimension 0, are divided, each with output units of its own.
    """

    dim: int = 0
    groups: int = 1


def units_of(module: nn.Module) -> Units:
    """Return where a module's weight keeps its output units: dimension 0, or 1 in a transposed convolution.

    Example:
        >>> units_of(nn.Linear(2, 3)), units_of(nn.ConvTranspose2d(4, 6, 3, groups=2))
        (Units(dim=0, groups=1), Units(dim=1, groups=2))
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Units(1, module.groups)
    return Units()


def unit_view(tensor: Tensor, units: Units) -> Tensor:
    """Return a view of this rank's part whose dimensions :func:`local_unit_norms` of the same tensor broadcasts over."""
    return local(tensor) if _is_scattered(tensor, units) else _grouped(local(tensor), units)


def unit_norms(tensor: Tensor, units: Units) -> Tensor:
    """Return the L2 norm of each unit, in float32 or better, with dimensions of 1 where it was taken; sharded as the tensor is.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), Units())
        tensor([[5.],
                [0.]])
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    view, reduced = _reduction(tensor, units)
    if not reduced:
        return view.abs().to(dtype)
    norms: Tensor = torch.linalg.vector_norm(view, dim=reduced, keepdim=True, dtype=dtype)
    return norms


def local_unit_norms(tensor: Tensor, units: Units) -> Tensor:
    """Return the norms, over all shards, of the units that :func:`unit_view` of the same tensor holds a part of."""
    return _aligned(unit_norms(tensor, units), tensor, units)


def local_unit_means(tensor: Tensor, units: Units) -> Tensor:
    """Return the means, over all shards, of the units that :func:`unit_view` of the same tensor holds a part of."""
    view, reduced = _reduction(tensor, units)
    sums = view.sum(reduced, keepdim=True, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return _aligned(sums, tensor, units) / unit_size(tensor, units)


def unit_size(tensor: Tensor, units: Units) -> int:
    """Return how many entries a unit has."""
    kept = _unit_dims(tensor, units)
    count = units.groups if len(kept) > 1 else 1
    return tensor.numel() // max(count * tensor.shape[units.dim], 1) if tensor.ndim else 1


def _reduction(tensor: Tensor, units: Units) -> tuple[Tensor, list[int]]:
    """Return a view of a tensor, whole where its shards cut across groups, and the dimensions within a unit."""
    view = _grouped(whole(tensor) if _is_scattered(tensor, units) else tensor, units)
    kept = _unit_dims(tensor, units)
    return view, [dim for dim in range(view.ndim) if dim not in kept]


def _is_scattered(tensor: Tensor, units: Units) -> bool:
    """Return whether shards cut across the groups of channels, so that a part cannot be divided into groups."""
    return isinstance(tensor, DTensor) and units.groups > 1


def _aligned(figures: Tensor, tensor: Tensor, units: Units) -> Tensor:
    """Return the figures of those units of a tensor of which this rank holds a part, reduced over the others."""
    if _is_scattered(tensor, units):
        shape = (units.groups, tensor.shape[0] // units.groups, *tensor.shape[1:])
        return local(shard_like(figures.expand(shape).reshape(tensor.shape), tensor))
    if not isinstance(figures, DTensor) or not isinstance(tensor, DTensor):
        return figures
    pairs = zip(figures.placements, tensor.placements, strict=True)
    aligned = [placement if placement == source else Replicate() for placement, source in pairs]
    return figures.redistribute(placements=aligned).to_local()


def _grouped(tensor: Tensor, units: Units) -> Tensor:
    if units.groups == 1 or tensor.ndim < 2:
        return tensor
    return tensor.view(units.groups, tensor.shape[0] // units.groups, *tensor.shape[1:])


def _unit_dims(tensor: Tensor, units: Units) -> tuple[int, ...]:
    if tensor.ndim < 2:
        return tuple(range(tensor.ndim))
    return (0, units.dim + 1) if units.groups > 1 else (units.dim,)
