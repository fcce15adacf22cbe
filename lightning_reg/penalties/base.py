"""What every penalty does: take the route on which it is exact, and act once in each optimizer step."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import NON_NEGATIVE, check_choice
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import is_cpu, sum_scalars
from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value

Route = Literal["auto", "loss", "gradient"]
"""How a penalty reaches the gradients: through the loss, by itself, or through the loss wherever that is exact."""


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
    valid_ranges = {"strength": NON_NEGATIVE}
    deepspeed_alternative = "add the penalty to the loss in training_step, or use DDP or FSDP2"

    def __init__(
        self,
        strength: Value,
        *,
        params: Params = "weights",
        inject: Route = "auto",
        name: str | None = None,
    ) -> None:
        check_choice(f"{type(self).__name__}: inject", inject, ("auto", "loss", "gradient"))
        self.strength = strength
        self.inject = inject
        super().__init__(params, name)
        self._to_loss = False
        self._terms: dict[int, Tensor] = {}

    @abstractmethod
    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return R(θ) as a differentiable scalar."""

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ ∇R(θ) to the gradients; by default it is found by differentiating ``value`` alone.

        ``value`` is then given whole tensors, which sharded parameters are gathered to.
        """
        full_tensors = [full_tensor(p.detach()).requires_grad_() for p in params]
        with torch.enable_grad():
            found = torch.autograd.grad(strength * self._checked(full_tensors), full_tensors, allow_unused=True)
        for p, gradient, addend in zip(params, dense_gradients(params), found, strict=True):
            if addend is not None:
                gradient.add_(local_tensor(shard_like(addend, p)))

    @property
    def scale(self) -> float:
        """What the value is multiplied by."""
        return self.current["strength"]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up and choose the route."""
        super().attach(trainer, pl_module)
        self._terms.clear()
        obstacle = self._obstacle(trainer, pl_module)
        if self.inject == "loss" and obstacle:
            raise ValueError(f"{self.name}: inject='loss' is not exact {obstacle}; use inject='gradient' or 'auto'")
        self._to_loss = self.inject != "gradient" and obstacle is None
        if not self._to_loss:
            self.require_unscaled_gradients(trainer)

    def _obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Say why the loss route would not be exact, if it would not."""
        if not pl_module.automatic_optimization:
            return "in manual optimization, where a loss may be for any of the optimizers and may forbid changes in place"
        if _lightning.has_shards(trainer, self.tensors.values()):
            return "for sharded parameters"
        if _lightning.ddp_tracks_parameters(trainer):
            return "under DDP with find_unused_parameters or static_graph"
        return None

    @property
    def adds_to_loss(self) -> bool:
        """Whether it takes the loss route in this fit."""
        return self._to_loss

    def loss_term(self, optimizer: Optimizer, last: bool) -> tuple[Tensor, float] | None:
        """Return R(θ) and λ with the last batch of an optimizer step."""
        params = self.parameters_of(optimizer) if last and self.scale else []
        if not params:
            return None
        value = self._checked(params)
        self._log(optimizer, value)
        return value, self.scale

    def objective(self, optimizer: Optimizer) -> Tensor | None:
        """Return λ R(θ)."""
        params = self.parameters_of(optimizer) if self.scale else []
        return self.scale * self.value(params) if params else None

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Add λ ∇R(θ), where this step's loss has not had its term."""
        if not self.scale:
            return
        self.add_gradient_(params, self.scale)
        if self.logging:
            self._log(optimizer, self.value(params))

    def _log(self, optimizer: Optimizer, value: Tensor) -> None:
        """Log the penalty over all optimizers, each as of its last step."""
        if self.logging:
            self._terms[id(optimizer)] = self.scale * full_tensor(value.detach())
            self.log_metrics(penalty=sum_scalars(list(self._terms.values())))

    def _checked(self, params: Sequence[Tensor]) -> Tensor:
        """Return the value, or say what is wrong with it."""
        value = self.value(params)
        what = f"{self.name}: value() must return a differentiable scalar tensor, got"
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} {value!r} of type {type(value).__name__}")
        if value.ndim:
            raise ValueError(f"{what} a tensor of shape {tuple(value.shape)}: sum over all entries")
        if not value.requires_grad:
            raise ValueError(f"{what} one without a graph: compute it from params, without .data, .detach() or .item()")
        if (self.logging or is_cpu(value)) and math.isnan(value.item()) and all(p.isfinite().all() for p in params):
            raise ValueError(f"{what} NaN for finite parameters")
        return value

    def route(self) -> str:
        """Return the route that was taken."""
        return "loss" if self._to_loss else "gradient"
