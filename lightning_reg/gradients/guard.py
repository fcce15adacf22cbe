"""Protection against infinite and NaN gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import check_choice, check_integer
from lightning_reg._engine.names import abbreviate, counted
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.buffers import GoodBuffers
from lightning_reg._tensors.gradients import changeable_gradients, existing_gradients
from lightning_reg._tensors.shards import local_tensors
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors


@torch.no_grad()
def nonfinite_gradients(params: Tensors) -> Tensor:
    """Return for each tensor whether its gradient has an infinite or NaN entry on this rank.

    Args:
        params: Tensors. A missing gradient counts as finite.

    Returns:
        A boolean vector with an entry for each tensor.

    Example:
        >>> params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
        >>> params[0].grad = torch.tensor([1.0, float("nan")])
        >>> nonfinite_gradients(params)
        tensor([ True, False])
    """
    params = tensor_list("nonfinite_gradients: params", params)
    parts = local_tensors(existing_gradients(params))
    if len(parts) < len(params) or not all(part.numel() for part in parts):
        per_tensor = [local_tensors(existing_gradients([p])) for p in params]
        zero = torch.zeros(1, device=params[0].device)
        parts = [part[0] if part and part[0].numel() else zero for part in per_tensor]
    if not parts:
        return torch.zeros(0, dtype=torch.bool)
    return (torch.stack(torch._foreach_norm(parts, math.inf)) < math.inf).logical_not_()


@torch.no_grad()
def zero_nonfinite_gradients_(params: Tensors) -> None:
    """Set each infinite or NaN entry of the gradients to 0.

    Args:
        params: Tensors whose ``.grad`` is changed in place. Those without one are skipped.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([1.0, float("nan"), float("-inf")])
        >>> zero_nonfinite_gradients_([theta])
        >>> theta.grad
        tensor([1., 0., 0.])
    """
    params = tensor_list("zero_nonfinite_gradients_: params", params)
    for part in local_tensors(changeable_gradients(params, lambda values: ~values.isfinite())):
        real = torch.view_as_real(part) if part.is_complex() else part
        real.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


class NonFiniteGradientGuard(GradientProcessing):
    """Keep infinite and NaN gradients out of the optimizer: skip the step, zero the bad entries, or raise an error.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before all other processing.

    A skipped step changes neither the parameters nor the optimizer's momentum and step counters. No other callback of this
    package acts on it, before or after. Its gradients are removed, so ``.grad`` is ``None`` in later hooks.
    With ``"skip"`` and ``"zero"``, running statistics and other floating-point buffers that the bad batch made non-finite get
    back their earlier values.
    The first bad step raises a warning, and a line at the end of the fit counts all of them.
    If an optimizer evaluates the loss several times in a step, as LBFGS does, a step can be skipped only at the first
    evaluation: after that, the weights have moved.
    The decision is the same on every rank. It makes the CPU wait for the device at each step, which nothing else in this
    package does. While a float16 loss scaler is still lowering its scale, the scaler skips bad steps itself. They count as bad
    only if the scale is below 1.

    Args:
        policy: ``"skip"`` skips the step, ``"zero"`` sets the bad entries to 0, and ``"raise"`` raises an error.
        patience: The number of consecutive bad steps, ≥ 1, after which an error ends training and names the parameters.
        params: The parameters to check: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``policy`` is unknown, ``patience`` is below 1, nothing is selected, or a fused optimizer is used under
            float16 loss scaling. With ``"skip"``, also for ``Trainer(gradient_clip_algorithm="value")``, which fails without
            gradients.
        RuntimeError: During training, after ``patience`` consecutive bad steps (with ``"raise"``, at the first one), or if a
            step would have to be skipped after its first evaluation of the loss.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGradientGuard("skip", patience=3)], logger=False)
    """

    phase = Phase.GUARD
    supports_complex = True
    state_entries = ("consecutive", "bad_steps")
    fit_attributes = ("_buffers",)
    prints_always = True
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
        self._buffers: GoodBuffers | None = None
        self._judged = True  # whether there was a step since the last batch
        self._bad_step: tuple[int, int] | None = None

    @property
    def zeroes_gradients(self) -> bool:
        """Whether the guard may set gradients to zero: with ``policy="zero"``."""
        return self.policy == "zero"

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error if the Trainer clips values, because that fails in a skipped step, which has no gradients."""
        super().prepare(trainer, pl_module)
        if self.policy == "skip" and trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                f"{self.name} removes the gradients of a bad step, and Trainer(gradient_clip_algorithm='value') fails without "
                "gradients: use GradientValueClipping instead"
            )

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters and the buffers."""
        super().attach(trainer, pl_module)
        self._buffers = None if self.policy == "raise" else GoodBuffers(pl_module)
        self._judged, self._bad_step = True, None

    def detach(self) -> None:
        """Release the tensors."""
        super().detach()
        self._buffers = None

    def before_batch(self) -> None:
        """Record the buffers, which the batch may change."""
        if self._buffers is not None:
            self._buffers.record(trusted=self._judged and len(self._optimizers) == 1)
        self._judged = False

    def should_step(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> bool:
        """Return whether the step may happen. With the policy ``"zero"``, set the bad entries to 0 first."""
        assert self._trainer is not None, "attached"
        bad = _lightning.any_rank(self._trainer, nonfinite_gradients(params))
        is_bad, index = bool(bad.any()), self.optimizer_index(optimizer)
        self._judged = True
        if is_bad and self._buffers is not None:
            self._buffers.restore()
        if is_bad and _lightning.is_searching_scale(self._trainer):
            return False
        self._count(index, is_bad, step)
        if self.has_logger:
            self.running.sum(self.label("nonfinite_steps", optimizer), bad.any())
        if not is_bad:
            return True
        consecutive = self.state["consecutive"][index]
        names = [self.name_of(p) for p, is_bad in zip(params, bad.tolist(), strict=True) if is_bad]
        steps = f" ({consecutive} steps in a row)" if consecutive > 1 else ""
        where = f"{self.name}: infinite or NaN gradients at step {step.number}{steps} in"
        if self.policy == "raise" or consecutive >= self.patience:
            raise RuntimeError(
                f"{where} {', '.join(names)}: look for bad data, a division by zero, or a logarithm or square root of zero, or "
                f"lower the learning rate{self._hint_of_hook(consecutive)}"
            )
        if not (self.policy == "skip" and step.evaluation):  # which is an error
            self._warn_once(f"{where} {abbreviate(names)}")
        if self.policy == "zero":
            zero_nonfinite_gradients_(params)
        return self.policy == "zero"

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Change nothing: ``should_step`` has decided."""

    def _count(self, index: int, is_bad: bool, step: Step) -> None:
        """Count bad steps: a step is bad if one of its evaluations is."""
        counts, totals = self.state["consecutive"], self.state["bad_steps"]
        was_bad = step.evaluation > 0 and self._bad_step == step.key
        if is_bad and not was_bad:
            counts[index], totals[index] = counts.get(index, 0) + 1, totals.get(index, 0) + 1
            self._bad_step = step.key
        elif not is_bad and not step.evaluation:
            counts[index] = 0

    def _hint_of_hook(self, consecutive: int) -> str:
        assert self._trainer is not None, "attached"
        if consecutive < 2 or not _lightning.ddp_hook_keeps_errors(self._trainer):
            return ""
        return (
            ". The error feedback of the DDP communication hook may hold the NaN of an earlier step: set "
            "use_error_feedback=False and warm_start=False in PowerSGDState"
        )

    def _warn_once(self, where: str) -> None:
        if sum(self.state["bad_steps"].values()) == 1:
            what = "skipping the step" if self.policy == "skip" else "setting these entries to 0"
            rank_zero_warn(f"{where}: {what}. Further bad steps are counted, and reported at the end of the fit")

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Describe a valid entry: a count for each optimizer."""
        return "" if isinstance(key, int) and isinstance(value, int) and value >= 0 else "a count for each optimizer"

    def fit_summary(self) -> str | None:
        """Return how many steps had infinite or NaN gradients."""
        total = sum(self.state["bad_steps"].values())
        if not total:
            return None
        done = "skipped" if self.policy == "skip" else "with entries set to 0"
        return f"{counted(total, 'step')} {done} because of infinite or NaN gradients"

    def route(self) -> str:
        """Return where the guard acts, and what it does with a bad step."""
        return f"before the step: {self.policy}"
