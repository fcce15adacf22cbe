"""Functions of many tensors with a closed-form gradient, each as a single node of the autograd graph.

One node replaces the several nodes per tensor that autograd would record, and their overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ValueFunction: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, Any]]
"""Maps tensors to a scalar, and to intermediate results to save for the gradients."""
GradientFunction: TypeAlias = Callable[[Sequence[Tensor], Tensor, Any], Sequence[Tensor]]
"""Maps tensors, a scalar factor, and the saved results to the gradient for each tensor, multiplied by the factor."""


def fused(value: ValueFunction, gradients: GradientFunction, params: Sequence[Tensor]) -> Tensor:
    """Return ``value(params)`` as one autograd node. Only first derivatives are supported.

    Args:
        value: Returns the scalar, and what to save for ``gradients``.
        gradients: Returns the gradient for each tensor, given the tensors, a factor, and what ``value`` saved.
        params: Tensors of any shapes. The value of an empty list is 0.

    Returns:
        A scalar.
    """
    return cast("Tensor", _Fused.apply(value, gradients, *params)) if params else torch.zeros(())  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: ValueFunction, gradients: GradientFunction, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.gradients = gradients
        result, ctx.saved = value(params)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(ctx.saved_tensors, grad, ctx.saved)
