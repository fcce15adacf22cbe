"""Penalties on the size of the weights: L1, L2, both, and the norms of units."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.configuration import NON_NEGATIVE
from lightning_reg.penalties.base import Penalty, Route
from lightning_reg.penalties.fused import one_node
from lightning_reg.tensors import accumulated_norms, dense_gradients, in_pieces, local, whole
from lightning_reg.units import Units, local_unit_norms, unit_norms, unit_size, unit_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.schedules import Value
    from lightning_reg.selection import Params

__all__ = [
    "ElasticNetPenalty",
    "GroupLassoPenalty",
    "L1Penalty",
    "L2Penalty",
    "add_group_lasso_gradient_",
    "add_l1_gradient_",
    "add_l2_gradient_",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
]


def l1_penalty(params: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`R(\theta) = \sum_i |\theta_i|` over all entries of all tensors.

    One node in the autograd graph whatever the number of tensors; sums in float32 for half precision. The subgradient at 0
    is 0.

    Args:
        params: Tensors of any shapes.

    Returns:
        A scalar; its gradient with respect to each tensor is the sign of the tensor.

    Example:
        >>> theta = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
        >>> l1_penalty([theta]).backward()
        >>> theta.grad
        tensor([ 1., -1.,  0.])

    Reference:
        R. Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    """
    return one_node(_l1_value, _l1_gradients, params)


