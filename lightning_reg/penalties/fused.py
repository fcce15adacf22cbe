"""A function of many tensors with a gradient in closed form, as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NodeValue: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, Any]]
"""From tensors to a scalar, and to whatever of its making is worth keeping for the gradients."""
NodeGradients: TypeAlias = Callable[[Sequence[Tensor], Tensor, Any], Sequence[Tensor]]
"""From tensors, a scalar and what was kept to a gradient for each tensor, times the scalar."""


def one_node(value: NodeValue, gradients: NodeGradients, params: Sequence[Tensor]) -> Tensor:
    """Return ``value(params)``, differentiated by ``gradients(params, factor, kept)``, the gradients times a factor.

    Args:
        value: From tensors to a scalar, and to what is kept.
        gradients: From tensors, a scalar and what was kept to a gradient for each tensor.
        params: Tensors of any shapes; without any the value is 0.
    """
    return cast("Tensor", _OneNode.apply(value, gradients, *params)) if params else torch.zeros(())  # type: ignore[no-untyped-call]


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: NodeValue, gradients: NodeGradients, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.gradients = gradients
        result, ctx.kept = value(params)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(ctx.saved_tensors, grad, ctx.kept)
