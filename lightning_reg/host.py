"""What is asked of Lightning beyond its documented interface, in one place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_reg.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = [
    "accumulates",
    "any_rank",
    "averages",
    "batches_at_step_start",
    "batches_done",
    "begins_step",
    "builds_modules_later",
    "compiles",
    "endless",
    "ends_epoch",
    "flattening_root",
    "flattens",
    "grad_scaler",
    "log_metrics",
    "mean_over_ranks",
    "logs_this_step",
    "plan",
    "refuses_unscaled_gradients",
    "searches_scale",
    "shards",
    "tracks_used_parameters",
    "uses_deepspeed",
]


def builds_modules_later(pl_module: LightningModule) -> bool:
    """Return whether modules may be added after the callbacks' ``setup``."""
    return any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))


def compiles(pl_module: LightningModule) -> bool:
    """Return whether a model, or a part of it, runs under ``torch.compile``."""
    compiled = (isinstance(module, OptimizedModule) or module._compiled_call_impl for module in pl_module.modules())
    return pl_module._compiler_ctx is not None or any(compiled)


def endless(trainer: Trainer) -> bool:
    """Return whether neither ``max_epochs`` nor ``max_steps`` ends the fit."""
    return trainer.max_epochs == -1 and trainer.max_steps == -1


def plan(trainer: Trainer) -> Plan:
    """Return how long the fit is meant to last; the training data must be loaded.

    In manual optimization ``max_steps`` counts the steps of all optimizers: each is taken to step once in a batch.
    """
    automatic = trainer.lightning_module.automatic_optimization
    open_end = Plan(math.inf, float(trainer.num_training_batches), _batches_per_step(trainer) if automatic else {0: 1})
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - _epochs_without_training(trainer)
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if not automatic:
        steps /= max(len(trainer.optimizers), 1)
    by_steps = math.inf if math.isinf(steps) else open_end.steps(steps)
    return Plan(min(epochs * open_end.per_epoch, by_steps), open_end.per_epoch, open_end.per_step)


def _batches_per_step(trainer: Trainer) -> dict[int, int]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return dict(callback.scheduling)
    return {0: trainer.accumulate_grad_batches}


def _epochs_without_training(trainer: Trainer) -> int:
    """Count the epoch that weight averaging adds to a fit to renew the statistics of batch normalisation."""
    averaging = (cb for cb in trainer.callbacks if isinstance(cb, StochasticWeightAveraging))  # type: ignore[attr-defined]
    return sum(bool(cb._model_contains_batch_norm) for cb in averaging)


def batches_at_step_start(trainer: Trainer, batch_idx: int) -> int:
    """Return the training batches that were done when the optimizer step began to which this batch belongs.

    Measured there, progress is the same whether a step's samples come in one batch or in several micro-batches.
    """
    automatic = trainer.lightning_module.automatic_optimization
    done: int = trainer.fit_loop.total_batch_idx
    return done - (batch_idx % trainer.accumulate_grad_batches if automatic else 0)


def batches_done(trainer: Trainer) -> int:
    """Return the training batches that are done, the current one included."""
    return trainer.fit_loop.total_batch_idx + 1


def begins_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a batch is the first of its optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def ends_epoch(trainer: Trainer) -> bool:
    """Return whether the current batch is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def accumulates(trainer: Trainer) -> bool:
    """Return whether the current batch only adds to the gradients, the optimizer stepping later."""
    return trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()


def logs_this_step(trainer: Trainer) -> bool:
    """Return whether somebody listens and the current step is one that Lightning logs."""
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs


def log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Write metrics at the current step, and show them to callbacks that monitor one."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    device = trainer.strategy.root_device
    trainer.callback_metrics.update({key: torch.tensor(value, device=device) for key, value in metrics.items()})


def grad_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the scaler of the loss, which only float16 mixed precision has."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def mean_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of what the ranks have, the same on all; every rank must ask."""
    mean = trainer.strategy.reduce(tensor.detach(), reduce_op="mean") if trainer.world_size > 1 else tensor
    assert isinstance(mean, torch.Tensor)
    return mean


def searches_scale(trainer: Trainer) -> bool:
    """Return whether a scaler may still meet gradients that are not finite because its scale is too large."""
    scaler = grad_scaler(trainer)
    return scaler is not None and scaler.get_scale() >= 1


def refuses_unscaled_gradients(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return whether gradients are still scaled in ``on_before_optimizer_step``, as a fused optimizer unscales in its step."""
    return grad_scaler(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False)


def tracks_used_parameters(trainer: Trainer) -> bool:
    """Return whether DDP looks for parameters that the forward pass left out, or relies on a graph that never changes."""
    model: Any = trainer.strategy.model
    return isinstance(model, DistributedDataParallel) and (model.find_unused_parameters or model.static_graph)


def averages(trainer: Trainer) -> list[nn.Module]:
    """Return the models in which other callbacks keep averages of the weights: EMA, SWA and those like them."""
    models = [getattr(cb, "_average_model", None) for cb in trainer.callbacks]  # type: ignore[attr-defined]
    return [
        model.module if isinstance(model, AveragedModel) else model for model in models if isinstance(model, torch.nn.Module)
    ]


def shards(trainer: Trainer, parameters: Iterable[Tensor]) -> bool:
    """Return whether a rank holds only a part of each parameter."""
    return isinstance(trainer.strategy, FSDPStrategy) or any(isinstance(p, DTensor) for p in parameters)


def flattens(trainer: Trainer) -> bool:
    """Return whether FSDP1 has made flat pieces of the parameters, without their shapes."""
    return isinstance(trainer.strategy, FSDPStrategy)


def flattening_root(trainer: Trainer) -> Any:
    """Return the root module of FSDP1, which alone can tell the norm of its gradients; ``None`` elsewhere."""
    return trainer.strategy.model if flattens(trainer) else None


def any_rank(trainer: Trainer, flags: Tensor) -> Tensor:
    """Return, for each of some flags, whether it is set on any rank; every rank must ask."""
    if trainer.world_size == 1:
        return flags
    total = trainer.strategy.reduce(flags.float(), reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total > 0


def uses_deepspeed(trainer: Trainer) -> bool:
    """Return whether DeepSpeed's engine, not Lightning, owns gradients and steps."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)