def l2_penalty(params: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`R(\theta) = \frac{1}{2} \sum_i \theta_i^2` over all entries of all tensors.

    One node in the autograd graph whatever the number of tensors; sums in float32 for half precision.

    Args:
        params: Tensors of any shapes.

    Returns:
        A scalar; its gradient with respect to each tensor is the tensor itself.

    Example:
        >>> theta = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> l2_penalty([theta])
        tensor(2.5000, grad_fn=<_OneNodeBackward>)

    Reference:
        A. E. Hoerl, R. W. Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", 1970.
    """
    return one_node(_l2_value, _l2_gradients, params)


@torch.no_grad()
def add_l1_gradient_(params: Sequence[Tensor], strength: float) -> None:
    r"""Add the gradient of :math:`\lambda \sum_i |\theta_i|`, which is :math:`\lambda\,\mathrm{sign}(\theta)`, to ``.grad``.

    Args:
        params: Tensors; where there is no gradient yet, one is made.
        strength: λ.

    Example:
        >>> theta = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
        >>> add_l1_gradient_([theta], strength=0.5)
        >>> theta.grad
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    for gradients, tensors in in_pieces(dense_gradients(params), [local(p) for p in params]):
        torch._foreach_add_(gradients, torch._foreach_sign(tensors), alpha=strength)


@torch.no_grad()
def add_l2_gradient_(params: Sequence[Tensor], strength: float) -> None:
    r"""Add the gradient of :math:`\frac{\lambda}{2} \sum_i \theta_i^2`, which is :math:`\lambda\,\theta`, to ``.grad``.

    Args:
        params: Tensors; where there is no gradient yet, one is made.
        strength: λ.

    Example:
        >>> theta = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> add_l2_gradient_([theta], strength=0.5)
        >>> theta.grad
        tensor([ 0.5000, -1.0000])
    """
    if params:
        torch._foreach_add_(dense_gradients(params), [local(p) for p in params], alpha=strength)


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
    for p, gradient, u in zip(params, dense_gradients(params), layout, strict=True):
        unit_view(gradient, u).addcmul_(unit_view(p, u), _group_lasso_factors(p, u), value=strength)


class L1Penalty(Penalty):
    r"""Lasso: :math:`J = L + \lambda \sum_i |\theta_i|`.

    Runs in: ``on_before_backward`` (loss route) or ``on_before_optimizer_step`` (gradient route), once per optimizer step.

    It pulls every weight towards zero by the same force. Steps of the subgradient hover around zero and do not stay there: for
    exact zeros a proximal step is needed.

    Args:
        strength: λ ≥ 0, or a schedule. Typical: 1e-5 to 1e-3 for a mean loss.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"``, ``"gradient"`` (no graph: for large models), or ``"auto"``: the loss wherever that is exact.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing, or a route that cannot be exact.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[L1Penalty(1e-4)], logger=False)

    Reference:
        R. Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    """

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return Σ|θ|."""
        return l1_penalty(params)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ sign(θ)."""
        add_l1_gradient_(params, strength)


class L2Penalty(Penalty):
    r"""Ridge: :math:`J = L + \frac{\lambda}{2} \sum_i \theta_i^2`.

    Runs in: ``on_before_backward`` (loss route) or ``on_before_optimizer_step`` (gradient route), once per optimizer step.

    The gradient is λθ, so under SGD it equals ``weight_decay=λ``, on the gradient route to the last bit. Texts that leave out
    the ½ need twice their λ here; for the norm that is not squared, :math:`\lambda \|\theta\|`, write a :class:`Penalty`.
    Under Adam it is not the decoupled decay of AdamW: there the gradient of the penalty is rescaled like any other.

    Args:
        strength: λ ≥ 0, or a schedule. Typical: 1e-5 to 1e-2.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"``, ``"gradient"`` (no graph: for large models), or ``"auto"``: the loss wherever that is exact.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing, or a route that cannot be exact.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[L2Penalty(1e-3, params=["weights", "!head.*"])], logger=False)

    Reference:
        A. E. Hoerl, R. W. Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", 1970.
    """

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return ½Σθ²."""
        return l2_penalty(params)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λθ."""
        add_l2_gradient_(params, strength)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, choose the route, and warn of a second decay."""
        super().attach(trainer, pl_module)
        self.warn_of_second_decay(trainer)


class ElasticNetPenalty(Penalty):
    r"""L1 and L2 together: :math:`J = L + \lambda_1 \sum_i |\theta_i| + \frac{\lambda_2}{2} \sum_i \theta_i^2`.

    Runs in: ``on_before_backward`` (loss route) or ``on_before_optimizer_step`` (gradient route), once per optimizer step.

    scikit-learn's ``ElasticNet(alpha, l1_ratio)`` is ``l1 = alpha * l1_ratio`` and ``l2 = alpha * (1 - l1_ratio)`` for half the
    mean squared error.

    Args:
        l1: λ₁ ≥ 0, or a schedule.
        l2: λ₂ ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"``, ``"gradient"`` (no graph: for large models), or ``"auto"``: the loss wherever that is exact.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing, or a route that cannot be exact.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ElasticNetPenalty(1e-4, 1e-3)], logger=False)

    Reference:
        H. Zou, T. Hastie, "Regularization and Variable Selection via the Elastic Net", 2005.
    """

    limits = {"l1": NON_NEGATIVE, "l2": NON_NEGATIVE}

    def __init__(
        self,
        l1: Value,
        l2: Value,
        *,
        params: Params = "weights",
        inject: Route = "auto",
        name: str | None = None,
    ) -> None:
        self.l1 = l1
        self.l2 = l2
        super().__init__(1.0, params=params, inject=inject, name=name)

    @property
    def scale(self) -> float:
        """1, or 0 where both strengths are."""
        return float(bool(self.current["l1"] or self.current["l2"]))

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return λ₁Σ|θ| + λ₂/2 Σθ²."""
        return self.current["l1"] * l1_penalty(params) + self.current["l2"] * l2_penalty(params)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ₁ sign(θ) + λ₂θ."""
        if self.current["l1"]:
            add_l1_gradient_(params, strength * self.current["l1"])
        if self.current["l2"]:
            add_l2_gradient_(params, strength * self.current["l2"])


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

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return Σ √|g| ‖w_g‖."""
        return group_lasso_penalty(params, self.units(params))

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ √|g| w_g / ‖w_g‖."""
        add_group_lasso_gradient_(params, strength, self.units(params))


def _l1_value(params: Sequence[Tensor]) -> Tensor:
    return torch.stack(accumulated_norms(params, 1)).sum()


def _l1_gradients(params: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    gradients = list(torch._foreach_sign(list(params)))
    torch._foreach_mul_(gradients, factor)
    return gradients


def _l2_value(params: Sequence[Tensor]) -> Tensor:
    return torch.stack(accumulated_norms(params, 2)).square().sum() / 2


def _l2_gradients(params: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    return list(torch._foreach_mul(list(params), factor))


def _group_lasso_value(params: Sequence[Tensor], units: Sequence[Units]) -> Tensor:
    sums = [whole(unit_norms(p, u).sum()) * unit_size(p, u) ** 0.5 for p, u in zip(params, units, strict=True)]
    return torch.stack(sums).sum()


def _group_lasso_factors(p: Tensor, units: Units) -> Tensor:
    """Return √|g| / ‖w_g‖ for each unit, and 0 for a unit that is zero."""
    norms = local_unit_norms(p, units)
    return torch.where(norms > 0, unit_size(p, units) ** 0.5 / norms, 0.0).to(p.dtype)


def _group_lasso_gradients(params: Sequence[Tensor], factor: Tensor, units: Sequence[Units]) -> Sequence[Tensor]:
    scaled = [unit_view(p, u) * (_group_lasso_factors(p, u) * factor.to(p.dtype)) for p, u in zip(params, units, strict=True)]
    return [gradient.view_as(p) for gradient, p in zip(scaled, params, strict=True)]
