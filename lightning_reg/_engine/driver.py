"""Calls the techniques of a fit at the right time, in an order that does not depend on the callback list.

The first regularizer in the trainer's list owns the driver; the others only hold their configuration. Techniques of one phase
are sorted by class and name, so that even sums of floats are bitwise equal.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_reg._engine import _lightning
from lightning_reg._engine.averaging import wrap_averagers
from lightning_reg._engine.clock import Clock
from lightning_reg._engine.forward import ForwardChanges
from lightning_reg._engine.plan import Step
from lightning_reg._engine.ranks import Agreement, agree, may_differ, mean_of_all
from lightning_reg._engine.rows import LoggerRows
from lightning_reg._engine.steps import (
    SkippedStep,
    StepFollower,
    UnseenSteps,
    evaluates_once,
    evaluates_other_weights,
    has_no_rate,
    held_by,
    remove_gradients,
)
from lightning_reg._tensors.shards import full_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Moment
    from lightning_reg._engine.technique import Technique

AnyTechnique = TypeVar("AnyTechnique", bound="Technique")

_METHODS = (
    "before_batch",
    "before_forward",
    "begin_step",
    "should_step",
    "gradients",
    "before_update",
    "weights",
    "step_end",
    "after_step",
    "epoch_end",
    "reproject",
    "data_ready",
    "validated",
)
_STEP_METHODS = ("begin_step", "should_step", "gradients", "before_update", "weights", "step_end")


class Driver:
    """The techniques of one fit, in the order in which they act.

    Args:
        trainer: The trainer of the fit.
        pl_module: The module to train.
        techniques: Its techniques, in any order.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, techniques: Sequence[Technique]) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.techniques = in_order(techniques)
        self._acting = {method: [cb for cb in self.techniques if cb.overrides(method)] for method in _METHODS}
        self._adding: list[Technique] = []
        self._automatic = pl_module.automatic_optimization
        self._scaler: torch.amp.GradScaler | None = None
        self._clock: Clock | None = None
        self._epoch = self._batch = -1  # the current epoch, and the number of the current batch in the fit
        self._ended = -1  # the last batch that has ended
        self._steps: StepFollower | None = None
        self._unseen = UnseenSteps([], [], [])
        self._rows = LoggerRows(trainer)
        self._undo: list[Callable[[], None]] = []
        self._stopped = False
        self._agreement = Agreement(logs=False, log_every_n_steps=1)
        self._logging = False
        self._penalized = False  # whether the loss of this step contains its terms
        self._has_gradients = False  # if all batches of a step returned None, nothing acts on it
        self._trained = False  # whether the epoch has had a step, and has not ended yet
        self._validates = False  # whether a validation has begun and not ended yet
        self._forward = ForwardChanges(self._acting["before_forward"], self._all_parameters, self._step, self._automatic)
        self._stepped: set[Optimizer] = set()
        self._about_to_step: set[Optimizer] = set()
        self._skipped: set[Optimizer] = set()
        self._steps_in_batch = 0
        self._unknown_steps = 0  # those that Lightning has not taken, and does not count

    # The fit --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Compare the callbacks of all ranks, attach every technique to the module, and follow the optimizers' steps."""
        self._agreement = agree(self.trainer, self.techniques)
        self._set_recording(True)
        for technique in self.techniques:
            technique.attach(self.trainer, self.pl_module)
        self._unseen = self._unseen_steps()
        self._scaler = _lightning.grad_scaler(self.trainer)
        self._warn_of_other_weights()
        self._steps = StepFollower(self.trainer, self)
        self._undo += [self._steps.stop, self._rows.start()]
        if self._acting["before_forward"]:
            enter, leave = self._forward.enter_training_step, self._forward.leave_training_step
            self._undo.append(_lightning.wrap_training_step(self.trainer, enter, leave))
            if not self._automatic:
                self._undo.append(register_optimizer_step_pre_hook(self._forward.before_manual_step).remove)

    def _warn_of_other_weights(self) -> None:
        names = ", ".join(cb.name for cb in self._acting["weights"])
        others = [type(optimizer).__name__ for optimizer in self.trainer.optimizers if evaluates_other_weights(optimizer)]
        if names and others:
            rank_zero_warn(
                f"{', '.join(others)} evaluates different weights from those that it trains. {names} changes only the trained "
                "ones, so constraints may not hold for the others, which are validated and saved after optimizer.eval()"
            )

    def _unseen_steps(self) -> UnseenSteps:
        """Watch for steps that are not seen, or have no gradients. Penalties of the loss need neither."""
        need_steps = [cb for cb in self.techniques if not cb.adds_to_loss and any(map(cb.overrides, _STEP_METHODS))]
        need_gradients = [
            cb
            for cb in need_steps
            if cb.overrides("should_step")
            or cb.overrides("before_update")
            or (cb.overrides("gradients") and not cb.overrides("weights"))
        ]
        accumulated = _lightning.batches_per_step(self.trainer).values()
        return UnseenSteps([cb.name for cb in need_steps], [cb.name for cb in need_gradients], accumulated)

    def stop(self) -> None:
        """Leave no trace in the module, the optimizers, and the strategy, even if one cleanup fails."""
        if self._stopped:
            return
        self._stopped = True
        with ExitStack() as stack:
            for undo in (*(technique.detach for technique in self.techniques[::-1]), *self._undo[::-1], self._forward.undo):
                stack.callback(undo)  # all are called, in reverse order, whatever the others raise
        self._undo.clear()

    def start_clock(self) -> None:
        """Start or resume the clock, check the schedules, and follow the averages of other callbacks."""
        if self._clock is not None:
            return
        plan = _lightning.plan_of(self.trainer, in_batch=False)
        self._clock = Clock(plan, is_trial=bool(self.trainer.fast_dev_run))  # type: ignore[attr-defined]
        if state := next((technique.saved_clock for technique in self.techniques if technique.saved_clock), None):
            self._clock.load_state_dict(state)
            self._clock.begin_epoch(plan, _lightning.point_of(self.trainer, in_batch=False))
        for technique in self.techniques:
            technique.resolve(self._clock)
        if self._acting["reproject"]:
            self._undo += _lightning.wrap_average_updates(self.trainer, self._after_average_update)
            self._undo += wrap_averagers(self.trainer, self._after_average_over_ranks)
        for technique in self._acting["data_ready"]:
            technique.data_ready()
        self._adding = [technique for technique in self.techniques if technique.adds_to_loss]
        self._publish(self.techniques)

    def _set_recording(self, records: bool) -> None:
        """Switch the metrics of techniques on or off."""
        for technique in self.techniques:
            technique.has_logger = records and self._agreement.logs
            technique.logging = records and self._logging

    # The forward and backward pass ----------------------------------------------------------------------------------

    def before_batch(self) -> None:
        """Set every value to that at the start of the current optimizer step. Called at least once per batch."""
        number = _lightning.batch_number(self.trainer)
        if number == self._batch:
            return
        assert self._clock is not None, "Lightning calls on_train_start before the first batch"
        if self._epoch != self.trainer.current_epoch:
            self._clock.begin_epoch(_lightning.plan_of(self.trainer), _lightning.point_of(self.trainer))
        self._epoch, self._batch, self._steps_in_batch = self.trainer.current_epoch, number, 0
        if _lightning.begins_step(self.trainer):
            self._has_gradients = not self._automatic
        self._logging = _lightning.logs_this_step(self.trainer, *self._agreement)
        self._set_recording(True)
        self._update(self._clock.advance(_lightning.point_of(self.trainer)))
        for technique in self._acting["before_batch"]:
            technique.before_batch()

    def _update(self, moment: Moment) -> None:
        for technique in self.techniques:
            technique.update(moment)

    def after_backward(self) -> None:
        """Undo what was changed for the forward pass."""
        self._forward.after_backward()

    def before_backward(self, loss: Tensor) -> None:
        """Add the terms of techniques to the loss."""
        self._has_gradients = True
        self._unseen.backward()
        if self._adding and loss.requires_grad:  # else torch's own error must come, that the loss has no graph
            optimizer = self._current_optimizer or self.trainer.optimizers[0]
            self._penalized = not _lightning.accumulates(self.trainer)
            for technique in self._adding:
                technique.before_loss_term(loss)
            for technique in self._adding:
                if term := technique.loss_term(optimizer, self._penalized):
                    _add_(loss, *term, self._scaler)

    # The optimizer step ---------------------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether the trainer has its callbacks. A learning-rate finder temporarily removes them."""
        return self.techniques[0] in self.trainer.callbacks  # type: ignore[attr-defined]

    @property
    def acts_on_weights(self) -> bool:
        """Whether some technique acts only if there is an update."""
        return any(self._acting[method] for method in ("before_update", "weights", "step_end", "after_step"))

    @property
    def _current_optimizer(self) -> Optimizer | None:
        return self._steps.current if self._steps is not None else None

    def begin_step(self, optimizer: Optimizer) -> None:
        """Let every technique act before a step. In manual optimization, a batch may have several, each at its own moment."""
        if self._clock is None:
            return
        if not self._automatic and self._steps_in_batch:
            self._update(self._clock.advance(_lightning.point_of(self.trainer)))
        for technique in self._acting["begin_step"]:
            if params := technique.parameters_of(optimizer):
                with torch.no_grad():
                    technique.begin_step(params, optimizer)

    def before_step(self, optimizer: Optimizer) -> None:
        """Let every technique change the gradients of the optimizer that is about to step."""
        assert self._steps is not None, "the fit has started"
        self._unseen.step(optimizer)
        if not self._has_gradients:
            return
        self._steps.evaluations += 1
        is_first = self._steps.evaluations == 1
        if self._steps.evaluations == 2:  # metrics are those of the first evaluation
            self._set_recording(False)
        self._about_to_step.add(optimizer)
        self._skipped.discard(optimizer)
        self._forward.undo(optimizer)
        acting = [cb for cb in self._acting["gradients"] if not (self._penalized and cb.adds_to_loss)]
        if acting or self._acting["should_step"]:
            step = self._step()
            with torch.no_grad():
                if not self._should_step(optimizer, step):
                    self._skip(optimizer)
                    return
                for technique in acting:
                    if params := technique.parameters_of(optimizer):
                        technique.gradients(params, optimizer, step)
        if self._scaler is None and is_first:
            self.before_update(optimizer)

    def _should_step(self, optimizer: Optimizer, step: Step) -> bool:
        """Ask every guard, since each one counts steps."""
        asked = [(cb, cb.parameters_of(optimizer)) for cb in self._acting["should_step"]]
        answers = [cb.should_step(params, optimizer, step) for cb, params in asked if params]
        return all(answers)

    def _skip(self, optimizer: Optimizer) -> None:
        """Skip a step without a trace: remove the gradients, or end another optimizer's step before it changes anything."""
        assert self._steps is not None, "the fit has started"
        if self._steps.evaluations > 1 or self._steps.moved_early:
            names = ", ".join(cb.name for cb in self._acting["should_step"])
            raise RuntimeError(
                f"{names} cannot skip this step of {type(optimizer).__name__} at evaluation {self._steps.evaluations} of its "
                "closure, because the weights have moved since the step began: use policy='zero' or 'raise'"
            )
        self._skipped.add(optimizer)
        remove_gradients(optimizer)
        if not evaluates_once(optimizer) and self._current_optimizer is optimizer:
            raise SkippedStep

    def before_update(self, optimizer: Optimizer) -> None:
        """Let every technique decay the weights. Not called in a step that a loss scaler skips."""
        if self._acting["before_update"] and self._is_step(optimizer):
            with torch.no_grad():
                for technique in self._acting["before_update"]:
                    if params := technique.parameters_of(optimizer):
                        technique.before_update(params, optimizer)

    def after_update(self, optimizer: Optimizer, *, known: bool) -> None:
        """Let every technique change the weights that an optimizer has just updated."""
        if not known and self._ended == self._batch and has_no_rate(optimizer):  # torch is saving or loading a checkpoint
            return
        is_step = self._is_step(optimizer)
        was_announced = optimizer in self._about_to_step
        self._about_to_step.discard(optimizer)
        if not is_step or (known and not was_announced):  # no evaluation: there is no closure, or it was not called
            self._hold_after_old_gradients(optimizer)
            return
        self._stepped.add(optimizer)
        if self._acting["weights"] or self._acting["step_end"]:
            self._unknown_steps += not known
            self._change_weights(optimizer, self.trainer.global_step + known + self._unknown_steps)
        for technique in self._acting["after_step"]:
            if params := technique.parameters_of(optimizer):
                with torch.no_grad():
                    technique.after_step(params, optimizer)
        self._steps_in_batch += 1
        if not known:
            self._unseen.unknown_step(optimizer)
            self.end_step()

    def _hold_after_old_gradients(self, optimizer: Optimizer) -> None:
        """Reproject after a step with the gradients of an earlier one.

        Lightning takes one at the end of the epoch in which weight averaging updates the statistics of batch normalization.
        """
        if self._acting["reproject"] and optimizer not in self._skipped and any(p.grad is not None for p in held_by(optimizer)):
            with torch.no_grad():
                self._reproject()

    def _change_weights(self, optimizer: Optimizer, done: int) -> None:
        """Let every technique act after a step, given the number of steps so far, and then at the end of the step."""
        step = self._step()
        with torch.no_grad():
            for technique in self._acting["weights"]:
                if params := technique.parameters_of(optimizer):
                    technique.weights(params, optimizer, step)
            if changed := [technique for technique in self._acting["step_end"] if technique.step_end(step, done)]:
                self._reproject()
                self._publish(changed)

    def end_step(self) -> None:
        """Restore the weight changes for a forward pass."""
        self._forward.end_step()

    def _is_step(self, optimizer: Optimizer) -> bool:
        """Return whether there were gradients, and no guard has skipped the step."""
        return self._has_gradients and optimizer not in self._skipped

    def _step(self) -> Step:
        """Return the number of the current optimizer step."""
        evaluation = max(self._steps.evaluations - 1, 0) if self._steps is not None else 0
        if self._automatic:
            return Step(self.trainer.global_step, evaluation=evaluation, is_penalized=self._penalized)
        return Step(self.trainer.fit_loop.total_batch_idx, self._steps_in_batch, evaluation)

    def objective_terms(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the terms that the techniques add to the objective."""
        with torch.no_grad():
            terms = [technique.objective(optimizer) for technique in self.techniques]
        return [term for term in terms if term is not None]

    # The end of the batch and the epoch -----------------------------------------------------------------------------

    def after_batch(self) -> None:
        """End the epoch after its last batch, and log. Called at least once per batch."""
        if self._ended == self._batch:
            return
        self._ended = self._batch
        is_last = _lightning.ends_epoch(self.trainer)
        self._trained |= self._has_gradients
        self._unseen.end_batch(ends_epoch=is_last)
        if self._trained and is_last:
            self._end_epoch()
        if self._logging and not _lightning.accumulates(self.trainer):
            self._log({f"reg/{cb.name}/{key}": value for cb in self.techniques for key, value in cb.collect_metrics()})

    def _log(self, metrics: dict[str, float | Tensor]) -> None:
        """Add metrics to the next row of the loggers, and make them available to callbacks that monitor one.

        Every rank computes them, even one without a logger. Metrics of a user's own techniques may depend on a rank's data.
        """
        numbers = dict(zip(metrics, _to_numbers(list(metrics.values())), strict=True))
        if of_users := tuple(f"reg/{cb.name}/" for cb in self.techniques if may_differ(cb)):
            numbers |= mean_of_all(self.trainer, {key: value for key, value in numbers.items() if key.startswith(of_users)})
        self._rows.add(numbers)

    def _publish(self, techniques: Iterable[Technique]) -> None:
        """Publish the metrics that callbacks may monitor before a step is logged or an epoch ends."""
        mine = [cb for cb in techniques if not may_differ(cb)]  # what others return may depend on a rank's data
        self._rows.publish({f"reg/{cb.name}/{key}": value for cb in mine for key, value in cb.epoch_metrics().items()})

    def before_validation(self) -> None:
        """End an epoch that is cut short, so that the validated weights are the saved ones."""
        self._validates = True
        if self._trained and (_lightning.stops_early(self.trainer) or _lightning.ends_epoch(self.trainer)):
            self._end_epoch()

    def after_validation(self) -> None:
        """Let techniques look at the validated module."""
        if self._validates:
            self._validates = False
            for technique in self._acting["validated"]:
                technique.validated()

    def after_epoch(self) -> None:
        """End an epoch whose last batch was not known to be the last. An epoch that ``max_steps`` cuts short has not ended."""
        if self._trained and _lightning.ends_epoch(self.trainer):
            self._end_epoch()

    def _end_epoch(self) -> None:
        """Let techniques act at the epoch's end, and then reproject, since constraints may be violated."""
        assert self._clock is not None, "a batch has been trained"
        self._trained = False
        moment = self._clock.advance(_lightning.point_after_epoch(self.trainer))
        with torch.no_grad():
            for technique in self._acting["epoch_end"]:
                technique.update(moment)
                technique.epoch_end(self._all_parameters(technique), self._step())
            if self._acting["epoch_end"]:
                self._reproject()
        self._log({f"reg/{cb.name}/{key}": value for cb in self.techniques for key, value in cb.epoch_metrics().items()})

    def _reproject(self) -> None:
        """Enforce constraints that pruning or shrinkage may have violated."""
        for technique in self._acting["reproject"]:
            for optimizer in self.trainer.optimizers:
                if optimizer in self._stepped and (params := technique.parameters_of(optimizer)):
                    technique.reproject(params)

    def _after_average_update(self, average: Module) -> None:
        """Project an average of the weights, since the average of feasible weights may be infeasible."""
        with torch.no_grad():
            for technique in self._acting["reproject"]:
                technique.reproject_copy(average)

    def _after_average_over_ranks(self) -> None:
        """Project the average of the ranks' weights, since the average of feasible weights may be infeasible."""
        with torch.no_grad():
            self._reproject()

    def _all_parameters(self, technique: Technique) -> list[Parameter]:
        return list(dict.fromkeys(p for optimizer in self.trainer.optimizers for p in technique.parameters_of(optimizer)))


def in_order(techniques: Iterable[AnyTechnique]) -> list[AnyTechnique]:
    """Sort techniques in the order in which they act: by phase, then by class and name."""
    return sorted(techniques, key=lambda cb: (cb.phase, type(cb).__name__, cb.name))


def _add_(loss: Tensor, value: Tensor, factor: float, scaler: torch.amp.GradScaler | None) -> None:
    """Add a value times a factor to a loss in place, multiplied by the loss scale if there is one."""
    if value.device != loss.device:
        value = value.to(loss.device)
    if scaler:
        value = scaler.scale(value)
    if value.dtype == loss.dtype:
        loss.add_(value, alpha=factor)
    else:  # the factor must not be rounded to the loss' precision
        loss.add_((factor * value).to(loss.dtype))


def _to_numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Return values as Python numbers, with a single transfer from the device."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [full_tensor(tensor.detach()).to(tensors[0].device, torch.float32) for tensor in tensors]
    fetched = iter(torch.stack(numbers).tolist() if numbers else [])
    return [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]
