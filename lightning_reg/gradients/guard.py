"""What to do with gradients that are not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch.optim import LBFGS

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import check_choice, check_integer
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.gradients import existing_gradients
from lightning_reg._tensors.shards import local_tensors
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params


@torch.no_grad()
def nonfinite_gradients(params: Sequence[Tensor]) -> Tensor:
    """Return for each tensor whether this rank's part of its gradient has an entry that is infinite or NaN.

    Args:
        params: Tensors; one without a gradient counts as finite.

    Example:
        >>> params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
        >>> params[0].grad = torch.tensor([1.0, float("nan")])
        >>> nonfinite_gradients(params)
        tensor([ True, False])
    """
    parts = local_tensors(existing_gradients(params))
    if len(parts) < len(params) or not all(part.numel() for part in parts):
        found = [local_tensors(existing_gradients([p])) for p in params]
        empty = torch.zeros(1, device=params[0].device)
        parts = [part[0] if part and part[0].numel() else empty for part in found]
    if not parts:
        return torch.zeros(0, dtype=torch.bool)
    return (torch.stack(torch._foreach_norm(parts, math.inf)) < math.inf).logical_not_()


@torch.no_grad()
def zero_nonfinite_gradients_(params: Sequence[Tensor]) -> None:
    """Set every infinite or NaN entry of every gradient to 0.

    Args:
        params: Tensors whose ``.grad`` is changed in place; those without one are left out.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([1.0, float("nan"), float("-inf")])
        >>> zero_nonfinite_gradients_([theta])
        >>> theta.grad
        tensor([1., 0., 0.])
    """
    for part in local_tensors(existing_gradients(params)):
        part.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


class NonFiniteGradientGuard(GradientProcessing):
    """Do not let infinite or NaN gradients into the optimizer.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before everything else.

    A skipped step is no step: parameters, momentum and step counters of the optimizer stay as they are, and no other callback
    of the suite acts on it, neither before nor after. Its gradients are taken away: ``.grad`` is ``None`` in hooks that come
    later. The decision is the same on every rank, and it is the one thing in this
    package that waits for the device at each step. Where a float16 loss scaler is still looking for its scale, the guard leaves
    the step to it: the scaler skips it, nothing acts on it, and it counts as bad only once the scale has fallen below 1.

    Args:
        policy: ``"skip"`` the step, set the bad entries to ``"zero"``, or ``"raise"`` an error at once.
        patience: How many bad steps in a row end the training with an error that names the parameters, ≥ 1.
        params: Which ones are watched: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For another policy, a patience below 1, a selection of nothing, ``"skip"`` with LBFGS, which evaluates
            several times within a step, or with
            ``Trainer(gradient_clip_algorithm="value")``, or a fused optimizer under float16 loss scaling.
        RuntimeError: During training, after ``patience`` bad steps in a row, or at the first one with ``"raise"``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGradientGuard("skip", patience=3)], logger=False)
    """

    phase = Phase.GUARD
    state_entries = ("consecutive",)
    supports_sparse = supports_fsdp1 = True

    def __init__(
        self,
        policy: Literal["skip", "zero", "raise"] = "skip",
        *,
        patience: int = 10,
        params: Params = "all",
        name: str | None = None,
    ) -> None:
        check_choice("NonFiniteGradientGuard: policy", policy, ("skip", "zero", "raise"))
        self.policy = policy
        self.patience = check_integer("NonFiniteGradientGuard: patience", patience, 1)
        super().__init__(params, name)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot clip the gradients of a skipped step, of which there are none."""
        super().prepare(trainer, pl_module)
        if self.policy == "skip" and trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                f"{self.name} takes the gradients of a bad step away, and Trainer(gradient_clip_algorithm='value') fails "
                "without: use GradientValueClipping in its place"
            )

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and refuse to skip what is no single step."""
        super().attach(trainer, pl_module)
        if self.policy == "skip" and any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(
                f"{self.name} cannot skip a step of LBFGS, which evaluates several times: use policy='raise' or 'zero'"
            )
        self._trainer = trainer

    def should_step(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> bool:
        """Return whether the step may happen, after its bad entries have been set to zero where that is the policy."""
        bad = _lightning.any_rank(self._trainer, nonfinite_gradients(params))
        is_bad, index = bool(bad.any()), self.optimizer_index(optimizer)
        if is_bad and _lightning.is_searching_scale(self._trainer):
            return False
        consecutive = self.state["consecutive"]
        consecutive[index] = consecutive.get(index, 0) + 1 if is_bad else 0
        if self.has_logger:
            self.running.sum(self.label("nonfinite_steps", optimizer), bad.any())
        if not is_bad:
            return True
        if self.policy == "raise" or consecutive[index] >= self.patience:
            raise RuntimeError(self._message(params, bad, step, consecutive[index]))
        if self.policy == "zero":
            zero_nonfinite_gradients_(params)
        return self.policy == "zero"

    def _message(self, params: list[Parameter], bad: Tensor, step: Step, in_a_row: int) -> str:
        offending = [self.name_of(p) for p, is_bad in zip(params, bad.tolist(), strict=True) if is_bad]
        times = f", {in_a_row} times in a row" if in_a_row > 1 else ""
        return (
            f"{self.name}: gradients are not finite at step {step.number}{times}, those of {', '.join(offending)}: look for a "
            "division by zero, a logarithm or root at zero or bad data, or lower the learning rate"
        )

    def route(self) -> str:
        """Say what happens to a bad step."""
        return f"before the step: {self.policy}"
