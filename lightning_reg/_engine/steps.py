"""Follows the optimizer steps of a fit, for any optimizer, no matter how often it evaluates its closure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_reg._engine import _lightning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning.pytorch import Trainer
    from torch import Tensor
    from torch.nn import Parameter

_NO_OPTIMIZERS = ("param_groups", "state", "defaults")  # attributes of an optimizer that hold none
_MANY_BATCHES = 100  # without a visible step


class SkippedStep(Exception):  # noqa: N818 - like StopIteration, it is not an error
    """Ends an optimizer step from within its closure."""


class StepListener(Protocol):
    """Reacts to the followed steps."""

    @property
    def is_active(self) -> bool:
        """Whether steps matter now. During a fit, a learning-rate finder takes steps without callbacks."""

    @property
    def acts_on_weights(self) -> bool:
        """Whether it matters if an update happens."""

    def begin_step(self, optimizer: Optimizer) -> None:
        """Act before a step, and before the optimizer evaluates its closure."""

    def objective_terms(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the terms to add to the value of an evaluated closure."""

    def before_update(self, optimizer: Optimizer) -> None:
        """Act before an update that a loss scaler has allowed."""

    def after_update(self, optimizer: Optimizer, *, known: bool) -> None:
        """Act on the updated weights. A step that is not known was taken without Lightning."""

    def end_step(self) -> None:
        """Act after a step, even a skipped one."""


def is_torchs_own(optimizer: Optimizer) -> bool:
    """Return whether torch's own code takes the steps. Other code may evaluate its closure anywhere and restore weights."""
    return (type(optimizer).step.__module__ or "").startswith("torch.optim.")


def evaluates_once(optimizer: Optimizer) -> bool:
    """Return whether a step evaluates its closure once, before any change, and does nothing with its value but return it."""
    return is_torchs_own(optimizer) and not isinstance(optimizer, LBFGS)


def shares_parameters(optimizer: Optimizer, other: Optimizer) -> bool:
    """Return whether two optimizers hold a common parameter, as a wrapper and the optimizer within it do."""
    held = set(map(id, held_by(optimizer)))
    return any(id(p) in held for p in held_by(other))


