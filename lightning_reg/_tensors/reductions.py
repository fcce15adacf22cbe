"""Norms and sums over lists of tensors, accumulated in float32 or better and over all shards."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from lightning_reg._tensors.shards import divides, full_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLAIN = {Tensor, Parameter}
_FEW = 4


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to accumulate in: float32 for half precision, else the dtype itself.

    Example:
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def in_accumulation_dtype(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype to accumulate in; differentiable."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def is_cpu(tensor: Tensor) -> bool:
    """Return whether a tensor is on the CPU, so that its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def tensor_norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each tensor over all its shards, accumulated in float32 or better."""
    if {tensor.dtype for tensor in tensors} <= {torch.float32, torch.float64} and set(map(type, tensors)) <= _PLAIN:
        return list(torch._foreach_norm(list(tensors), order))
    return [_norm(tensor, order) for tensor in tensors]


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector, over all shards. Without shards, it equals torch's bit for bit."""
    norm: Tensor
    if set(map(type, tensors)) == {Tensor} and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1:
        # The same computation as torch's, without its search for several devices and dtypes, which costs more than the norms.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), order)), order)
    elif any(isinstance(tensor, DTensor) for tensor in tensors):
        norm = total_norm_fp32(tensors, order)
    else:
        norm = get_total_norm(tensors, order)
    return norm


def total_norm_fp32(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector, over all shards, in float32 or better, regardless of their dtype."""
    norms = tensor_norms(tensors, order)
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, torch.float64) for norm in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    return norm


def magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return |z| for each complex tensor, and each real tensor unchanged."""
    return [tensor.abs() if tensor.is_complex() else tensor for tensor in tensors]


def real_pairs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of complex tensors as pairs of real numbers, |z| for sharded ones, and real tensors unchanged."""
    return [_real_pairs(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def sum_scalars(scalars: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or more scalar tensors."""
    if len(scalars) > _FEW:
        return torch.stack(list(scalars)).sum()
    return reduce(torch.add, scalars)  # for a few scalars, additions are cheaper than a stack and a sum


def fraction_above(tensors: Sequence[Tensor], bound: float) -> Tensor:
    """Return the fraction of entries whose magnitude exceeds a bound, over all shards."""
    counts = [full_tensor((tensor.abs() > bound).sum()) for tensor in tensors]
    return torch.stack(counts).sum() / sum(tensor.numel() for tensor in tensors) if tensors else torch.zeros(())


def _real_pairs(tensor: Tensor) -> Tensor:
    return tensor.abs() if isinstance(tensor, DTensor) else torch.view_as_real(tensor.resolve_conj())


def _norm(tensor: Tensor, order: float) -> Tensor:
    dtype = accumulation_dtype(tensor.dtype)
    if isinstance(tensor, DTensor):
        return _sharded_norm(tensor, order, dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, order, dtype=dtype)
    return norm


def _sharded_norm(tensor: DTensor, order: float, dtype: torch.dtype) -> Tensor:
    """Reduce the norms of the shards, some of which may be empty."""
    part = tensor.to_local()
    norm = torch.linalg.vector_norm(part, order, dtype=dtype) if part.numel() else part.new_zeros((), dtype=dtype)
    is_max = math.isinf(order)
    reduction = Partial("max" if is_max else "sum")
    placements = [reduction if divides(placement) else Replicate() for placement in tensor.placements]
    joint = DTensor.from_local(norm if is_max else norm**order, tensor.device_mesh, placements, run_check=False).full_tensor()
    return joint if is_max else joint ** (1 / order)
