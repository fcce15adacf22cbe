"""Penalties on the norm of whole groups of weights: the output units."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import sum_scalars
from lightning_reg._tensors.shards import full_tensor
from lightning_reg._tensors.units import Units, local_unit_norms, unit_norms, unit_size, unit_view
from lightning_reg.penalties.base import Penalty
from lightning_reg.penalties.fused import one_node

if TYPE_CHECKING:
    from collections.abc import Sequence


def group_lasso_penalty(params: Sequence[Tensor], units: Sequence[Units] | None = None) -> Tensor:
    r"""Return :math:`R(w) = \sum_g \sqrt{|g|}\,\|w_g\|_2` over the output units of all tensors.

    Args:
        params: Tensors of any shapes.
        units: Where each tensor keeps its output units; by default in dimension 0.

    Returns:
        A scalar; its gradient is :math:`\sqrt{|g|}\,w_g / \|w_g\|`, and 0 for a unit that is zero.

    Example:
        >>> group_lasso_penalty([torch.tensor([[3.0, 4.0], [0.0, 0.0]])])
        tensor(7.0711)

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """
    layout = list(units or [Units()] * len(params))
    return one_node(partial(_group_lasso_value, units=layout), partial(_group_lasso_gradients, units=layout), params)


@torch.no_grad()
def add_group_lasso_gradient_(params: Sequence[Tensor], strength: float, units: Sequence[Units] | None = None) -> None:
    r"""Add the gradient of :math:`\lambda \sum_g \sqrt{|g|}\,\|w_g\|_2` to ``.grad``.

    Args:
        params: Tensors; where there is no gradient yet, one is made.
        strength: λ.
        units: Where each tensor keeps its output units; by default in dimension 0.

    Example:
        >>> theta = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
        >>> add_group_lasso_gradient_([theta], strength=0.5**0.5)
        >>> theta.grad
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    layout = units or [Units()] * len(params)
    dense_gradients(params)
    for p, u in zip(params, layout, strict=True):
        assert p.grad is not None, "made dense"
        unit_view(p.grad, u).addcmul_(unit_view(p, u), _group_lasso_factors(local_unit_norms(p, u), p, u), value=strength)


class GroupLassoPenalty(Penalty):
    r"""Group lasso: :math:`J = L + \lambda \sum_g \sqrt{|g|}\,\|w_g\|_2`, a group for each output unit.

    Runs in: ``on_before_backward`` (loss route) or ``on_before_optimizer_step`` (gradient route), once per optimizer step.

    It pulls whole units towards zero: rows of a linear layer, filters of a convolution (dimension 1 where it is transposed),
    vectors of an embedding. As with L1, exact zeros need a proximal step: :class:`~lightning_reg.GroupSoftThresholding`.

    Args:
        strength: λ ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"``, ``"gradient"`` (no graph: for large models), or ``"auto"``: the loss wherever that is exact.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing, or a route that cannot be exact.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GroupLassoPenalty(1e-4)], logger=False)

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006; for units: W. Wen et al.,
        "Learning Structured Sparsity in Deep Neural Networks", 2016.
    """

    supports_fsdp1 = False

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return Σ √|g| ‖w_g‖."""
        return group_lasso_penalty(params, self.units(params))

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ √|g| w_g / ‖w_g‖."""
        add_group_lasso_gradient_(params, strength, self.units(params))


def _group_lasso_value(params: Sequence[Tensor], units: Sequence[Units]) -> tuple[Tensor, list[Tensor]]:
    norms = [unit_norms(p, u) for p, u in zip(params, units, strict=True)]
    sums = [full_tensor(norm.sum()) * unit_size(p, u) ** 0.5 for norm, p, u in zip(norms, params, units, strict=True)]
    return sum_scalars(sums), norms


def _group_lasso_factors(norms: Tensor, p: Tensor, units: Units) -> Tensor:
    """Return √|g| / ‖w_g‖ for each unit, in float32 or better, and 0 for a unit of zeros."""
    inverse = norms.clamp(min=torch.finfo(norms.dtype).tiny).reciprocal_()
    return inverse.mul_(unit_size(p, units) ** 0.5).masked_fill_(norms == 0, 0.0)


def _group_lasso_gradients(
    params: Sequence[Tensor], factor: Tensor, norms: Sequence[Tensor], units: Sequence[Units]
) -> Sequence[Tensor]:
    factors = [_group_lasso_factors(norm, p, u).mul_(factor) for norm, p, u in zip(norms, params, units, strict=True)]
    return [(unit_view(p, u) * f).view_as(p).to(p.dtype) for p, u, f in zip(params, units, factors, strict=True)]