def held_by(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def has_no_rate(optimizer: Optimizer) -> bool:
    """Return whether all learning rates are 0, as in the step that torch takes to save and load sharded checkpoints."""
    return all(group.get("lr") == 0 for group in optimizer.param_groups)


def with_inner(optimizer: Any) -> list[Any]:
    """Return an optimizer and those within it, each once, such as the one inside a wrapper like Lookahead.

    ``ZeroRedundancyOptimizer`` also keeps the state of this rank's parameters in an inner optimizer.
    """
    found, seen, waiting = [], set(), [optimizer]
    while waiting:
        candidate = waiting.pop(0)
        if id(candidate) in seen:
            continue
        seen.add(id(candidate))
        if isinstance(candidate, (list, tuple)):
            waiting += candidate
        elif isinstance(candidate, dict):
            waiting += candidate.values()
        elif _is_optimizer(candidate):
            found.append(candidate)
            waiting += (value for name, value in vars(candidate).items() if name not in _NO_OPTIMIZERS)
    return found


def _is_optimizer(candidate: Any) -> bool:
    """Return whether an object has the attributes of an optimizer that pruning needs, regardless of its class."""
    known = getattr(candidate, "__dict__", {})
    return isinstance(candidate, Optimizer) or ("state" in known and callable(getattr(candidate, "step", None)))


class StepFollower:
    """Tells a listener about the steps of a trainer's current optimizers.

    Lightning takes every step in ``strategy.optimizer_step``, regardless of the optimizer's class and of how often it
    evaluates its closure. Torch's global step hooks reveal steps that Lightning does not take, if the class of the optimizer,
    or of one that it wraps, runs step hooks.

    Args:
        trainer: The trainer of the fit.
        listener: The object to notify.
    """

    def __init__(self, trainer: Trainer, listener: StepListener) -> None:
        self.current: Optimizer | None = None  # the optimizer whose step Lightning takes now
        self.evaluations = 0  # of its closure in this step
        self.moved_early = False  # whether it changed weights before it first evaluated its closure
        self._trainer = trainer
        self._listener = listener
        self._scaler = _lightning.grad_scaler(trainer)
        self._is_updated = False
        self._undo = [
            _lightning.wrap_optimizer_step(trainer, self._step),
            register_optimizer_step_post_hook(self._after_unknown_step).remove,
        ]

    def stop(self) -> None:
        """Stop following."""
        for undo in self._undo:
            undo()

    def _step(self, take_step: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any], **options: Any) -> Any:
        if not self._listener.is_active:
            return take_step(optimizer, closure, **options)
        self.current, self.evaluations, self.moved_early = optimizer, 0, False
        stop_asking = self._ask_scaler(optimizer)
        try:
            self._listener.begin_step(optimizer)
            output = take_step(optimizer, self._with_objective(optimizer, closure), **options)
            if self._is_updated:
                self._listener.after_update(optimizer, known=True)
        except SkippedStep:
            output = None
            if self._scaler is not None:
                self._scaler.update()
        finally:
            stop_asking()
            self.current = None
            self._listener.end_step()
        return output

    def _ask_scaler(self, optimizer: Optimizer) -> Callable[[], None]:
        """Learn from a loss scaler, right before an update, whether it happens. Return a function that stops this.

        The scaler calls ``optimizer.step`` only if the update happens. It always calls a fused optimizer, but may tell it to
        change nothing.
        """
        self._is_updated = self._scaler is None
        if self._scaler is None:
            return lambda: None

        def wrapper(step: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                found_inf = getattr(optimizer, "found_inf", None)
                self._is_updated = found_inf is None or not self._listener.acts_on_weights or not found_inf.item()
                if self._is_updated:
                    self._listener.before_update(optimizer)
                return step(*args, **kwargs)

            return wrapped

        return _lightning.wrap_method(optimizer, "step", wrapper)

    def _with_objective(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Give an optimizer that uses the value of its closure the whole objective, which its gradients belong to."""
        if evaluates_once(optimizer):
            return closure
        versions = _versions(optimizer)

        def evaluate() -> Any:
            if not self.evaluations:
                self.moved_early = versions != _versions(optimizer)
            value = closure()
            return value if value is None else sum(self._listener.objective_terms(optimizer), value)

        return evaluate

    def _after_unknown_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Act after a step without Lightning, by one of the trainer's optimizers or one inside it."""
        if self.current is not None or not self._listener.is_active:
            return
        mine = self._trainer.optimizers
        owner = next((other for other in mine if other is optimizer), None)
        owner = owner or next((other for other in mine if shares_parameters(optimizer, other)), None)
        if owner is not None:
            self._listener.after_update(owner, known=False)


def _versions(optimizer: Optimizer) -> list[int]:
    """Return torch's counts of the in-place changes of each parameter."""
    return [p._version for p in held_by(optimizer)]


class UnseenSteps:
    """Warns once about callbacks that cannot act because they see no step, or no gradients before it.

    Args:
        need_steps: The names of the callbacks that act at a step.
        need_gradients: The names of those among them that do nothing without gradients.
        accumulated: The number of batches per step, as far as Lightning knows.
    """

    def __init__(self, need_steps: Sequence[str], need_gradients: Sequence[str], accumulated: Iterable[int]) -> None:
        self._need_steps, self._need_gradients = need_steps, need_gradients
        self._many = max(_MANY_BATCHES, *accumulated, 1)
        self._batches = 0
        self._is_backward_seen = self._is_step_seen = self._is_done = self._is_warned_of_unknown = False

    def backward(self) -> None:
        """Note a backward pass."""
        self._is_backward_seen = True

    def step(self, optimizer: Optimizer) -> None:
        """Note a step, and stop watching if it has gradients."""
        self._is_step_seen = True
        if not self._is_done:
            self._is_done = any(p.grad is not None for p in held_by(optimizer))

    def unknown_step(self, optimizer: Optimizer) -> None:
        """Warn about a step that Lightning does not take."""
        if not self._is_warned_of_unknown:
            self._is_warned_of_unknown = self._is_done = True
            self._warn(
                self._need_gradients,
                f"a step of {type(optimizer).__name__} that Lightning did not take: step with self.optimizers(), without "
                "use_pl_optimizer=False, and optimizer.step(). If the optimizer has steps of its own, pass a closure to step()",
            )

    def end_batch(self, *, ends_epoch: bool) -> None:
        """Warn at the end of an epoch, or of many batches."""
        self._batches += 1
        if self._is_done or not (ends_epoch or self._batches >= self._many):
            return
        batches, self._batches = f"{self._batches} batch{'es' * (self._batches > 1)}", 0
        if self._is_backward_seen:
            self._is_done = True
            if self._is_step_seen:
                self._warn(
                    self._need_gradients,
                    f"{batches}, because no step had gradients: something consumes them before on_before_optimizer_step, as an "
                    "optimizer fused into the backward pass does",
                )
            else:
                self._warn(
                    self._need_steps,
                    f"{batches}, because Lightning took no step: use self.optimizers(), without use_pl_optimizer=False, and "
                    "optimizer.step()",
                )

    def _warn(self, names: Sequence[str], where: str) -> None:
        if names:
            rank_zero_warn(f"{', '.join(names)} did not act in {where}")


def remove_gradients(optimizer: Optimizer) -> None:
    """Skip a step: without gradients, torch's optimizers change neither parameters nor their state."""
    for p in held_by(optimizer):
        p.grad = None


def by_sign(optimizer: Optimizer, params: Sequence[Parameter]) -> dict[float, list[Parameter]]:
    """Split parameters by the sign of a penalty's gradient: -1 where the optimizer maximizes, so that weights still shrink."""
    maximized = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
    if not maximized:
        return {1.0: list(params)}
    split: dict[float, list[Parameter]] = {}
    for p in params:
        split.setdefault(-1.0 if id(p) in maximized else 1.0, []).append(p)
    return split


def sign_of_penalties(optimizer: Optimizer) -> float:
    """Return -1 for an optimizer that maximizes, where a penalty must be subtracted, and NaN if only some groups maximize."""
    signs = {-1.0 if group.get("maximize") else 1.0 for group in optimizer.param_groups}
    return signs.pop() if len(signs) == 1 else math.nan


def evaluates_other_weights(optimizer: Optimizer) -> bool:
    """Return whether an optimizer evaluates different weights from those that it trains: ``train`` and ``eval`` switch."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
