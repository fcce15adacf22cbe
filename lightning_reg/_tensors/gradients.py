"""Lists of gradients, in forms that can be added to or scaled."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, TypeGuard, cast

import torch

from lightning_reg._tensors.shards import local_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each gradient, to add to. Missing gradients become zeros, sparse ones become dense."""
    gradients = [p.grad for p in params]
    if not are_dense(gradients):
        for p in params:
            p.grad = _zero_gradient(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
        gradients = [p.grad for p in params]
    return local_tensors(cast("list[Tensor]", gradients))


def are_dense(gradients: Sequence[Tensor | None]) -> TypeGuard[list[Tensor]]:
    """Return whether all gradients exist, and none is sparse."""
    return type(None) not in set(map(type, gradients)) and not any(map(attrgetter("is_sparse"), gradients))


def summed_entries(gradient: Tensor) -> Tensor:
    """Return a dense gradient itself, and the values of a sparse one, summed over equal indices."""
    return gradient.coalesce()._values() if gradient.is_sparse else gradient


def _zero_gradient(p: Tensor) -> Tensor:
    """Return zeros in the dtype that the gradient of a tensor must have."""
    dtype = getattr(p, "grad_dtype", None) if p.is_leaf else None
    return torch.zeros_like(p, dtype=dtype or p.dtype)


def existing_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that exist and have entries, to read. A sparse one yields values, summed over equal indices."""
    gradients = [summed_entries(p.grad) for p in params if p.grad is not None]
    return [gradient for gradient in gradients if gradient.numel()]


def scalable_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the same gradients, to scale in place. A sparse one yields its raw values, so that a factor of 1 is a no-op.

    Summing the values of equal indices would change the last bits of what an optimizer does with them.
    """
    gradients = [p.grad._values() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
    return [gradient for gradient in gradients if gradient.numel()]


def changeable_gradients(params: Sequence[Tensor], changes: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients that an elementwise function may change in place.

    The values of equal indices of a sparse gradient are summed first, but only if that gradient will change.

    Args:
        params: Tensors.
        changes: Returns for each entry of a gradient whether it will change. Called only for sparse gradients.
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse and bool(changes((total := p.grad.coalesce())._values()).any()):
            p.grad = total
    kept = [p for p in params if p.grad is not None and not (p.grad.is_sparse and not p.grad.is_coalesced())]
    return scalable_gradients(kept)
