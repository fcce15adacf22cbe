"""Sums of squares of parameters, their gradients, and their updates, and the norms of the gradients of penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.steps import by_sign
from lightning_reg._tensors.chunks import chunks
from lightning_reg._tensors.reductions import accumulation_dtype
from lightning_reg._tensors.shards import local_tensor, sum_over_shards

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg.penalties.base import Penalty


SMALL = 1 << 16
"""The most entries of a tensor that is measured together with others."""


def sum_of_squares(gradients: Iterable[Tensor]) -> Tensor:
    """Return Σ|g|² over this rank's part of gradients.

    Example:
        >>> sum_of_squares([torch.tensor([3.0, 4.0])])
        tensor(25.)
    """
    total = torch.zeros(())
    for gradient in gradients:
        local = gradient.coalesce()._values() if gradient.is_sparse else local_tensor(gradient)
        for (part,) in chunks(local):
            square = _square(part)
            total = square + total.to(square)
    return total


def update_sums(before: Tensor, after: Tensor) -> list[Tensor]:
    """Return Σ|θ_after|², Σ|θ_after − θ_before|², and the number of zeros after an update.

    Args:
        before: A copy of the weights, which is overwritten.
        after: The weights.

    Example:
        >>> [float(total) for total in update_sums(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))]
        [1.0, 4.0, 1.0]
    """
    totals: list[Tensor] | None = None
    for old, new in chunks(before, after):
        square = _square(new)
        sums = [square, _square(old.sub_(new)), _zeros(new, old).to(square)]
        totals = sums if totals is None else [total + one for total, one in zip(totals, sums, strict=True)]
    assert totals is not None, "there is at least one chunk"
    return totals


def squares_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return Σ|x|² of each tensor, of small ones in one call.

    Example:
        >>> squares_of_each([torch.tensor([3.0, 4.0]), torch.tensor([2.0])])
        [tensor(25.), tensor(4.)]
    """
    small = [tensor for tensor in tensors if _is_small(tensor)]
    squares = iter((torch.stack(torch._foreach_norm(small)) ** 2).unbind() if small else ())
    return [next(squares) if _is_small(tensor) else sum_of_squares([tensor]) for tensor in tensors]


def copy_with_squares(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors, and return Σ|x|² of each, taken while its entries are in the cache.

    Example:
        >>> copy_with_squares([torch.zeros(2)], [torch.tensor([3.0, 4.0])])
        [tensor(25.)]
    """
    pairs = list(zip(copies, tensors, strict=True))
    if small := [pair for pair in pairs if _is_small(pair[1])]:
        torch._foreach_copy_([copy for copy, _ in small], [tensor for _, tensor in small])
    squares = iter(squares_of_each([copy for copy, _ in small]))
    return [next(squares) if _is_small(tensor) else _copied_square(copy, tensor) for copy, tensor in pairs]


def _copied_square(copy: Tensor, tensor: Tensor) -> Tensor:
    total = torch.zeros((), device=tensor.device)
    for target, source in chunks(copy, tensor):
        square = _square(target.copy_(source))
        total = square + total.to(square)
    return total


def update_sums_of_each(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Return ``update_sums`` of each pair of tensors as one tensor, of small ones in a few calls. ``before`` is overwritten."""
    is_small = [_is_small(old) and _is_small(new) for old, new in zip(before, after, strict=True)]
    old, new = ([tensor for tensor, small in zip(given, is_small, strict=True) if small] for given in (before, after))
    rows = iter(_sums_of_small(old, new).unbind() if old else ())
    pairs = zip(before, after, is_small, strict=True)
    return [next(rows) if small else torch.stack(update_sums(one, other)) for one, other, small in pairs]


def _sums_of_small(before: list[Tensor], after: list[Tensor]) -> Tensor:
    torch._foreach_sub_(before, after)
    new, change = (torch.stack(torch._foreach_norm(tensors)) for tensors in (after, before))
    return torch.stack([new**2, change**2, _zeros_of_each(after)], 1)


def _zeros_of_each(tensors: Sequence[Tensor]) -> Tensor:
    """Return the number of zeros of each tensor. Those of one shape are counted together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(index)
    counts = torch.empty(len(tensors), device=tensors[0].device, dtype=tensors[0].dtype)
    for indices in by_shape.values():
        stacked = torch.stack([tensors[index] for index in indices])
        zeros = (stacked == 0).flatten(1).sum(1) if stacked.ndim > 1 else (stacked == 0)
        counts[torch.tensor(indices, device=counts.device)] = zeros.to(counts)
    return counts


def relative_norms(penalties: Sequence[Penalty], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return for each penalty the norm of its gradient, relative to that of the data's gradient. Gradients are not changed.

    Args:
        penalties: The penalties of a fit.
        optimizer: The optimizer that is about to step. Its gradients contain the penalties that are part of the loss.
    """
    added: dict[int, Tensor] = {}  # what penalties in the loss have added to each gradient
    norms: dict[str, Tensor] = {}
    params = {penalty.name: penalty.parameters_of(optimizer) for penalty in penalties}
    for penalty in penalties:
        gradients = _gradients_of(penalty, params[penalty.name], optimizer)
        if gradients:
            norms[penalty.name] = _norm(gradients, params[penalty.name])
        if penalty.adds_to_loss:
            for p, gradient in zip(params[penalty.name], gradients, strict=False):
                added[id(p)] = added[id(p)] + gradient if id(p) in added else gradient
    for name, norm in norms.items():
        norms[name] = norm / _norm([_of_data(p, added.get(id(p))) for p in params[name]], params[name])
    return norms


def _gradients_of(penalty: Penalty, params: Sequence[Parameter], optimizer: Optimizer) -> list[Tensor]:
    """Return this rank's part of the gradient of a penalty."""
    if not params or not penalty.scale:
        return []
    kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = torch.zeros_like(p)
        for sign, signed in by_sign(optimizer, params).items():
            if signed:
                penalty.add_gradient_(signed, sign * penalty.scale)
        return [local_tensor(p.grad) for p in params if p.grad is not None]
    finally:
        for p, gradient in zip(params, kept, strict=True):
            p.grad = gradient


def _of_data(p: Parameter, added: Tensor | None) -> Tensor:
    """Return this rank's part of the gradient of the data: the gradient without what penalties have added."""
    if p.grad is None:
        gradient = torch.zeros_like(local_tensor(p.detach()))
    else:
        gradient = local_tensor(p.grad.to_dense() if p.grad.is_sparse else p.grad).detach()
    return gradient if added is None else gradient - added


def _norm(gradients: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the norm of gradients over all shards of their parameters."""
    squares = [sum_over_shards(sum_of_squares([g]).to(g.device), p) for g, p in zip(gradients, params, strict=True)]
    return torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()


def _zeros(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return the number of zeros; the buffer is overwritten."""
    if tensor.dtype is torch.float32:
        return torch.eq(tensor, 0, out=buffer).sum()  # twice as fast as counting, and exact for the entries of a chunk
    return tensor.numel() - torch.count_nonzero(tensor)


def _is_small(tensor: Tensor) -> bool:
    """Return whether a tensor has few entries, so that one sum in float32 is exact enough, and calls cost more than memory."""
    return tensor.dtype is torch.float32 and 0 < tensor.numel() <= SMALL and tensor.layout is torch.strided


def _square(tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous():
        return torch.dot(tensor.view(-1), tensor.view(-1))  # faster than a norm
    dtype = None if tensor.is_complex() else accumulation_dtype(tensor.dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm * norm
