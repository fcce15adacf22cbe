"""A penalty on the norms of whole groups of weights: output units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg._engine.tensor_arguments import tensor_list, units_list
from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import accumulation_dtype, is_cpu, sum_scalars
from lightning_reg._tensors.shards import full_tensor, local_tensor
from lightning_reg._tensors.units import Units, local_unit_norms, smooth_unit_norms, unit_size, unit_view, wide_unit_norms
from lightning_reg.penalties.elementwise import ElementwisePenalty
from lightning_reg.penalties.fused import fused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg._engine.tensor_arguments import Tensors


def group_lasso_penalty(params: Tensors, units: Units | Sequence[Units] | None = None) -> Tensor:
    """Return R(w) = Σ √n ‖w_u‖₂ over the output units u of all tensors, each with n entries.

    Args:
        params: Tensors of any shapes.
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.

    Returns:
        A scalar. Its gradient is √n · w_u / ‖w_u‖ for each unit. All derivatives are 0 for a unit of zeros. Higher derivatives,
        ``torch.func``, and ``torch.compile`` work too.

    Example:
        >>> group_lasso_penalty([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])
        tensor(7.0711)

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """
    params = tensor_list("group_lasso_penalty: params", params)
    layouts = units_list("group_lasso_penalty", units, params)
    return fused(_plain_group_lasso, _group_lasso_value, _group_lasso_gradients, params, layouts=layouts)


@torch.no_grad()
def add_group_lasso_gradient_(params: Tensors, strength: float, units: Units | Sequence[Units] | None = None) -> None:
    """Add the gradient of λ Σ √n ‖w_u‖₂ to ``.grad``: g_u ← g_u + λ √n · w_u / ‖w_u‖ for each output unit u of n entries.

    The gradient of a unit of zeros is 0.

    Args:
        params: Tensors. A missing ``.grad`` counts as zeros and is created.
        strength: The strength λ.
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.

    Example:
        >>> theta = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
        >>> add_group_lasso_gradient_([theta], strength=0.5**0.5)
        >>> theta.grad
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    params = tensor_list("add_group_lasso_gradient_: params", params)
    layouts = units_list("add_group_lasso_gradient_", units, params)
    dense_gradients(params)
    for p, layout in zip(params, layouts, strict=True):
        assert p.grad is not None, "dense_gradients creates it"
        factors = _group_lasso_factors(local_unit_norms(p, layout), p, layout)
        unit_view(p.grad, layout).addcmul_(unit_view(p, layout), factors, value=strength)


class GroupLassoPenalty(ElementwisePenalty):
    """Group lasso: J = L + λ Σ √n ‖w_u‖₂ over all output units u, each with n entries.

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    Pulls whole units toward zero. A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is
    transposed), or the vector of a token in an embedding.
    Gradient steps leave weights near zero, not exactly at it. For exact zeros, use ``GroupSoftThresholding``.
    Works with sharded parameters (FSDP2), but not with FSDP1.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``, without an autograd
            graph, for large models. ``"auto"`` uses the loss wherever that is exact, and the gradients otherwise.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, ``inject="loss"`` is not exact in this run, the
            penalty is added to the gradients of a fused optimizer under float16 loss scaling, or FSDP1 has flattened the
            parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GroupLassoPenalty(1e-4)], logger=False)

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006. For output units:
        W. Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016.
    """

    supports_fsdp1 = False

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return Σ √n ‖w_u‖₂."""
        return group_lasso_penalty(params, self.units(params))

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ √n · w_u / ‖w_u‖."""
        add_group_lasso_gradient_(params, strength, self.units(params))

    def entry_gradients(self, weights: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
        """Return w_u multiplied with √n / ‖w_u‖."""
        return torch.mul(weights, *constants, out=out)

    @torch.no_grad()
    def entry_constants(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return √n / ‖w_u‖ of the unit of each entry."""
        return [_expanded_factors(p, layout) for p, layout in zip(params, self.units(params), strict=True)]


def _plain_group_lasso(params: Sequence[Tensor], layouts: Sequence[Units]) -> Tensor:
    pairs = zip(params, layouts, strict=True)
    return sum_scalars([full_tensor(smooth_unit_norms(p, layout).sum()) * unit_size(p, layout) ** 0.5 for p, layout in pairs])


def _group_lasso_value(params: Sequence[Tensor], layouts: Sequence[Units]) -> tuple[Tensor, list[Tensor]]:
    norms = [wide_unit_norms(p, layout) for p, layout in zip(params, layouts, strict=True)]
    sums = [
        full_tensor(norm.sum()) * unit_size(p, layout) ** 0.5 for norm, p, layout in zip(norms, params, layouts, strict=True)
    ]
    return sum_scalars(sums).to(accumulation_dtype(params[0].dtype).to_real()), norms


def _group_lasso_factors(norms: Tensor, p: Tensor, layout: Units) -> Tensor:
    """Return √n / ‖w_u‖ for each unit, in float32 or better, and 0 for a unit of zeros."""
    if not is_cpu(norms):  # where float64 is slow, weights below the normal range of float32 need not be exact
        norms = norms.to(accumulation_dtype(p.dtype).to_real())
    inverse = norms.clamp(min=torch.finfo(norms.dtype).tiny).reciprocal_()
    return inverse.mul_(unit_size(p, layout) ** 0.5).masked_fill_(norms == 0, 0.0)


def _expanded_factors(p: Tensor, layout: Units) -> Tensor:
    """Return the factor of each entry of this rank's part, in the shape of that part."""
    view = unit_view(p, layout)
    factors = _group_lasso_factors(local_unit_norms(p, layout), p, layout).expand(view.shape)
    return factors if layout.groups == 1 else factors.reshape(local_tensor(p).shape)


def _group_lasso_gradients(
    params: Sequence[Tensor], factor: Tensor, norms: Sequence[Tensor], layouts: Sequence[Units]
) -> Sequence[Tensor]:
    gradients = []
    for p, norm, layout in zip(params, norms, layouts, strict=True):
        factors = _group_lasso_factors(norm, p, layout).mul_(factor)
        gradients.append((unit_view(p, layout) * factors).view_as(p).to(p.dtype))
    return gradients
