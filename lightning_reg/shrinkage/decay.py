"""Weight decay: decoupled from the gradient, or the optimizer's own on a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_reg._engine.arguments import NON_NEGATIVE
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.regularizer import Regularizer
from lightning_reg._engine.selection import select_parameters
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.shards import local_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def decay_weights_(params: Sequence[Tensor], share: float) -> None:
    r"""Shrink every entry by the same share of itself: :math:`\theta \leftarrow (1 - \mathrm{share})\,\theta`.

    Args:
        params: Tensors, changed in place.
        share: The learning rate times the weight decay, for a decay as in AdamW.

    Example:
        >>> theta = torch.tensor([1.0, -2.0])
        >>> decay_weights_([theta], 0.25)
        >>> theta
        tensor([ 0.7500, -1.5000])
    """
    if params:
        torch._foreach_mul_(local_tensors(params), 1 - share)


def decay_groups(module: nn.Module, weight_decay: float, *, params: Params = "weights") -> list[dict[str, Any]]:
    """Divide a module's parameters into those that an optimizer decays and those that it does not.

    Args:
        module: The module to train.
        weight_decay: The decay of the selected parameters, ≥ 0.
        params: Which parameters are decayed: by default weights, neither biases nor those of normalisation layers.

    Returns:
        Parameter groups for the constructor of an optimizer; frozen parameters are in none.

    Raises:
        ValueError: For a negative or NaN decay, or a selection of nothing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.1), (3, 0.0)]
    """
    decay = NON_NEGATIVE.check("decay_groups: weight_decay", weight_decay)
    chosen = {id(p) for p in select_parameters(module, params).values()}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed, others = ([p for p in trained if (id(p) in chosen) is wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class WeightDecay(ParameterRegularizer):
    r"""Decoupled weight decay, whatever the optimizer: :math:`\theta \leftarrow \theta - \eta\,w\,\theta`, η its learning rate.

    Runs in: ``on_before_optimizer_step``, between the backward pass and the update, once per optimizer step; not in a step that
    a loss scaler skips.

    With Adam it is AdamW, to the last bit; with SGD it is SGDW. As there, parameters without a gradient are not decayed.

    Args:
        weight_decay: w ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN decay, a selection of nothing, or a fused optimizer under float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WeightDecay(0.01)], logger=False)

    Reference:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    phase = Phase.DECAY
    valid_ranges = {"weight_decay": NON_NEGATIVE}
    deepspeed_alternative = "set the optimizer's own weight_decay"

    def __init__(self, weight_decay: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.weight_decay = weight_decay
        super().__init__(params, name)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and warn of a second decay."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)
        self.warn_of_second_decay(trainer)

    def before_update(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Decay each group's parameters by its learning rate."""
        if self.current["weight_decay"]:
            for group, parameters_of in self.by_group(params, optimizer):
                decay_weights_([p for p in parameters_of if p.grad is not None], group["lr"] * self.current["weight_decay"])

    def route(self) -> str:
        """Say that it acts between the backward pass and the update."""
        return "before the update"


class WeightDecayScheduler(Regularizer):
    """Drive the optimizer's own ``weight_decay``, whatever it makes of it.

    Runs in: ``on_train_batch_start``, whenever the scheduled value has changed.

    It drives the parameter groups whose ``weight_decay`` is not 0 when the fit starts, such as the first of
    :func:`~lightning_reg.decay_groups`, and gives them their own back after the fit.

    Args:
        weight_decay: The decay, ≥ 0, or a schedule.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN decay, or optimizers none of whose groups decay.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Cosine
        >>> trainer = Trainer(callbacks=[WeightDecayScheduler(Cosine(0.04, 0.4))], logger=False)

    Reference:
        For a decay that grows: M. Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021.
    """

    phase = Phase.DECAY
    valid_ranges = {"weight_decay": NON_NEGATIVE}
    deepspeed_alternative = "set the optimizer's own weight_decay"

    def __init__(self, weight_decay: Value, *, name: str | None = None) -> None:
        self.weight_decay = weight_decay
        super().__init__(name)
        self._own: list[tuple[Optimizer, int, float]] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second scheduler, which would set the same values."""
        self.refuse_others(trainer, "both set the weight_decay of the same parameter groups: keep one of them")

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the groups that decay: by their number, since a checkpoint replaces them."""
        self._own = [
            (optimizer, number, group["weight_decay"])
            for optimizer in trainer.optimizers
            for number, group in enumerate(optimizer.param_groups)
            if group.get("weight_decay")
        ]
        if not self._own:
            raise ValueError(
                f"{self.name}: no parameter group of the optimizers has a weight_decay other than 0 to drive: make the "
                "optimizer with one (decay_groups divides the parameters), or use WeightDecay"
            )

    def values_changed(self) -> None:
        """Set the decay."""
        for optimizer, number, _ in self._own:
            optimizer.param_groups[number]["weight_decay"] = self.current["weight_decay"]

    def detach(self) -> None:
        """Give the groups their own decay back."""
        for optimizer, number, own in self._own:
            optimizer.param_groups[number]["weight_decay"] = own
        self._own.clear()

    def acts_on(self) -> str:
        """Count the groups and parameters."""
        count = sum(p.numel() for optimizer, number, _ in self._own for p in optimizer.param_groups[number]["params"])
        return f"{len(self._own)} group{'s' if len(self._own) > 1 else ''}, {count:,} parameters"

    def route(self) -> str:
        """Say that the optimizer does it."""
        return "the optimizer's own"
