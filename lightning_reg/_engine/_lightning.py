"""All access to Lightning beyond its documented interface.

Lightning comes as two packages, ``lightning.pytorch`` and ``pytorch_lightning``, each with its own copy of the classes. The
second takes 1.7 s to import. So this module recognizes classes by name, and never imports ``pytorch_lightning``.
"""

from __future__ import annotations

import math
import sys
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_reg._engine.plan import Plan, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.optim import Optimizer


# The two packages ---------------------------------------------------------------------------------------------------

_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


def is_instance_of(obj: object, name: str) -> bool:
    """Return whether an object is an instance of the Lightning class of that name, from either package."""
    return any(cls.__name__ == name and cls.__module__.startswith(_PACKAGES) for cls in type(obj).__mro__)


def is_code_of_lightning(frame: FrameType) -> bool:
    """Return whether a frame runs Lightning's code, from either package."""
    return str(frame.f_globals.get("__name__")).startswith(_PACKAGES)


def derive_from_both(callback_class: type) -> None:
    """Make a callback class also a subclass of ``pytorch_lightning.Callback``, if that has been imported.

    The LightningCLI of ``pytorch_lightning`` accepts no other class.
    """
    module = sys.modules.get("pytorch_lightning.callbacks.callback")
    if module is not None and not issubclass(callback_class, module.Callback):
        callback_class.__bases__ = (*callback_class.__bases__, module.Callback)


METHODS_OF_MODULE = ("log", "log_dict")
"""The methods of a module that Lightning sets on every callback of its Trainer."""


# Modules ------------------------------------------------------------------------------------------------------------


def toggled(pl_module: LightningModule) -> dict[Tensor, bool]:
    """Return whether parameters require a gradient apart from ``toggle_optimizer``, which freezes some within a batch."""
    return getattr(pl_module, "_param_requires_grad_state", {})


def builds_modules_later(pl_module: LightningModule) -> bool:
    """Return whether modules may be added after the callbacks' ``setup``."""
    return overrides(pl_module, "setup") or overrides(pl_module, "configure_model")


def overrides(pl_module: LightningModule, hook: str) -> bool:
    """Return whether a module defines a hook itself instead of inheriting Lightning's."""
    defined_in = getattr(getattr(pl_module, hook), "__module__", None) or ""
    return not defined_in.startswith(("lightning.pytorch.core.", "pytorch_lightning.core."))


def is_compiled(pl_module: LightningModule) -> bool:
    """Return whether a model, or a part of it, runs under ``torch.compile``."""
    compiled = (isinstance(module, OptimizedModule) or module._compiled_call_impl for module in pl_module.modules())
    return pl_module._compiler_ctx is not None or any(compiled)


def averaged_models(trainer: Trainer) -> list[nn.Module]:
    """Return the models in which other callbacks (EMA, SWA, and similar) keep averages of the weights."""
    models = [getattr(cb, "_average_model", None) for cb in trainer.callbacks]  # type: ignore[attr-defined]
    return [
        model.module if isinstance(model, AveragedModel) else model for model in models if isinstance(model, torch.nn.Module)
    ]


def wrap_average_updates(trainer: Trainer, after: Callable[[nn.Module], None]) -> list[Callable[[], None]]:
    """Call a function with each average of the weights after each update of it. Return functions that stop this."""

    def wrapper(update: Callable[..., Any], average: nn.Module) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            after(average)

        return wrapped

    undo = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        model = getattr(callback, "_average_model", None)
        if isinstance(model, torch.nn.Module):
            owner: Any = model if isinstance(model, AveragedModel) else callback  # SWA updates its average itself
            average = model.module if isinstance(model, AveragedModel) else model
            if hasattr(owner, "update_parameters"):
                undo.append(wrap_method(owner, "update_parameters", partial(wrapper, average=average)))
    return undo


