"""A function of many tensors with a gradient in closed form, as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["NodeGradients", "NodeValue", "one_node"]

NodeValue: TypeAlias = Callable[[Sequence[Tensor]], Tensor]
"""From tensors to a scalar."""
NodeGradients: TypeAlias = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]
"""From tensors and a scalar to a gradient for each of them, times the scalar."""


def one_node(value: NodeValue, gradients: NodeGradients, params: Sequence[Tensor]) -> Tensor:
    """Return ``value(params)``, differentiated by ``gradients(params, factor)``, the gradients times a factor.

    Args:
        value: From tensors to a scalar.
        gradients: From tensors and a scalar to a gradient for each of them.
        params: Tensors of any shapes; without any the value is 0.
    """
    return cast("Tensor", _OneNode.apply(value, gradients, *params)) if params else torch.zeros(())  # type: ignore[no-untyped-call]


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: NodeValue, gradients: NodeGradients, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.gradients = gradients
        return value(params)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(ctx.saved_tensors, grad)
