"""The base class of penalties on parameters: it chooses how to apply the penalty, and applies it once per optimizer step."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import SparseAdam

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import NON_NEGATIVE, check_choice
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.ranks import may_differ, mean_tensors_of_all
from lightning_reg._engine.regularizer import regularizers_of
from lightning_reg._engine.steps import by_sign, sign_of_penalties, with_inner
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import is_cpu, sum_scalars
from lightning_reg._tensors.shards import full_tensor, is_sharded, local_tensor, shard_like

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value

Route = Literal["auto", "loss", "gradient"]
"""How a penalty is applied: through the loss, directly to the gradients, or through the loss wherever that is exact."""


class Penalty(ParameterRegularizer):
    """Base class of penalties: J = L + λ R(θ).

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    A subclass overrides ``value``, which returns R(θ). If it also overrides ``add_gradient_`` with a closed form,
    ``inject="gradient"`` needs no autograd graph. Otherwise autograd differentiates ``value``, also in a subclass of a penalty
    that has a closed form.
    The penalty covers every selected parameter, even one that took no part in the forward pass.
    With gradient accumulation, the penalty counts once per step, not once per batch.
    After ``backward(create_graph=True)``, second derivatives of the loss or of ``.grad`` include the penalty. If it is added
    to the gradients, they include it from ``on_before_optimizer_step`` on, in time for an optimizer that computes them in its
    step.
    An optimizer that uses the value of its closure, such as LBFGS, minimizes the objective including the penalty.
    Where an optimizer maximizes (``maximize=True``), the penalty is subtracted, so that weights still shrink.
    The loss that the module logs does not contain the penalty.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``. ``"auto"`` uses the
            loss wherever that is exact. It uses the gradients in manual optimization, for sharded parameters, and together
            with a guard that sets gradients to zero. It also does so if the module overrides ``optimizer_step``, which may
            accumulate gradients, and under DDP with ``find_unused_parameters``, ``static_graph``, a communication hook, or
            sparse gradients.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, ``inject="loss"`` is not exact in this run, the
            penalty is added to the gradients of a fused optimizer under float16 loss scaling, or SparseAdam trains a selected
            parameter.

    Example:
        >>> class LogPenalty(Penalty):  # Σ log(1 + θ²): pulls small weights to zero and leaves large ones almost alone
        ...     def value(self, params):
        ...         return sum(p.square().log1p().sum() for p in params)
        >>> LogPenalty(1e-3, params="head.*")
        LogPenalty(0.001, params='head.*')
    """

    phase = Phase.PENALTY
    sums_over_tensors: ClassVar[bool] = False
    valid_ranges = {"strength": NON_NEGATIVE}
    fit_attributes: ClassVar[tuple[str, ...]] = ("_logged", "_trainer")
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
        self._uses_loss = False
        self._logged: dict[int, Tensor] = {}  # the last value for each optimizer
        self._trainer: Trainer | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Let no class inherit the closed form of a formula that it overrides."""
        super().__init_subclass__(**options)
        if "add_gradient_" not in vars(cls.formula_class()):
            cls.add_gradient_ = Penalty.add_gradient_  # type: ignore[method-assign]

    @abstractmethod
    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return R(θ) as a differentiable scalar."""

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ ∇R(θ) to the gradients. By default, autograd differentiates ``value``.

        Sharded parameters are gathered for this, so that ``value`` sees full tensors. If ``value`` depends on a rank's data,
        the gradient is averaged over the ranks, like that of a loss.
        """
        full_tensors = [_differentiable(p) for p in params]
        with torch.enable_grad():
            value = strength * self._checked_value(full_tensors)
            addends: Sequence[Tensor | None] = torch.autograd.grad(value, full_tensors, allow_unused=True)
        if self._trainer is not None and may_differ(self):
            addends = mean_tensors_of_all(self._trainer, addends, full_tensors)
        for p, gradient, addend in zip(params, dense_gradients(params), addends, strict=True):
            if addend is not None:
                gradient.add_(local_tensor(shard_like(addend, p)))

    def _add_gradient_with_graph_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ ∇R(θ) to gradients that can be differentiated again, so that second derivatives contain the penalty too."""
        with torch.enable_grad():
            value = strength * self._checked_value(params)
            addends = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
            for p, addend in zip(params, addends, strict=True):
                if addend is not None:
                    p.grad = addend if p.grad is None else p.grad + addend

    @classmethod
    def is_sum_over_tensors(cls) -> bool:
        """Return whether R(θ) is a sum over tensors, so that the gradient may be added for a few of them at a time."""
        return bool(vars(cls.formula_class()).get("sums_over_tensors", False))

    @classmethod
    def formula_class(cls) -> type:
        """Return the class that defines the formula. What another class says of it may not hold after an override."""
        return next(owner for owner in cls.__mro__ if {"value", "add_gradient_"} & vars(owner).keys())

    @property
    def scale(self) -> float:
        """The factor λ of ``value``."""
        return self.current["strength"]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and choose between the loss and the gradients."""
        super().attach(trainer, pl_module)
        self._logged.clear()
        self._trainer = trainer
        self._refuse_sparse_only(trainer)
        self._choose_route(trainer, pl_module)

    def data_ready(self) -> None:
        """Repeat the choice, since a module or a callback may have registered a communication hook when the fit started."""
        if self._uses_loss and self._trainer is not None:
            self._choose_route(self._trainer, self._trainer.lightning_module)

    def _choose_route(self, trainer: Trainer, pl_module: LightningModule) -> None:
        obstacle = self._loss_obstacle(trainer, pl_module)
        if self.inject == "loss" and obstacle:
            raise ValueError(f"{self.name}: inject='loss' is not exact {obstacle}; use inject='gradient' or 'auto'")
        self._uses_loss = self.inject != "gradient" and obstacle is None
        if self._uses_loss and _lightning.overrides(pl_module, "optimizer_step"):
            self._uses_loss = self.inject == "loss" or self._needs_loss(trainer)
            if self._uses_loss:
                self._warn_of_accumulation_by_hand(pl_module)
        if not self._uses_loss:
            self.require_unscaled_gradients(trainer)

    def detach(self) -> None:
        """Release the tensors and the trainer."""
        super().detach()
        self._trainer = None

    def _refuse_sparse_only(self, trainer: Trainer) -> None:
        """Raise an error if an optimizer takes only sparse gradients, because the gradient of a penalty is dense."""
        optimizers = [inner for optimizer in trainer.optimizers for inner in with_inner(optimizer)]
        held = [self.name_of(p) for opt in optimizers if isinstance(opt, SparseAdam) for p in self.parameters_of(opt)]
        if held and any(callable(value) or value for _, _, value in self._values_given()):
            raise ValueError(
                f"{self.name} adds a dense gradient to {abbreviate(held)}, but SparseAdam takes only sparse gradients: "
                f"exclude these parameters, as in params=[…, '!{held[0]}'], use another optimizer, or a technique that acts on "
                "the weights, such as WeightDecay or SoftThresholding"
            )

    def _needs_loss(self, trainer: Trainer) -> bool:
        """Return whether an optimizer unscales gradients so late that nothing can be added to them."""
        return any(_lightning.unscales_in_step(trainer, optimizer) for optimizer in trainer.optimizers)

    def _warn_of_accumulation_by_hand(self, pl_module: LightningModule) -> None:
        alternative = "inject='gradient'" if self.inject == "loss" else "fused=False in the optimizer"
        rank_zero_warn(
            f"{self.name} is added to the loss of each batch, but {type(pl_module).__name__} overrides optimizer_step. If that "
            f"skips steps to accumulate gradients, the penalty counts several times per step: use {alternative}"
        )

    def _loss_obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Return the reason why adding the penalty to the loss is not exact in this fit, or ``None`` if it is exact."""
        if not pl_module.automatic_optimization:
            return "in manual optimization, where a loss may belong to any of the optimizers and may not allow in-place changes"
        if any(math.isnan(sign_of_penalties(optimizer)) for optimizer in trainer.optimizers):
            return "with an optimizer that maximizes only some of its parameter groups"
        changing = next((cb.name for cb in regularizers_of(trainer) if cb.overrides("before_forward")), None)
        if changing:
            return f"together with {changing}, which changes the weights for the forward pass"
        if _lightning.has_shards(trainer, self.tensors.values()):
            return "for sharded parameters"
        if _lightning.ddp_tracks_parameters(trainer):
            return "under DDP with find_unused_parameters or static_graph"
        return self._reduction_obstacle(trainer, pl_module)

    def _reduction_obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Return what would change the gradient of a penalty in the loss, but not a gradient that is added later."""
        if _lightning.ddp_has_hooks(trainer):
            return "under DDP with a communication hook, which may round it"
        if _lightning.uses_ddp(trainer) and (sparse := self.sparse_embeddings(pl_module)):
            return f"under DDP with sparse gradients ({abbreviate(sparse)})"
        if guard := next((cb.name for cb in regularizers_of(trainer) if cb.zeroes_gradients), None):
            return f"together with {guard}, which may set its gradient to zero"
        return None

    @property
    def adds_to_loss(self) -> bool:
        """Whether the penalty is added to the loss in this fit."""
        return self._uses_loss

    def loss_term(self, optimizer: Optimizer, last: bool) -> tuple[Tensor, float] | None:
        """Return R(θ) and λ for the last batch of an optimizer step."""
        params = self.parameters_of(optimizer) if last and self.scale else []
        if not params:
            return None
        value = self._checked_value(params)
        self._log(optimizer, value)
        return value, sign_of_penalties(optimizer) * self.scale

    def objective(self, optimizer: Optimizer) -> Tensor | None:
        """Return λ R(θ)."""
        params = self.parameters_of(optimizer) if self.scale else []
        values = [sign * full_tensor(self.value(signed)) for sign, signed in by_sign(optimizer, params).items() if signed]
        return self.scale * sum_scalars(values) if values else None

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Add λ ∇R(θ) to the gradients. Not called if the loss of this step contains the penalty."""
        if not self.scale:
            return
        for sign, signed in by_sign(optimizer, params).items():
            add = self._add_gradient_with_graph_ if _have_graph(signed) else self.add_gradient_
            add(signed, sign * self.scale)
        if self.logging:
            self._log(optimizer, self.value(params))

    def _log(self, optimizer: Optimizer, value: Tensor) -> None:
        """Log the sum of the penalty over all optimizers, with the value from the last step of each."""
        if self.logging:
            self._logged[id(optimizer)] = self.scale * full_tensor(value.detach())
            self.log_metrics(penalty=sum_scalars(list(self._logged.values())))

    def _checked_value(self, params: Sequence[Tensor]) -> Tensor:
        """Return the value, or raise an error that says what is wrong with it."""
        value = self.value(params)
        what = f"{self.name}: value() must return a differentiable scalar tensor, got"
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} {value!r:.80} of type {type(value).__name__}")
        if value.ndim:
            raise ValueError(f"{what} a tensor of shape {tuple(value.shape)}: sum over all entries")
        if not value.requires_grad:
            raise ValueError(f"{what} a tensor without a graph: compute it from params, without .data, .detach(), or .item()")
        if (self.logging or is_cpu(value)) and math.isnan(value.item()) and all(p.isfinite().all() for p in params):
            raise ValueError(f"{what} NaN for finite parameters")
        return value

    def route(self) -> str:
        """Return where the penalty acts: on the loss or on the gradients."""
        if self.inject == "auto" and not self.tensors:
            return "loss or gradient"  # known when a fit starts
        return "loss" if self._uses_loss else "gradient"


def _differentiable(p: Tensor) -> Tensor:
    """Return a full tensor to differentiate with respect to: the parameter itself, by which a penalty may look things up."""
    is_plain = p.is_leaf and p.requires_grad and not is_sharded([p]) and not p._backward_hooks
    return p if is_plain else full_tensor(p.detach()).requires_grad_()


def _have_graph(params: Sequence[Tensor]) -> bool:
    """Return whether some gradients can be differentiated again, as after ``backward(create_graph=True)``."""
    return not is_sharded(params) and any(p.grad is not None and p.grad.requires_grad for p in params)
