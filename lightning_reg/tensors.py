"""Small helpers over lists of tensors: local shards, gradients that can be added to, norms in enough precision."""

from __future__ import annotations

import math
from functools import reduce
from operator import attrgetter
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "accumulated_norms",
    "dense_gradients",
    "fraction_beyond",
    "is_sharded",
    "joint_norm",
    "local",
    "locals_of",
    "on_host",
    "precise_norm",
    "present_gradients",
    "shard_like",
    "smallest_anywhere",
    "sum_over_shards",
    "total",
    "whole",
]


_PLAIN = {Tensor, Parameter}


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory: the whole of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_host(tensor: Tensor) -> bool:
    """Return whether a number can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return a whole tensor, the same on every rank, divided among the ranks as another one of its shape is."""
    if not isinstance(sharded, DTensor):
        return tensor
    replicated = DTensor.from_local(tensor, sharded.device_mesh, [Replicate()] * sharded.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=sharded.placements)


def sum_over_shards(part: Tensor, sharded: Tensor) -> Tensor:
    """Return the sum of what each rank counted in its shard of a tensor; where there are no shards, what was counted."""
    if not isinstance(sharded, DTensor):
        return part
    placements = [Partial("sum") if placement.is_shard() else Replicate() for placement in sharded.placements]
    return DTensor.from_local(part, sharded.device_mesh, placements, run_check=False).full_tensor()


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that this rank holds, sharing their memory."""
    return [local(tensor) for tensor in tensors] if is_sharded(tensors) else list(tensors)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of some tensors is divided among ranks."""
    return DTensor in set(map(type, tensors))  # one look at all of them is cheaper than one at each


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each gradient, for adding to it: missing ones become zero, sparse ones dense."""
    gradients = [p.grad for p in params]
    if type(None) in set(map(type, gradients)) or any(map(attrgetter("is_sparse"), gradients)):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
        gradients = [p.grad for p in params]
    return locals_of(cast("list[Tensor]", gradients))


def present_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that there are and have entries, a sparse one as the dense tensor of its values, sharing memory."""
    gradients = []
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
            gradients.append(p.grad._values())
        elif p.grad is not None:
            gradients.append(p.grad)
    return [gradient for gradient in gradients if gradient.numel()]


def accumulated_norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return each tensor's norm over all its shards, summed in float32 or better."""
    if {tensor.dtype for tensor in tensors} <= {torch.float32, torch.float64} and set(map(type, tensors)) <= _PLAIN:
        return list(torch._foreach_norm(list(tensors), order))
    return [_norm(tensor, order) for tensor in tensors]


def _norm(tensor: Tensor, order: float) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if isinstance(tensor, DTensor):
        return _sharded_norm(tensor, order, dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, order, dtype=dtype)
    return norm


def _sharded_norm(tensor: DTensor, order: float, dtype: torch.dtype) -> Tensor:
    """Reduce the norms of the shards, of which some may be empty."""
    part = tensor.to_local()
    norm = torch.linalg.vector_norm(part, order, dtype=dtype) if part.numel() else part.new_zeros((), dtype=dtype)
    largest = math.isinf(order)
    reduction = Partial("max" if largest else "sum")
    placements = [reduction if placement.is_shard() else Replicate() for placement in tensor.placements]
    joint = DTensor.from_local(norm if largest else norm**order, tensor.device_mesh, placements, run_check=False).full_tensor()
    return joint if largest else joint ** (1 / order)


def joint_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector, over all shards; without shards, torch's own to the last bit."""
    norm: Tensor
    if set(map(type, tensors)) == {Tensor} and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1:
        # what torch comes to after it has looked for several devices and dtypes, which costs more than small norms do
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), order)), order)
    elif any(isinstance(tensor, DTensor) for tensor in tensors):
        norm = precise_norm(tensors, order)
    else:
        norm = get_total_norm(tensors, order)
    return norm


def precise_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector, over all shards, in float32 or better whatever their dtype."""
    norms = accumulated_norms(tensors, order)
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, torch.float64) for norm in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    return norm


def total(scalars: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or more scalars."""
    if len(scalars) > _FEW:
        return torch.stack(list(scalars)).sum()
    return reduce(torch.add, scalars)  # a single operation that is soon in the processor's caches


_FEW = 4


def fraction_beyond(tensors: Sequence[Tensor], bound: float) -> Tensor:
    """Return the share of entries whose magnitude exceeds a bound, over all shards."""
    counts = [whole((tensor.abs() > bound).sum()) for tensor in tensors]
    return torch.stack(counts).sum() / sum(tensor.numel() for tensor in tensors) if tensors else torch.zeros(())


def smallest_anywhere(number: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the smallest of a number, not NaN, over the ranks among which tensors are divided."""
    for mesh in dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)):  # in one order on all
        number = DTensor.from_local(number, mesh, [Partial("min")] * mesh.ndim, run_check=False).full_tensor()
    return number