def wrap_method(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Replace a method of one object by ``wrapper(method)``, and return a function that restores it.

    Copies of the object, including pickled ones, have the original method.
    """
    method = getattr(owner, name)
    own = {name: method} if name in vars(owner) else {}  # the object may already have one of its own
    copied = (_itself, (method,)) if own else (getattr, (owner, name))
    setattr(owner, name, _Wrapped(wrapper(method), method, copied))

    def restore() -> None:
        vars(owner).pop(name, None)
        vars(owner).update(own)

    return restore


class _Wrapped:
    """A function that replaces a method. Its copies are the method, which ``copied`` describes by a function and arguments."""

    def __init__(self, function: Callable[..., Any], method: Callable[..., Any], copied: tuple[Any, tuple[Any, ...]]) -> None:
        update_wrapper(self, method)  # Lightning reads the signature
        self._function = function
        self._copied = copied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._copied


def _itself(method: Any) -> Any:
    return method


# The length of the fit ----------------------------------------------------------------------------------------------


def is_endless(trainer: Trainer) -> bool:
    """Return whether neither ``max_epochs`` nor ``max_steps`` ends the fit."""
    return trainer.max_epochs == -1 and trainer.max_steps == -1


def plan_of(trainer: Trainer, *, in_batch: bool = True) -> Plan:
    """Return the length of the fit as known in the current epoch, in a batch or before the first one."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - _epochs_without_training(trainer)
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    per_step = batches_per_step(trainer) if trainer.lightning_module.automatic_optimization else {}
    done, in_epoch = _batches_done(trainer, in_batch)
    steps_in_epoch = in_epoch // trainer.accumulate_grad_batches if per_step else 0
    start = Point(done - in_epoch, trainer.current_epoch, trainer.global_step - steps_in_epoch)
    return Plan(epochs, steps, float(trainer.num_training_batches), per_step, start)


def batches_per_step(trainer: Trainer) -> dict[int, int]:
    """Return the number of batches per optimizer step in automatic optimization, by the first epoch to which it applies."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_instance_of(callback, "GradientAccumulationScheduler"):
            return dict(callback.scheduling)
    return {0: trainer.accumulate_grad_batches}


def _epochs_without_training(trainer: Trainer) -> int:
    """Count the epoch that weight averaging adds to a fit to update the statistics of batch normalization."""
    averaging = (cb for cb in trainer.callbacks if is_instance_of(cb, "StochasticWeightAveraging"))  # type: ignore[attr-defined]
    return sum(bool(cb._model_contains_batch_norm) for cb in averaging)


# Batches, steps and epochs ------------------------------------------------------------------------------------------


def batch_number(trainer: Trainer) -> int:
    """Return the number of the current training batch within the fit."""
    return trainer.fit_loop.total_batch_idx


def point_of(trainer: Trainer, *, in_batch: bool = True) -> Point:
    """Return the point before the optimizer step of the current batch, or before the first batch.

    Measured there, progress is the same whether a step has one batch or accumulates several.
    """
    done, in_epoch = _batches_done(trainer, in_batch)
    accumulated = in_epoch % trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 0
    return _point(trainer, done - accumulated, in_epoch - accumulated)


def point_after_epoch(trainer: Trainer) -> Point:
    """Return the point after the current batch, with which the epoch ends, whether or not it was planned as the last one."""
    return Point(_batches_done(trainer)[0] + 1, trainer.current_epoch + 1, trainer.global_step)


def point_after_step(trainer: Trainer, steps: int) -> Point:
    """Return the point after the step at the end of the current batch, given the number of steps so far."""
    done, in_epoch = _batches_done(trainer)
    return _point(trainer, done + 1, in_epoch + 1)._replace(steps=steps)


def _point(trainer: Trainer, done: int, in_epoch: int) -> Point:
    """Return a point of the fit. If the length of an epoch is unknown, the epoch has no fractions."""
    return Point(done, trainer.current_epoch + in_epoch / trainer.num_training_batches, trainer.global_step)


def _batches_done(trainer: Trainer, in_batch: bool = True) -> tuple[int, int]:
    """Return the number of batches before the current one: in the fit, and in the epoch.

    Before the first batch of a resumed fit, the counts of the epoch are those of the checkpoint, whose epoch may have ended.
    """
    progress, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
    if in_batch:
        return progress.total.ready - 1, progress.current.ready - 1
    return progress.total.ready, progress.current.ready if epochs.ready > epochs.processed else 0  # type: ignore[attr-defined]


def begins_step(trainer: Trainer) -> bool:
    """Return whether the current batch is the first of its optimizer step."""
    return _batches_done(trainer)[1] % trainer.accumulate_grad_batches == 0


def ends_epoch(trainer: Trainer) -> bool:
    """Return whether the current batch is the last of its epoch."""
    fetcher = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached() or bool(fetcher and fetcher.done)


def stops_early(trainer: Trainer) -> bool:
    """Return whether the current batch is the last because something has asked the trainer to stop."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early and not trainer.sanity_checking


def accumulates(trainer: Trainer) -> bool:
    """Return whether the optimizer does not step after the current batch."""
    return trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()


def wrap_optimizer_step(trainer: Trainer, step: Callable[..., Any]) -> Callable[[], None]:
    """Replace Lightning's optimizer steps by ``step(take_step, optimizer, closure)``. Return a function that stops this."""

    def wrapper(optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
            return step(partial(_keep_model, optimizer_step, args), optimizer, closure, **kwargs)

        return wrapped

    return wrap_method(trainer.strategy, "optimizer_step", wrapper)


def _keep_model(
    optimizer_step: Callable[..., Any], args: tuple[Any, ...], optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any
) -> Any:
    return optimizer_step(optimizer, closure, *args, **kwargs)


def wrap_training_step(trainer: Trainer, before: Callable[[], None], after: Callable[[Any], None]) -> Callable[[], None]:
    """Call functions before and after every ``training_step``, the latter with its result. Return a function that stops this.

    An optimizer may run the training step several times for one batch. If it raises an error, its result is ``None``.
    """

    def wrapper(training_step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            output = None
            before()
            try:
                output = training_step(*args, **kwargs)
            finally:
                after(output)
            return output

        return wrapped

    return wrap_method(trainer.strategy, "training_step", wrapper)


# Logging and printing -----------------------------------------------------------------------------------------------


def logs_this_step(trainer: Trainer, logs: bool, log_every_n_steps: int) -> bool:
    """Return whether to compute metrics for the current step: if any rank has a logger, in the steps that Lightning logs."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    return logs and log_every_n_steps > 0 and (step % log_every_n_steps == 0 or trainer.should_stop)


def available_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """Return the metrics that callbacks can monitor. The public property would compute those of the module."""
    return trainer._logger_connector._callback_metrics


def prints_summary(trainer: Trainer) -> bool:
    """Return whether this rank prints summaries, which ``enable_model_summary=False`` turns off."""
    return trainer.is_global_zero and any(is_instance_of(cb, "ModelSummary") for cb in trainer.callbacks)  # type: ignore[attr-defined]


# The loss scale -----------------------------------------------------------------------------------------------------


def grad_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the loss scaler, which only float16 mixed precision has."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def is_searching_scale(trainer: Trainer) -> bool:
    """Return whether gradients may be non-finite merely because the loss scale is still too large."""
    scaler = grad_scaler(trainer)
    return scaler is not None and scaler.get_scale() >= 1


def unscales_in_step(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return whether gradients are still scaled in ``on_before_optimizer_step``: a fused optimizer unscales in its step."""
    return grad_scaler(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False)


# Strategies ---------------------------------------------------------------------------------------------------------


def has_shards(trainer: Trainer, parameters: Iterable[Tensor]) -> bool:
    """Return whether a rank holds only a part of some parameters."""
    return uses_fsdp1(trainer) or any(isinstance(p, DTensor) for p in parameters)


def uses_fsdp1(trainer: Trainer) -> bool:
    """Return whether FSDP1 has flattened the parameters, which then have no shapes."""
    return is_instance_of(trainer.strategy, "FSDPStrategy")


def fsdp1_root(trainer: Trainer) -> Any:
    """Return the root module of FSDP1, the only one that can compute the norm of its gradients, or ``None`` without FSDP1."""
    return trainer.strategy.model if uses_fsdp1(trainer) else None


def uses_deepspeed(trainer: Trainer) -> bool:
    """Return whether DeepSpeed's engine, not Lightning, handles gradients and steps."""
    return is_instance_of(trainer.strategy, "DeepSpeedStrategy")


def ddp_tracks_parameters(trainer: Trainer) -> bool:
    """Return whether DDP looks for parameters that the forward pass did not use, or assumes that they never change."""
    model: Any = trainer.strategy.model
    return isinstance(model, DistributedDataParallel) and (model.find_unused_parameters or model.static_graph)


def ddp_finds_unused_parameters(trainer: Trainer) -> bool:
    """Return whether DDP looks for parameters that the forward pass did not use."""
    model: Any = trainer.strategy.model
    return isinstance(model, DistributedDataParallel) and bool(model.find_unused_parameters)


def ddp_has_hooks(trainer: Trainer) -> bool:
    """Return whether a communication hook replaces DDP's mean of the gradients."""
    model: Any = trainer.strategy.model
    return isinstance(model, DistributedDataParallel) and bool(getattr(model, "_comm_hooks", None))


def ddp_hook_keeps_errors(trainer: Trainer) -> bool:
    """Return whether a communication hook of DDP keeps parts of gradients for later steps, as PowerSGD does."""
    hooks = getattr(trainer.strategy.model, "_comm_hooks", None) or ()
    return any(getattr(state, "use_error_feedback", False) or getattr(state, "warm_start", False) for _, state in hooks)


def uses_ddp(trainer: Trainer) -> bool:
    """Return whether DDP reduces the gradients."""
    return isinstance(trainer.strategy.model, DistributedDataParallel)


def tensor_parallel_size(trainer: Trainer) -> int:
    """Return how many ranks in a row share the samples of a batch under tensor parallelism."""
    mesh: Any = getattr(trainer.strategy, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return int(mesh["tensor_parallel"].size()) if "tensor_parallel" in names else 1


def mean_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks. Every rank must call it."""
    mean = trainer.strategy.reduce(tensor.detach(), reduce_op="mean") if trainer.world_size > 1 else tensor
    assert isinstance(mean, torch.Tensor)
    return mean


def any_rank(trainer: Trainer, flags: Tensor) -> Tensor:
    """Return for each flag whether it is true on any rank. Every rank must call it."""
    if trainer.world_size == 1:
        return flags
    total = trainer.strategy.reduce(flags.float(), reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total > 0
