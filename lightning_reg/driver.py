"""Calls every regularizer of a trainer at its place in the step, in one order that the callback list cannot change.

The first regularizer in the trainer's list owns the driver; the others only hold their configuration. Regularizers of the same
phase are sorted by class and name, so that even sums of floats come out the same to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS

from lightning_reg import host
from lightning_reg.plan import Step
from lightning_reg.tensors import whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from lightning_reg.base import Regularizer
    from lightning_reg.plan import Plan

__all__ = ["Driver"]


class Driver:
    """One fit's regularizers, in their order.

    Args:
        trainer: The trainer of the fit.
        pl_module: The module that is trained.
        regularizers: Its regularizers, in any order.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, regularizers: Sequence[Regularizer]) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.regularizers = sorted(regularizers, key=lambda cb: (cb.phase, type(cb).__name__, cb.name))
        self._acting = {
            hook: [cb for cb in self.regularizers if cb.overrides(hook)]
            for hook in ("permits", "gradients", "before_update", "weights", "epoch_end", "uphold")
        }
        self._adding: list[Regularizer] = []
        self._automatic = pl_module.automatic_optimization
        self._scaler: torch.amp.GradScaler | None = None
        self._plan: Plan | None = None
        self._handles: list[RemovableHandle] = []
        self._logging = False
        self._penalised = False  # whether the loss of this step has had its terms
        self._has_gradients = False  # a step whose batches all returned None is no step: nothing acts on it
        self._trained = False  # whether the epoch has had a step
        self._stepped: set[Optimizer] = set()
        self._about_to_step: set[Optimizer] = set()
        self._skipped: set[Optimizer] = set()
        self._steps_in_batch = 0

    def start(self) -> None:
        """Attach every regularizer to the module, and follow the optimizers' steps."""
        for regularizer in self.regularizers:
            regularizer.listening = bool(self.trainer.loggers)
            regularizer.attach(self.trainer, self.pl_module)
            regularizer.figures.to(self.pl_module.device)
        self._adding = [regularizer for regularizer in self.regularizers if regularizer.adds_to_loss]
        self._scaler = host.grad_scaler(self.trainer)
        for optimizer in self.trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            if self._scaler is not None:  # it has run the closure before it calls the optimizer
                self._handles.append(optimizer.register_step_pre_hook(self._before_update))
            if isinstance(optimizer, LBFGS):
                self._handles.append(optimizer.register_step_pre_hook(self._penalise_closure))

    def stop(self) -> None:
        """Leave no trace in the module and the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for regularizer in self.regularizers:
            regularizer.detach()

    def plan(self) -> None:
        """Bind the schedules to the length of the fit."""
        self._plan = host.plan(self.trainer)
        for regularizer in self.regularizers:
            regularizer.resolve(self._plan)

    def before_batch(self, batch_idx: int) -> None:
        """Move every value to the progress at which the current optimizer step began."""
        assert self._plan is not None, "Lightning calls on_train_start before the first batch"
        self._steps_in_batch = 0
        self._check_steps_are_seen()
        if host.begins_step(self.trainer, batch_idx):
            self._has_gradients = not self._automatic
        progress = self._plan.progress(host.batches_at_step_start(self.trainer, batch_idx))
        self._logging = host.logs_this_step(self.trainer)
        for regularizer in self.regularizers:
            regularizer.logging = self._logging
            regularizer.update(progress)

    def before_backward(self, loss: Tensor) -> None:
        """Add to the loss what belongs there."""
        self._has_gradients = True
        if self._adding:
            optimizer, self._penalised = self.trainer.optimizers[0], not host.accumulates(self.trainer)
            for regularizer in self._adding:
                if term := regularizer.loss_term(optimizer, self._penalised):
                    _add_(loss, *term, self._scaler)

    def before_step(self, optimizer: Optimizer) -> None:
        """Let every regularizer change the gradients of the optimizer that is about to step."""
        if not self._has_gradients:
            return
        self._about_to_step.add(optimizer)
        self._skipped.discard(optimizer)
        acting = [cb for cb in self._acting["gradients"] if not (self._penalised and cb.adds_to_loss)]
        if acting or self._acting["permits"]:
            step = self._step()
            with torch.no_grad():
                if not self._permitted(optimizer, step):
                    self._skip(optimizer)
                    return
                for regularizer in acting:
                    if params := regularizer.members(optimizer):
                        regularizer.gradients(params, optimizer, step)
        if self._scaler is None:
            self._before_update(optimizer)

    def _permitted(self, optimizer: Optimizer, step: Step) -> bool:
        """Ask every guard: no answer may keep another from counting."""
        asked = [(cb, cb.members(optimizer)) for cb in self._acting["permits"]]
        answers = [cb.permits(params, optimizer, step) for cb, params in asked if params]
        return all(answers)

    def _skip(self, optimizer: Optimizer) -> None:
        """Take the gradients away: without them an optimizer touches neither parameters nor its state."""
        self._skipped.add(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Let every regularizer decay the weights; a step that a loss scaler skips does not come here."""
        if self._acting["before_update"] and self._is_step(optimizer):
            with torch.no_grad():
                for regularizer in self._acting["before_update"]:
                    if params := regularizer.members(optimizer):
                        regularizer.before_update(params, optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Let every regularizer change the weights that an optimizer has just updated."""
        if not self._is_step(optimizer):
            self._about_to_step.discard(optimizer)
            return
        self._stepped.add(optimizer)
        if self._acting["weights"]:
            step = self._step()
            with torch.no_grad():
                for regularizer in self._acting["weights"]:
                    if params := regularizer.members(optimizer):
                        regularizer.weights(params, optimizer, step)
        self._steps_in_batch += 1
        if optimizer not in self._about_to_step:
            rank_zero_warn(
                f"{type(optimizer).__name__} stepped without Lightning's knowledge, so no penalty was added to its gradients "
                "and nothing clipped them: use self.optimizers() without use_pl_optimizer=False"
            )
        self._about_to_step.discard(optimizer)

    def _is_step(self, optimizer: Optimizer) -> bool:
        """Return whether there was something to step with, and no guard has skipped it."""
        return self._has_gradients and optimizer not in self._skipped

    def _step(self) -> Step:
        """Return which optimizer step is being taken."""
        if self._automatic:
            return Step(self.trainer.global_step)
        return Step(self.trainer.fit_loop.total_batch_idx, self._steps_in_batch)

    def _check_steps_are_seen(self) -> None:
        """Refuse an optimizer whose steps cannot be followed, unless a loss scaler may have skipped the step."""
        if self._about_to_step and self._scaler is None:
            names = ", ".join(type(optimizer).__name__ for optimizer in self._about_to_step)
            raise RuntimeError(
                f"{names} does not run the hooks of its steps, so nothing could act on the updated weights: let it subclass "
                "torch.optim.Optimizer and call super().__init__"
            )
        self._about_to_step.clear()

    def _penalise_closure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Let an optimizer that searches along a line see the objective that it is given the gradient of."""
        closure = kwargs.get("closure")
        if closure is None:
            return args, kwargs

        def penalised() -> Any:
            loss = closure()
            with torch.no_grad():
                terms = [regularizer.objective(optimizer) for regularizer in self.regularizers]
            return loss if loss is None else sum((term for term in terms if term is not None), loss)

        return args, {**kwargs, "closure": penalised}

    def after_batch(self) -> None:
        """End the epoch after its last batch, and log."""
        self._trained |= self._has_gradients
        if self._trained and host.ends_epoch(self.trainer):
            self._trained = False
            self._end_epoch()
        if self._logging and not host.accumulates(self.trainer):
            metrics = {f"reg/{cb.name}/{key}": value for cb in self.regularizers for key, value in cb.take_metrics()}
            host.log_metrics(self.trainer, dict(zip(metrics, _to_host(list(metrics.values())), strict=True)))

    def _end_epoch(self) -> None:
        """Let those act whose time is the epoch's end, and then those whose constraint they may have broken."""
        assert self._plan is not None, "a batch has been trained"
        progress = self._plan.progress(host.batches_done(self.trainer))
        with torch.no_grad():
            for regularizer in self._acting["epoch_end"]:
                regularizer.update(progress)
                regularizer.epoch_end(self._all_members(regularizer), self._step())
            for regularizer in self._acting["uphold"] if self._acting["epoch_end"] else ():
                for optimizer in self.trainer.optimizers:
                    if optimizer in self._stepped and (params := regularizer.members(optimizer)):
                        regularizer.uphold(params)

    def _all_members(self, regularizer: Regularizer) -> list[Parameter]:
        return list(dict.fromkeys(p for optimizer in self.trainer.optimizers for p in regularizer.members(optimizer)))


def _add_(loss: Tensor, value: Tensor, factor: float, scaler: torch.amp.GradScaler | None) -> None:
    """Add a value times a factor to a loss in place, multiplied by the loss scale where there is one."""
    if value.device != loss.device:
        value = value.to(loss.device)
    if scaler:
        value = scaler.scale(value)
    if value.dtype == loss.dtype:
        loss.add_(value, alpha=factor)
    else:  # the factor must not be rounded to the loss' precision
        loss.add_((factor * value).to(loss.dtype))


def _to_host(values: Sequence[float | Tensor]) -> list[float]:
    """Bring numbers from the device in a single transfer."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [whole(tensor.detach()).to(tensors[0].device, torch.float32) for tensor in tensors]
    fetched = iter(torch.stack(numbers).tolist() if numbers else [])
    return [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]
