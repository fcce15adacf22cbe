"""What every regularizer is: a named Lightning callback with values that may be scheduled and a place in the step.

A technique subclasses :class:`Regularizer` (or, where it acts on selected parameters,
:class:`~lightning_reg.parameters.ParameterRegularizer`), says its ``phase`` and the ``limits`` of its values, and overrides the
one or two methods that do something. When they are called is not its concern: see :mod:`lightning_reg.driver`.
"""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch import Callback

from lightning_reg import host
from lightning_reg.configuration import Configured, Interval
from lightning_reg.driver import Driver
from lightning_reg.figures import Figures
from lightning_reg.schedules import Schedule, Value
from lightning_reg.summary import print_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg.plan import Plan, Step

__all__ = ["Phase", "Regularizer", "regularizers_of"]


class Phase(IntEnum):
    """The order in which regularizers act within one optimizer step, however the callbacks are listed."""

    DROPOUT = 1
    GUARD = 2
    PENALTY = 3
    PEAK_DROPPING = 4
    CENTRALIZATION = 5
    NOISE = 6
    VALUE_CLIPPING = 7
    NORM_CLIPPING = 8
    DECAY = 9
    SOFT_THRESHOLD = 10
    SHRINKAGE = 11
    SIGN = 12
    CONSTRAINT = 13
    PRUNING = 14


