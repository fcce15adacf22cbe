"""Weight decay: decoupled from the gradient, or a schedule for the optimizer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import NON_NEGATIVE, check_module
from lightning_reg._engine.names import counted
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.regularizer import Regularizer
from lightning_reg._engine.selection import check_params, select_parameters
from lightning_reg._engine.state_checks import is_number
from lightning_reg._engine.steps import evaluates_once
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.shards import local_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Moment
    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def decay_weights_(params: Tensors, fraction: float) -> None:
    """Shrink each entry by the same fraction of itself: θ ← (1 − fraction) · θ.

    Args:
        params: Tensors, which are changed in place.
        fraction: The fraction to remove. For the decay of AdamW, it is the learning rate times the weight decay.

    Example:
        >>> theta = torch.tensor([1.0, -2.0])
        >>> decay_weights_([theta], 0.25)
        >>> theta
        tensor([ 0.7500, -1.5000])
    """
    params = tensor_list("decay_weights_: params", params)
    if params:
        torch._foreach_mul_(local_tensors(params), 1 - fraction)


def decay_groups(module: nn.Module, weight_decay: float, *, params: Params = "weights") -> list[dict[str, Any]]:
    """Split the parameters of a module into groups with and without weight decay.

    Args:
        module: The module to train.
        weight_decay: The weight decay of the selected parameters, ≥ 0.
        params: The parameters to decay: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.

    Returns:
        Parameter groups for the constructor of an optimizer, without frozen parameters and without empty groups.

    Raises:
        ValueError: If ``weight_decay`` is negative or NaN, or nothing is selected.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.1), (3, 0.0)]
    """
    decay = NON_NEGATIVE.check("decay_groups: weight_decay", weight_decay)
    check_module("decay_groups", module)
    check_params("decay_groups", params)
    selected = {id(p) for p in select_parameters(module, params).values()}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed, others = ([p for p in trained if (id(p) in selected) is decays] for decays in (True, False))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def _decay_from_(params: Sequence[Tensor], before: Sequence[Tensor], fraction: float) -> None:
    """Subtract the same fraction of earlier values from each entry: θ ← θ − fraction · θ_before."""
    if params:
        torch._foreach_sub_(local_tensors(params), torch._foreach_mul(local_tensors(before), fraction))


class WeightDecay(ParameterRegularizer):
    """Decoupled weight decay for any optimizer: θ ← θ − η·λ·θ, where η is the learning rate of the parameter group.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after all gradient processing. With a float16 loss scaler,
    right before ``optimizer.step()``. Not in a step that a loss scaler or a guard skips.
    For LBFGS, and for optimizers whose step is not torch's own code, right after ``optimizer.step()``: θ ← θ' − η·λ·θ, where θ
    are the weights before the step and θ' those after it. Such an optimizer may evaluate the loss several times in a step, and
    restore weights itself. This requires a copy of the selected weights.

    With Adam, the result equals AdamW bit for bit. With SGD, it is SGDW.
    As in these optimizers, parameters without a gradient do not decay.
    Warns if the optimizer also decays the same parameters.
    Works with sharded and complex parameters.

    Args:
        weight_decay: The weight decay λ ≥ 0, or a schedule. The default of torch's AdamW is 0.01.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``weight_decay`` is negative or NaN, nothing is selected, a fused optimizer is used under float16 loss
            scaling, or the learning rate is not in the parameter groups (Adafactor, Prodigy).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WeightDecay(0.01)], logger=False)

    Reference:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    phase = Phase.DECAY
    supports_complex = True
    valid_ranges = {"weight_decay": NON_NEGATIVE}
    deepspeed_alternative = "set the optimizer's own weight_decay"

    needs_learning_rate = True
    fit_attributes = ("_before",)
    rate_alternative = "the optimizer's own weight_decay, which WeightDecayScheduler can schedule"

    def __init__(self, weight_decay: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.weight_decay = weight_decay
        super().__init__(params, name)
        self._before: dict[int, Tensor] = {}  # weights before the step, keyed by the id of the parameter

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and warn if the optimizer decays them too."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)
        self.warn_of_second_decay(trainer)

    def begin_step(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Copy the weights that will decay after the step."""
        self._before.clear()
        if self.current["weight_decay"] and not evaluates_once(optimizer):
            self._before = {id(p): p.detach().clone() for p in params}

    def before_update(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Decay the parameters that have a gradient, if the update cannot undo it. Forget the others."""
        trained = [p for p in params if p.grad is not None]
        if self._before:
            self._before = {id(p): self._before[id(p)] for p in trained}
        elif evaluates_once(optimizer):
            for group_params, fraction in self._fractions(trained, optimizer):
                decay_weights_(group_params, fraction)

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Decay by the weights before the step."""
        copied = [p for p in params if id(p) in self._before]
        for group_params, fraction in self._fractions(copied, optimizer):
            _decay_from_(group_params, [self._before[id(p)] for p in group_params], fraction)
        self._before.clear()

    def _fractions(self, params: list[Parameter], optimizer: Optimizer) -> Iterator[tuple[list[Parameter], Any]]:
        """Yield the parameters of each group with the fraction by which they decay, in proportion to its learning rate."""
        for group, group_params in self.by_group(params, optimizer) if self.current["weight_decay"] else ():
            yield group_params, self.learning_rate(optimizer, group) * self.current["weight_decay"]

    def detach(self) -> None:
        """Release the tensors."""
        super().detach()
        self._before.clear()

    def route(self) -> str:
        """Return where the decay acts: between the backward pass and the update, or after a step that is not torch's own."""
        after = bool(self._optimizers) and not any(map(evaluates_once, self._optimizers))
        return "after the step" if after else "before the update"


class WeightDecayScheduler(Regularizer):
    """Set or schedule the optimizer's own ``weight_decay``. The optimizer determines the effect.

    Runs in: ``on_train_batch_start``, whenever the value has changed.

    Sets the ``weight_decay`` of each parameter group whose own is nonzero when the fit starts, such as the first group of
    ``decay_groups``, or when the group is added during the fit. Restores the original values after the fit.

    Args:
        weight_decay: The weight decay, ≥ 0, or a schedule.
        name: The name in metrics and checkpoints. The name of the class by default.

    Raises:
        ValueError: If ``weight_decay`` is negative or NaN, or no parameter group has a nonzero ``weight_decay``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Cosine
        >>> trainer = Trainer(callbacks=[WeightDecayScheduler(Cosine(0.04, 0.4))], logger=False)

    Reference:
        For an increasing weight decay: M. Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021.
    """

    phase = Phase.DECAY
    valid_ranges = {"weight_decay": NON_NEGATIVE}
    state_entries = ("original",)
    fit_attributes = ("_trainer",)
    deepspeed_alternative = "set the optimizer's own weight_decay"

    def __init__(self, weight_decay: Value, *, name: str | None = None) -> None:
        self.weight_decay = weight_decay
        super().__init__(name)
        self._trainer: Trainer | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second scheduler, which would set the same values."""
        self.refuse_others(trainer, "both set the weight_decay of the same parameter groups: keep one of them")

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the groups with weight decay."""
        self._trainer = trainer
        self._find_groups()
        if not any(self.state["original"].values()):
            raise ValueError(
                f"{self.name}: no parameter group has a nonzero weight_decay to schedule: create the optimizer with one "
                "(decay_groups splits the parameters), or use WeightDecay"
            )

    def _find_groups(self) -> None:
        """Note the groups' own weight decay.

        Indices identify the groups, because loading a checkpoint and other callbacks replace them. A resumed run takes their
        values from its checkpoint, since its groups have the scheduled values.
        """
        original = self.state["original"]
        for (optimizer, group), value in self._groups():
            original.setdefault(f"{optimizer}/{group}", value.get("weight_decay") or 0.0)

    def _groups(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """Yield each parameter group with the indices of its optimizer and of itself."""
        for index, optimizer in enumerate(self._trainer.optimizers if self._trainer else ()):
            yield from (((index, number), group) for number, group in enumerate(optimizer.param_groups))

    def _scheduled(self) -> list[tuple[dict[str, Any], float]]:
        """Return the groups that are scheduled, with their own weight decay."""
        found = [
            (group, self.state["original"].get(f"{optimizer}/{number}", 0.0)) for (optimizer, number), group in self._groups()
        ]
        return [(group, value) for group, value in found if value]

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Describe a valid entry: a number for each parameter group."""
        return "" if isinstance(key, str) and is_number(value) else "a number for each parameter group"

    def update(self, moment: Moment) -> None:
        """Set the weight decay of each group, including groups that were added since the last batch."""
        super().update(moment)
        self._find_groups()
        for group, _ in self._scheduled():
            group["weight_decay"] = self.current["weight_decay"]

    def detach(self) -> None:
        """Restore the original weight decay of the groups."""
        for group, value in self._scheduled():
            group["weight_decay"] = value
        self._trainer = None

    def acts_on(self) -> str:
        """Count the groups and parameters."""
        groups = [group for group, _ in self._scheduled()]
        count = sum(p.numel() for group in groups for p in group["params"] if not is_lazy(p))
        return f"{counted(len(groups), 'group')}, {counted(count, 'parameter')}"

    def route(self) -> str:
        """Return where the callback acts: in the optimizer."""
        return "the optimizer's own"
