"""Lists of gradients: which parameters have one, and in a form that can be added to or scaled."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, cast

import torch

from lightning_reg._tensors.shards import local_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each gradient, to add to: missing gradients become zeros, sparse ones become dense."""
    gradients = [p.grad for p in params]
    if type(None) in set(map(type, gradients)) or any(map(attrgetter("is_sparse"), gradients)):
        for p in params:
            p.grad = _zero_gradient(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
        gradients = [p.grad for p in params]
    return local_tensors(cast("list[Tensor]", gradients))


def _zero_gradient(p: Tensor) -> Tensor:
    """Return zeros in the dtype that the gradient of a tensor must have."""
    dtype = getattr(p, "grad_dtype", None) if p.is_leaf else None
    return torch.zeros_like(p, dtype=dtype or p.dtype)


def existing_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that exist and have entries, to read: of a sparse one the values, those of equal indices summed."""
    gradients = [p.grad.coalesce()._values() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
    return [gradient for gradient in gradients if gradient.numel()]


def scalable_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the same gradients to scale in place: of a sparse one the values as they are, so that a factor of 1 is a no-op.

    Summing the values of equal indices would change the last bits of what an optimizer does with them.
    """
    gradients = [p.grad._values() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
    return [gradient for gradient in gradients if gradient.numel()]


def changeable_gradients(params: Sequence[Tensor], changes: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return those gradients that a function of single entries may change, to do so in place.

    The values of equal indices of a sparse gradient are summed first, but only if that gradient will change.

    Args:
        params: Tensors.
        changes: Returns for each entry of a gradient whether it will change. Only sparse gradients are asked.
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse and bool(changes((total := p.grad.coalesce())._values()).any()):
            p.grad = total
    kept = [p for p in params if p.grad is not None and not (p.grad.is_sparse and not p.grad.is_coalesced())]
    return scalable_gradients(kept)