class Regularizer(Configured, Callback, ABC):
    """A callback of the suite: it has a name, values at the current progress, and a phase.

    A subclass keeps its constructor's arguments as attributes of the same name and then calls this constructor.

    Args:
        name: What metrics and the checkpoint call it; by default the class, and what it acts on where that is not the default.
    """

    phase: ClassVar[Phase]
    """Where in the optimizer step it acts."""
    limits: ClassVar[Mapping[str, Interval]] = {}
    """The constructor's arguments that may be scheduled, and the numbers that each may take."""
    profiles: ClassVar[frozenset[str]] = frozenset()
    """Those of them that may be a mapping from glob to value too: each is a value of its own, such as ``p/encoder.*``."""
    selector: ClassVar[str] = "params"
    """The constructor's argument that says what it acts on."""
    instead_of_deepspeed: ClassVar[str | None] = "use DDP or FSDP2"
    """What a user of DeepSpeed, whose engine hides gradients and weights, can do instead; ``None`` where it works there."""

    def __init__(self, name: str | None) -> None:
        self.name = name or self._default_name()
        self._state_key = self._generate_state_key(name=self.name)
        self.current = {key: self._constant(key, limit, value) for key, limit, value in self._given()}
        self.listening = False  # whether the fit has a logger
        self.logging = False  # whether this step is logged
        self._applied: dict[str, float] | None = None
        self._values: dict[str, Callable[[float], float]] = {}
        self._observed: dict[str, float | Tensor] = {}
        self.figures = Figures()  # running ones, for the logger: add to them only while it is listening
        self._driver: Driver | None = None

    # What a technique overrides -------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked before the fit: called in ``setup``."""

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up what it acts on: called when the fit starts, the modules being built and the optimizers there."""

    def detach(self) -> None:
        """Undo whatever :meth:`attach` did: called when the fit is over, also by an exception."""

    def values_changed(self) -> None:
        """Take over new values from ``self.current``: called before the first batch that they apply to."""

    @property
    def adds_to_loss(self) -> bool:
        """Whether it adds :meth:`loss_term` to the loss in this fit."""
        return False

    def loss_term(self, optimizer: Optimizer, last: bool) -> tuple[Tensor, float] | None:
        """Return what to add to a batch's loss and what to multiply it by, or ``None``; ``last`` if the step is due then."""
        return None

    def objective(self, optimizer: Optimizer) -> Tensor | None:
        """Return what it adds to the objective, for an optimizer that reads its value."""
        return None

    def permits(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> bool:
        """Return whether the step may happen: asked, the same on every rank, before anything else acts on it."""
        return True

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Change the gradients of the stepping optimizer's selected parameters: after unscaling, before the update.

        Not called where the loss of this step has had its :meth:`loss_term`.
        """

    def before_update(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Change the selected parameters between the backward pass and an update that will really happen."""

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Change the stepping optimizer's selected parameters: right after the update of this step."""

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Act on all optimizers' selected parameters: after the last batch of an epoch, before its validation."""

    def uphold(self, params: list[Parameter]) -> None:
        """Make parameters again what :meth:`weights` has made them: after others have acted at the end of an epoch."""

    def members(self, optimizer: Optimizer) -> list[Parameter]:
        """Return the selected parameters that an optimizer holds, in its order."""
        return []

    @abstractmethod
    def acts_on(self) -> str:
        """Say in a few words what it acts on, for the summary."""

    @abstractmethod
    def route(self) -> str:
        """Say where in the step it acts, for the summary."""

    def overrides(self, method: str) -> bool:
        """Return whether it has a method of its own in place of one that does nothing."""
        return getattr(type(self), method) is not getattr(Regularizer, method)

    # Metrics --------------------------------------------------------------------------------------------------------

    def observe(self, **metrics: float | Tensor) -> None:
        """Keep figures of this step for the logger; call it only when ``self.logging``."""
        self._observed.update(metrics)

    def take_metrics(self) -> Iterator[tuple[str, float | Tensor]]:
        """Yield the names and values to log, and begin anew."""
        yield from self.current.items()
        yield from self._observed.items()
        yield from self.figures.take()
        self._observed.clear()

    # Values ---------------------------------------------------------------------------------------------------------

    def resolve(self, plan: Plan) -> None:
        """Bind schedules to the length of the fit."""
        self._applied = None
        self._values.clear()
        self._observed.clear()
        for key, limit, value in self._given():
            if isinstance(value, Schedule):
                self._values[key] = value.resolve(plan)
            elif callable(value) and math.isinf(plan.total):
                raise ValueError(f"{self.name}: {key}={value!r} is a function of progress: {plan.why_no_end()}")
            elif callable(value):
                self._values[key] = value
            else:
                self.current[key] = self._constant(key, limit, value)

    def update(self, progress: float) -> None:
        """Move the scheduled values to a progress."""
        for key, limit, value in self._given() if self._values else ():
            if key in self._values:
                number = self._values[key](progress)
                if type(number) is not float or number not in limit:  # the message would cost more than the rest
                    number = limit.check(f"{self.name}: {key}={value!r} at progress {progress:g}", number)
                self.current[key] = number
        if self.current != self._applied:
            self._applied = dict(self.current)
            self.values_changed()

    def _given(self) -> Iterator[tuple[str, Interval, Value]]:
        """Yield what the constructor was given for each value, by the key of the value, with the numbers that it may take."""
        for key, limit in self.limits.items():
            given: Value | Mapping[str, Value] = getattr(self, key)
            if isinstance(given, Mapping) and key in self.profiles:
                yield from ((f"{key}/{glob}", limit, value) for glob, value in given.items())
            else:
                yield key, limit, cast("Value", given)

    def _constant(self, key: str, limit: Interval, value: Value) -> float:
        """Check a value that was given to the constructor; return it, or a placeholder until a schedule has begun."""
        what = f"{type(self).__name__}: {key}"
        if isinstance(value, Schedule):
            extremes = [limit.check(f"{what}={value!r}", extreme) for extreme in value.extremes]
            return extremes[0]
        if callable(value):
            return math.nan
        return limit.check(what, value)

    def _refuse_endless(self, trainer: Trainer) -> None:
        for key, _, value in self._given():
            if (isinstance(value, Schedule) and value.needs_end) or (callable(value) and not isinstance(value, Schedule)):
                raise ValueError(
                    f"{self.name}: {key}={value!r} is scheduled over fractions of training, but the run has no end "
                    "(max_epochs=-1): set max_epochs or max_steps, or count epochs or steps, as in until='3ep' or '500st'"
                )

    # Names ----------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Return the key of its state in a checkpoint, its own for each name."""
        return self._state_key  # Lightning asks for it with every hook

    def _as_given(self, argument: str) -> Any:
        """Return a constructor's argument for ``repr``: a name that was made up counts as none."""
        made_up = argument == "name" and self.name == self._default_name()
        return None if made_up else super()._as_given(argument)

    def _default_name(self) -> str:
        signatures = (inspect.signature(cls).parameters for cls in type(self).__mro__ if issubclass(cls, Regularizer))
        parameter = next((found[self.selector] for found in signatures if self.selector in found), None)
        wanted = getattr(self, self.selector, None)
        if parameter is None or wanted == parameter.default:
            return type(self).__name__
        parts = wanted if isinstance(wanted, list) else [getattr(wanted, "__name__", str(wanted))]
        return "-".join([type(self).__name__, *(re.sub(r"\W+", "_", part).strip("_") for part in parts)])

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the configuration against the run."""
        if stage != "fit":
            return
        if self.instead_of_deepspeed and host.uses_deepspeed(trainer):
            raise ValueError(f"{type(self).__name__} cannot work under DeepSpeed: {self.instead_of_deepspeed}")
        if host.endless(trainer):
            self._refuse_endless(trainer)
        if sum(cb.name == self.name for cb in regularizers_of(trainer)) > 1:
            raise ValueError(
                f"two callbacks are called {self.name!r}: tell them apart with name='…', for metrics and checkpoints"
            )
        self.figures.clear()  # before a checkpoint brings those of the run that is resumed
        self.prepare(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the first regularizer of the list drive all of them, and say what they act on."""
        regularizers = regularizers_of(trainer)
        if regularizers[0] is self:
            self._driver = Driver(trainer, pl_module, regularizers)
            self._driver.start()
            print_summary(trainer, self._driver.regularizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the schedules: the data are loaded now."""
        if self._driver:
            self._driver.plan()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move every value to the current progress."""
        if self._driver:
            self._driver.before_batch(batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the penalties to the loss."""
        if self._driver:
            self._driver.before_backward(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Change the gradients."""
        if self._driver:
            self._driver.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        if self._driver:
            self._driver.after_batch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self._stop()

    def _stop(self) -> None:
        if self._driver:
            self._driver.stop()
            self._driver = None


def regularizers_of(trainer: Trainer) -> list[Regularizer]:
    """Return the regularizers among a trainer's callbacks."""
    return [cb for cb in trainer.callbacks if isinstance(cb, Regularizer)]  # type: ignore[attr-defined]
