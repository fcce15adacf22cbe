"""Functions of many tensors with a closed-form gradient, each as a single node of the autograd graph.

One node replaces the several nodes per tensor that autograd would record, and their overhead. Where one node is not enough, as
for second derivatives, plain differentiable operations compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

PlainFunction: TypeAlias = Callable[..., Tensor]
"""Maps tensors to a scalar by differentiable operations."""
ValueFunction: TypeAlias = Callable[..., tuple[Tensor, Any]]
"""Maps tensors to the same scalar quickly, and to intermediate results to save for the gradients."""
GradientFunction: TypeAlias = Callable[..., Sequence[Tensor]]
"""Maps tensors, a scalar factor, and the saved results to the gradient for each tensor, multiplied by the factor."""


def fused(
    plain: PlainFunction, value: ValueFunction, gradients: GradientFunction, params: Sequence[Tensor], **constants: Any
) -> Tensor:
    """Return ``plain(params)``, as one autograd node for a first derivative.

    In compiled code, under the transforms of ``torch.func``, in forward mode, and for higher derivatives, torch differentiates
    ``plain`` itself.

    Args:
        plain: Returns the scalar, by differentiable operations.
        value: Returns the same scalar, and what to save for ``gradients``.
        gradients: Returns the gradient for each tensor, given the tensors, a factor, and what ``value`` saved.
        params: Tensors of any shapes. The value of an empty list is 0.
        constants: Other arguments of the three functions. They get no gradients.

    Returns:
        A scalar.
    """
    if not params:
        return torch.zeros(())
    if is_compiling() or _is_transformed() or forward_ad._current_level >= 0:
        return plain(params, **constants)
    return cast("Tensor", _Fused.apply(plain, value, gradients, constants, *params))  # type: ignore[no-untyped-call]


def _is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` runs."""
    return torch._C._are_functorch_transforms_active()


def _is_batched(grad: Tensor) -> bool:
    """Return whether a factor stands for a batch of factors, as in ``torch.autograd.grad(is_grads_batched=True)``."""
    return _is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plain: PlainFunction,
        value: ValueFunction,
        gradients: GradientFunction,
        constants: dict[str, Any],
        *params: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.plain, ctx.gradients, ctx.constants = plain, gradients, constants
        result, ctx.saved = value(params, **constants)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or _is_batched(grad):  # create_graph=True, or is_grads_batched=True
            found: Sequence[Tensor | None] = _differentiable_gradients(ctx, grad)
        else:
            found = ctx.gradients(ctx.saved_tensors, grad, ctx.saved, **ctx.constants)
        return None, None, None, None, *found


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients times a factor by differentiating the plain function, with a graph if one is asked for."""
    needed, create_graph = ctx.needs_input_grad[4:], torch.is_grad_enabled()
    saved = ctx.saved_tensors if create_graph else [p.detach().requires_grad_() for p in ctx.saved_tensors]
    with torch.enable_grad():
        params = [p.view_as(p) if need else p.detach() for p, need in zip(saved, needed, strict=True)]
        wanted = [p for p, need in zip(params, needed, strict=True) if need]
        value = ctx.plain(params, **ctx.constants)
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph, materialize_grads=True))
    return [next(found) if need else None for need in needed]
