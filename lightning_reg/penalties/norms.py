"""Penalties on the size of every weight: L1, L2, and both."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg._engine.arguments import NON_NEGATIVE
from lightning_reg._tensors.chunks import CHUNK_ENTRIES, batched_chunks, chunks, sum_entries
from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import sum_scalars, tensor_norms
from lightning_reg._tensors.shards import local_tensors
from lightning_reg.penalties.base import Penalty, Route
from lightning_reg.penalties.fused import one_node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.selection import Params
    from lightning_reg.penalties.fused import NodeGradients, NodeValue
    from lightning_reg.schedules import Value


def l1_penalty(params: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`R(\theta) = \sum_i |\theta_i|` over all entries of all tensors.

    One node in the autograd graph, and one for each large tensor; sums in float32 for half precision. The subgradient at 0
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
    return _few_nodes(_l1_value, _l1_gradients, params)


def l2_penalty(params: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`R(\theta) = \frac{1}{2} \sum_i \theta_i^2` over all entries of all tensors.

    One node in the autograd graph, and one for each large tensor; sums in float32 for half precision.

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
    return _few_nodes(_l2_value, _l2_gradients, params)


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
    gradients = dense_gradients(params)
    for source, buffer, signs, chunk_gradients in batched_chunks(local_tensors(params), gradients):
        torch.sign(source, out=buffer)
        torch._foreach_add_(chunk_gradients, signs, alpha=strength)


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
        torch._foreach_add_(dense_gradients(params), local_tensors(params), alpha=strength)


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

    valid_ranges = {"l1": NON_NEGATIVE, "l2": NON_NEGATIVE}

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
        l1, l2 = self.current["l1"], self.current["l2"]
        return _few_nodes(partial(_elastic_net_value, l1=l1, l2=l2), partial(_elastic_net_gradients, l1=l1, l2=l2), params)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ₁ sign(θ) + λ₂θ."""
        if self.current["l1"]:
            add_l1_gradient_(params, strength * self.current["l1"])
        if self.current["l2"]:
            add_l2_gradient_(params, strength * self.current["l2"])


def _few_nodes(value: NodeValue, gradients: NodeGradients, params: Sequence[Tensor]) -> Tensor:
    """Sum over one node for all small tensors, which saves calls, and one for each large one, whose gradient can go at once."""
    small = [p for p in params if p.numel() <= CHUNK_ENTRIES]
    parts = [*([p] for p in params if p.numel() > CHUNK_ENTRIES), *([small] if small else [])]
    return sum_scalars([one_node(value, gradients, part) for part in parts or [small]])


def _by_norms(params: Sequence[Tensor]) -> bool:
    """Return whether torch's norms do: on the host they keep one running sum, which loses digits over many entries."""
    return not params[0].is_cpu or (len(params) <= _FEW and all(p.numel() <= _SMALL for p in params))


_FEW, _SMALL = 8, 1 << 12
"""Up to how many tensors, of how many entries, norms are exact enough and cheaper than batched_chunks."""


def _l1_value(params: Sequence[Tensor]) -> tuple[Tensor, None]:
    if _by_norms(params):
        return sum_scalars(tensor_norms(params, 1)), None
    return sum_entries(params, torch.abs), None


def _l1_gradients(params: Sequence[Tensor], factor: Tensor, kept: None) -> Sequence[Tensor]:
    if len(params) > 1:
        signs = list(torch._foreach_sign(list(params)))
        torch._foreach_mul_(signs, factor)
        return signs
    gradients = [torch.empty_like(p) for p in params]
    for gradient, p in chain.from_iterable(map(chunks, gradients, params)):
        torch.sign(p, out=gradient).mul_(factor)
    return gradients


def _l2_value(params: Sequence[Tensor]) -> tuple[Tensor, None]:
    if _by_norms(params):
        return sum_scalars(torch._foreach_pow(tensor_norms(params, 2), 2)) / 2, None
    return sum_entries(params, torch.square) / 2, None


def _l2_gradients(params: Sequence[Tensor], factor: Tensor, kept: None) -> Sequence[Tensor]:
    return list(torch._foreach_mul(list(params), factor))


def _elastic_net_value(params: Sequence[Tensor], l1: float, l2: float) -> tuple[Tensor, None]:
    return l1 * _l1_value(params)[0] + l2 * _l2_value(params)[0], None


def _elastic_net_gradients(params: Sequence[Tensor], factor: Tensor, kept: None, l1: float, l2: float) -> Sequence[Tensor]:
    gradients = list(torch._foreach_sign(list(params)))
    torch._foreach_mul_(gradients, l1)
    torch._foreach_add_(gradients, list(params), alpha=l2)
    torch._foreach_mul_(gradients, factor)
    return gradients
