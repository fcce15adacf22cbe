"""Sharded parameters: this rank's part, the full tensor, and reductions over the shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, which shares its memory: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of several tensors that this rank holds, sharing their memory."""
    return [local_tensor(tensor) for tensor in tensors] if is_sharded(tensors) else list(tensors)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is divided among ranks."""
    return DTensor in set(map(type, tensors))  # one set is cheaper than an isinstance check for each tensor


def sharding(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """Return how a tensor is divided among ranks, to compare with others; ``None`` if it is a plain tensor."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def divides(placement: Placement) -> bool:
    """Return whether a placement divides a tensor among ranks. With tensor parallelism, FSDP2 uses one that is no ``Shard``."""
    if not isinstance(placement, Shard | _StridedShard | Replicate):
        raise TypeError(f"parameters must be sharded or replicated, got the placement {placement!r}")
    return not isinstance(placement, Replicate)


def shard_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Shard a full tensor, equal on every rank, in the same way as another tensor of its shape."""
    if not isinstance(sharded, DTensor):
        return tensor
    replicated = DTensor.from_local(tensor, sharded.device_mesh, [Replicate()] * sharded.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=sharded.placements)


def gather_shards(part: Tensor, sharded: Tensor) -> Tensor:
    """Join a vector that each rank computed from its shard of a tensor, of the same length on every rank."""
    if not isinstance(sharded, DTensor):
        return part
    placements = [Shard(0) if divides(placement) else Replicate() for placement in sharded.placements]
    return DTensor.from_local(part, sharded.device_mesh, placements, run_check=False).full_tensor()


def sum_over_shards(part: Tensor, sharded: Tensor) -> Tensor:
    """Return the sum over ranks of values from each shard of a tensor, or ``part`` itself if it is not sharded."""
    if not isinstance(sharded, DTensor):
        return part
    placements = [Partial("sum") if divides(placement) else Replicate() for placement in sharded.placements]
    return DTensor.from_local(part, sharded.device_mesh, placements, run_check=False).full_tensor()


def sum_each_over_shards(parts: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return sums over ranks of what each computed from its shards of several tensors, with one reduction for each sharding.

    Args:
        parts: Values of this rank. The last dimension counts the tensors.
        tensors: The tensors, sharded or not.
    """
    by_sharding: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors) if is_sharded(tensors) else ():
        if isinstance(tensor, DTensor):
            by_sharding.setdefault(sharding(tensor), []).append(index)
    for indices in by_sharding.values():
        if len(indices) == len(tensors):
            return sum_over_shards(parts, tensors[0])
        parts = parts.index_copy(
            -1, found := torch.tensor(indices, device=parts.device), sum_over_shards(parts[..., found], tensors[indices[0]])
        )
    return parts


def min_over_shards(number: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the minimum of a number, which must not be NaN, over the ranks among which the tensors are divided."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))  # same order on all ranks
    for mesh in meshes:
        number = DTensor.from_local(number, mesh, [Partial("min")] * mesh.ndim, run_check=False).full_tensor()
    return number


def positions(tensor: Tensor, entries: Tensor) -> Tensor:
    """Return the indices in the flattened full tensor of entries of this rank's flattened part.

    Args:
        tensor: A tensor, sharded or not.
        entries: Indices into the flattened part that this rank holds.

    Returns:
        A tensor of the shape of ``entries``.

    Example:
        >>> positions(torch.zeros(2, 3), torch.arange(2, 5))
        tensor([2, 3, 4])
    """
    if not isinstance(tensor, DTensor) or not entries.numel():
        return entries
    part = local_tensor(tensor)
    rest, flat_indices = entries, torch.zeros_like(entries)
    stride = 1
    for dim in reversed(range(tensor.ndim)):
        rest, index = rest // part.shape[dim], rest % part.shape[dim]
        flat_indices += _local_indices(tensor, dim)[index] * stride
        stride *= tensor.shape[dim]
    return flat_indices


def _local_indices(tensor: DTensor, dim: int) -> Tensor:
    """Return the indices of a dimension that this rank holds, without communication."""
    indices = torch.arange(tensor.shape[dim], device=tensor.to_local().device)
    mesh = tensor.device_mesh
    replicated = DTensor.from_local(indices, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [_along(placement, dim, tensor.ndim) for placement in tensor.placements]
    return replicated.redistribute(placements=placements).to_local()


def _along(placement: Placement, dim: int, ndim: int) -> Placement:
    """Return how a placement divides a vector along one dimension of a tensor."""
    if not isinstance(placement, Shard | _StridedShard) or placement.dim % ndim != dim:
        return Replicate()
    return Shard(0) if isinstance(placement, Shard) else _StridedShard(0, split_factor=placement.split_factor)
