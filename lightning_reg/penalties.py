"""Penalties: terms of the training objective that depend on the weights, J = L + λ R(θ)."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_reg import host
from lightning_reg.base import Phase
from lightning_reg.configuration import NON_NEGATIVE
from lightning_reg.parameters import ParameterRegularizer
from lightning_reg.tensors import accumulated_norms, dense_gradients, local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Parameter

    from lightning_reg.schedules import Value
    from lightning_reg.selection import Params

__all__ = ["L1Penalty", "L2Penalty", "Penalty", "add_l1_gradient_", "add_l2_gradient_", "l1_penalty", "l2_penalty"]


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
    return _L1.apply(*params) if params else torch.zeros(())  # type: ignore[no-untyped-call]


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
        tensor(2.5000, grad_fn=<_L2Backward>)

    Reference:
        A. E. Hoerl, R. W. Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", 1970.
    """
    return _L2.apply(*params) if params else torch.zeros(())  # type: ignore[no-untyped-call]


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
    if params:
        torch._foreach_add_(dense_gradients(params), torch._foreach_sign([local(p) for p in params]), alpha=strength)


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


class Penalty(ParameterRegularizer):
    r"""Base of all penalties: adds :math:`\lambda R(\theta)` to the training objective.

    Runs in: ``on_before_backward`` or ``on_before_optimizer_step``, once per optimizer step however many batches it
    accumulates. The loss that the module logs does not contain it.

    A subclass gives ``value``, differentiable; ``add_gradient_`` is optional and spares the gradient route a graph.

    Args:
        strength: λ ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss, ``"gradient"`` its gradient to ``.grad``; ``"auto"`` is ``"loss"``
            wherever that is exact, else ``"gradient"`` (manual optimization, sharded parameters, DDP that looks for unused
            parameters).
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing, or a route that cannot be exact.

    Example:
        >>> class LogPenalty(Penalty):  # Σ log(1 + θ²), which pulls small weights to zero and leaves large ones alone
        ...     def value(self, params):
        ...         return sum(p.square().log1p().sum() for p in params)
        >>> LogPenalty(1e-3, params="head.*")
        LogPenalty(0.001, params='head.*')
    """

    phase = Phase.PENALTY
    limits = {"strength": NON_NEGATIVE}
    instead_of_deepspeed = "add the penalty to the loss in training_step, or use DDP or FSDP2"

    def __init__(
        self,
        strength: Value,
        *,
        params: Params = "weights",
        inject: Literal["auto", "loss", "gradient"] = "auto",
        name: str | None = None,
    ) -> None:
        if inject not in ("auto", "loss", "gradient"):
            raise ValueError(f"{type(self).__name__}: inject must be 'auto', 'loss' or 'gradient', got {inject!r}")
        self.strength = strength
        self.inject = inject
        super().__init__(params, name)
        self._to_loss = False

    @abstractmethod
    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return R(θ) as a differentiable scalar."""

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ ∇R(θ) to the gradients; by default it is found by differentiating ``value`` alone."""
        with torch.enable_grad():
            found = torch.autograd.grad(strength * self.value(params), params, allow_unused=True)
        for gradient, addend in zip(dense_gradients(params), found, strict=True):
            if addend is not None:
                gradient.add_(local(addend))

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up and choose the route."""
        super().attach(trainer, pl_module)
        obstacle = self._obstacle(trainer, pl_module)
        if self.inject == "loss" and obstacle:
            raise ValueError(f"{self.name}: inject='loss' is not exact {obstacle}; use inject='gradient' or 'auto'")
        self._to_loss = self.inject != "gradient" and obstacle is None
        self.in_loss = self._to_loss
        if not self._to_loss:
            self.require_unscaled_gradients(trainer)

    def _obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Say why the loss route would not be exact, if it would not."""
        if not pl_module.automatic_optimization:
            return "in manual optimization, where a loss may be for any of the optimizers"
        if host.shards(trainer, self.tensors.values()):
            return "for sharded parameters"
        if host.tracks_used_parameters(trainer):
            return "under DDP with find_unused_parameters or static_graph"
        return None

    @property
    def adds_to_loss(self) -> bool:
        """Whether it takes the loss route in this fit."""
        return self._to_loss

    def loss_term(self, params: list[Parameter]) -> Tensor | None:
        """Return λ R(θ), or ``None`` where λ is 0."""
        if not self.current["strength"]:
            return None
        term = self.current["strength"] * self.value(params)
        if self.logging:
            self.observe(penalty=term.detach())
        return term

    def gradients(self, params: list[Parameter]) -> None:
        """Add λ ∇R(θ), unless this step's loss has had its term."""
        strength = self.current["strength"]
        if self.in_loss or not strength:
            return
        self.add_gradient_(params, strength)
        if self.logging:
            self.observe(penalty=strength * self.value(params))

    def route(self) -> str:
        """Return the route that was taken."""
        return "loss" if self._to_loss else "gradient"


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
        selected = {id(p) for p in self.tensors.values()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        decays = {g["weight_decay"] for g in groups if g.get("weight_decay") and any(id(p) in selected for p in g["params"])}
        if decays:
            rank_zero_warn(
                f"{self.name} acts on parameters that the optimizer decays too (weight_decay={', '.join(map(str, decays))}): "
                "both shrink them. Set weight_decay=0, or leave the penalty out."
            )


class _L1(torch.autograd.Function):
    """Σ|θ| with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        return torch.stack(accumulated_norms(params, 1)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gradients = torch._foreach_sign(ctx.saved_tensors)
        torch._foreach_mul_(gradients, grad)
        return tuple(gradients)


class _L2(torch.autograd.Function):
    """½Σθ² with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        return torch.stack(accumulated_norms(params, 2)).square().sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_mul(ctx.saved_tensors, grad))
