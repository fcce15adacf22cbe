"""What a technique is: a name, a phase of the step, values that may be scheduled, metrics, state, and methods to override.

A technique subclasses ``lightning_reg.custom.Regularizer`` or a base class for selected parameters or modules. It sets its
``phase`` and the ``valid_ranges`` of its values, and overrides one or two methods. The driver
(:mod:`lightning_reg._engine.driver`) calls them at the right time.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch.utilities import rank_zero_warn

from lightning_reg._engine.arguments import Interval, SignatureRepr, constructor_arguments, described_value, readable, text_keys
from lightning_reg._engine.class_checks import check_arguments, check_class
from lightning_reg._engine.command_line import is_function_path
from lightning_reg._engine.kinds import KEYWORDS
from lightning_reg._engine.metrics import RunningMetrics
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.state_checks import STATE_LAYOUT, check_entries, check_state
from lightning_reg._tensors.shards import full_tensor
from lightning_reg.schedules import Schedule, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Clock, Moment
    from lightning_reg._engine.plan import Step

_LONG = 4  # entries of a list that the summary shows


_PARAMETER_METHODS = (
    "before_forward",
    "begin_step",
    "should_step",
    "gradients",
    "before_update",
    "weights",
    "after_step",
    "reproject",
)


class Phase(IntEnum):
    """The order in which techniques act within one optimizer step, regardless of the order of the callback list."""

    FORWARD = 0
    DROPOUT = 1
    GUARD = 2
    MONITOR = 3
    PENALTY = 4
    PEAK_DROPPING = 5
    CENTRALIZATION = 6
    NOISE = 7
    VALUE_CLIPPING = 8
    NORM_CLIPPING = 9
    DECAY = 10
    SOFT_THRESHOLD = 11
    SHRINKAGE = 12
    PRUNING = 13
    NON_NEGATIVE = 14
    CONSTRAINT = 15


class Technique(SignatureRepr, ABC):
    """A technique with values at the current progress, metrics, and state.

    A subclass stores every argument of its constructor as an attribute of the same name, and then calls this constructor.

    Args:
        name: The name in metrics and checkpoints. Built from the class and any non-default selection by default.

    Raises:
        TypeError: If an argument of the constructor is not stored under its own name, or for other mistakes in a class that
            ``class_checks`` lists.
    """

    phase: ClassVar[Phase]
    """When the technique acts in the optimizer step."""
    valid_ranges: ClassVar[Mapping[str, Interval]] = {}
    """The constructor arguments that may be scheduled, each with its valid range."""
    accept_mappings: ClassVar[frozenset[str]] = frozenset()
    """Those that may also be a mapping from globs to values. Each glob has its own value, such as ``p/encoder.*``."""
    selector: ClassVar[str] = "params"
    """The constructor argument that selects what the technique acts on."""
    deepspeed_alternative: ClassVar[str | None] = "use DDP or FSDP2"
    """The alternative for DeepSpeed, whose engine hides gradients and weights, or ``None`` if the technique works."""
    state_entries: ClassVar[tuple[str, ...]] = ()
    """The entries of ``self.state``, each a dictionary in checkpoints, keyed by optimizer index or parameter name."""
    prints_always: ClassVar[bool] = False
    """Whether to print ``fit_summary`` even if ``enable_model_summary=False``."""
    resets_each_fit: ClassVar[bool] = True
    """Whether a new fit starts with empty state."""
    fit_attributes: ClassVar[tuple[str, ...]] = ("_clock", "_schedules")
    """The attributes that hold parts of a fit, such as its trainer or tensors. In copies, they are empty or ``None``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_class(cls)
        ignored = [method for method in _PARAMETER_METHODS if cls.overrides(method)]
        if ignored and not cls.overrides("parameters_of"):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(ignored)}, which act on selected parameters, but selects none: subclass "
                "ParameterRegularizer, or override parameters_of too"
            )

    def __init__(self, name: str | None) -> None:
        if not isinstance(name, (str, type(None))):
            raise TypeError(f"{type(self).__name__}: name must be a string, got {described_value(name)}")
        self.name = name or ""
        check_arguments(self)
        for key in self.accept_mappings:
            if isinstance(given := getattr(self, key), Mapping):
                setattr(self, key, text_keys(given))
        self.name = name or self._default_name()
        self.current = {key: self._check_value(key, valid, value) for key, valid, value in self._values_given()}
        self.has_logger = False  # whether the fit has a logger
        self.logging = False  # whether this step is logged
        self.running = RunningMetrics()  # update them only if there is a logger
        self.state: dict[str, dict[Any, Any]] = {entry: {} for entry in _declared(type(self), "state_entries")}
        self._applied: dict[str, float] | None = None
        self._schedules: dict[str, Callable[[Moment], float]] = {}
        self._clock: Clock | None = None
        self.saved_clock: dict[str, Any] | None = None  # the clock in the checkpoint that is resumed
        self._step_metrics: dict[str, float | Tensor] = {}

    # Methods that a technique overrides -----------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked before the fit. Called in ``setup``."""

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the targets. Called when the fit starts, once the modules and the optimizers exist."""

    def data_ready(self) -> None:
        """Look at the data. Called once per fit, before the first batch, when the loaders exist."""

    def detach(self) -> None:
        """Undo ``attach``. Called when the fit is over, even after an exception."""

    def values_changed(self) -> None:
        """Apply new values in ``self.current``. Called before the first batch that they apply to."""

    def before_batch(self) -> None:
        """Look at the module before each training batch. Called once per batch, after ``values_changed``."""

    def before_forward(self, params: list[Parameter], step: Step) -> None:
        """Change selected parameters for one forward and backward pass. Called before each forward pass of a training step."""

    def after_backward(self, params: list[Parameter]) -> None:
        """Undo ``before_forward`` for these parameters. Called after the backward pass, before techniques use the gradients.

        In manual optimization, these are the parameters of the optimizer that is about to step. Techniques are undone in
        reverse order.
        """

    @property
    def zeroes_gradients(self) -> bool:
        """Whether the technique may set gradients to zero before penalties are added to them."""
        return False

    @property
    def adds_to_loss(self) -> bool:
        """Whether ``loss_term`` is added to the loss in this fit."""
        return False

    def before_loss_term(self, loss: Tensor) -> None:
        """Look at the loss of a batch before terms are added to it. Called before ``loss_term``."""

    def loss_term(self, optimizer: Optimizer, last: bool) -> tuple[Tensor, float] | None:
        """Return a value to add to a batch's loss and its factor, or ``None``. ``last``: the optimizer steps after it."""
        return None

    def objective(self, optimizer: Optimizer) -> Tensor | None:
        """Return the term that it adds to the objective, for an optimizer that reads the objective's value."""
        return None

    def begin_step(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Look at the selected parameters before a step, and before the optimizer evaluates its closure."""

    def should_step(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> bool:
        """Return whether the step may happen. The answer must be the same on every rank. Called before anything else acts."""
        return True

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Change the gradients of the stepping optimizer's selected parameters. Called after unscaling, before the update.

        Not called if the loss of this step contains its ``loss_term``. If an optimizer evaluates its closure several times in
        a step, this is called after each evaluation, and ``step.evaluation`` counts them.
        """

    def before_update(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Change the selected parameters between the first backward pass of a step and an update that is certain to happen."""

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Change the stepping optimizer's selected parameters right after the update of this step."""

    def step_end(self, step: Step, done: int) -> bool:
        """Act after each step of any optimizer, once weights have changed. Return whether this has changed them further.

        ``done`` is the number of steps including this one, counted as in ``trainer.global_step``, plus steps that Lightning
        has not taken.
        """
        return False

    def after_step(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Look at the stepping optimizer's selected parameters after all changes in this step."""

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Change all optimizers' selected parameters after the last batch of an epoch, before its validation."""

    def reproject(self, params: list[Parameter]) -> None:
        """Enforce the constraint of ``weights`` again, after other techniques have acted at the end of an epoch."""

    def reproject_copy(self, copy: Module) -> None:
        """Enforce what ``reproject`` enforces in a copy of the module, such as an average of the weights."""

    def validated(self) -> None:
        """Look at the module after the last batch of a validation, while it is still in its validated state.

        Called before any other callback learns that the validation is over, and also after Lightning's sanity check.
        """

    def fit_over(self) -> None:
        """Draw conclusions when the fit has ended without an exception. Called on every rank, before ``fit_summary``."""

    def fit_summary(self) -> str | None:
        """Return a line about the whole fit to print when it ends, or ``None``."""
        return None

    def prepare_predict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked before predictions. Called in ``setup`` if the class overrides ``start_predict``."""

    def start_predict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare predictions. Called when ``trainer.predict`` starts."""

    def stop_predict(self) -> None:
        """Undo ``start_predict``. Called when ``trainer.predict`` ends, even after an exception."""

    def parameters_of(self, optimizer: Optimizer) -> list[Parameter]:
        """Return the selected parameters that an optimizer holds, in its order."""
        return []

    @abstractmethod
    def acts_on(self) -> str:
        """Describe what the technique acts on, for the summary."""

    @abstractmethod
    def route(self) -> str:
        """Describe where the technique acts, for the summary."""

    def settings(self) -> list[str]:
        """Describe the constructor arguments that may be scheduled or differ from their defaults, for the summary."""
        arguments = [argument for argument in constructor_arguments(type(self)) if argument.name != "name"]
        given = [(arg, getattr(self, arg.name)) for arg in arguments]
        return [
            f"{arg.name}={_abbreviated(value)}" for arg, value in given if arg.name in self.valid_ranges or value != arg.default
        ]

    def notes(self) -> list[str]:
        """Return notes for the lines below the summary."""
        return []

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Return whether the class overrides a method of this one."""
        return getattr(cls, method) is not getattr(Technique, method)

    # Metrics --------------------------------------------------------------------------------------------------------

    def log_metrics(self, **metrics: float | Tensor) -> None:
        """Log metrics of this step as ``reg/<name>/<metric>``. Call it only if ``self.logging``."""
        self._step_metrics.update(metrics)

    def epoch_metrics(self) -> dict[str, float]:
        """Return metrics of changes at the end of an epoch, or in ``step_end`` if that returns ``True``.

        They are logged at the end of each epoch, even on steps without logging, and other callbacks can read them from the
        start of the fit.
        """
        return {}

    def collect_metrics(self) -> Iterator[tuple[str, float | Tensor]]:
        """Yield the names and values to log, and reset them."""
        yield from self.current.items()
        yield from self._step_metrics.items()
        yield from self.running.compute_and_reset()
        self._step_metrics.clear()

    # State ----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies and pickles: nothing of a fit, since callbacks in hyperparameters enter checkpoints."""
        of_fit = set(_declared(type(self), "fit_attributes"))
        return {name: _emptied(value) if name in of_fit else value for name, value in vars(self).items()}

    def reset(self) -> None:
        """Forget the state and the running metrics of earlier fits."""
        self.running.reset()
        for entry in self.state.values():
            entry.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, or an empty dictionary. With sharded parameters, every rank must call it."""
        metrics, state = self.running.state_dict(), self.pack_state()
        clock = {"clock": self._clock.state_dict()} if self._clock and self._schedules else {}
        return {"layout": STATE_LAYOUT, "metrics": metrics, "state": state, **clock} if metrics or state or clock else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the resumed run.

        Raises:
            ValueError: If the state belongs to another class or version.
        """
        has_own = type(self).state_dict is not Technique.state_dict
        if has_own and "layout" not in state_dict:  # a subclass has its own state, and this class had none
            return
        try:
            check_state(state_dict, has_own=has_own)
            self._load_state(state_dict)
        except ValueError as error:
            if str(error).startswith(f"{self.name}:"):  # it says all
                raise
            raise ValueError(
                f"{self.name}: the checkpoint's state of this callback cannot be used: {error}. Another class or version of "
                "lightning_reg saved it, or the file is damaged. Resume with the version that saved it, or start a new fit "
                "from the checkpoint's weights (model.load_state_dict(checkpoint['state_dict']))"
            ) from None

    def _load_state(self, state_dict: dict[str, Any]) -> None:
        self.saved_clock = state_dict.get("clock")
        self.running.load_state_dict(state_dict["metrics"])
        self.unpack_state(state_dict["state"])

    def pack_state(self) -> dict[str, Any]:
        """Return the state as full tensors and plain numbers, or an empty dictionary."""
        packed = {name: {key: _packed(value) for key, value in entry.items()} for name, entry in self.state.items()}
        return packed if any(packed.values()) else {}

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Restore what ``pack_state`` returned.

        Raises:
            ValueError: If it is not what ``pack_state`` returns.
        """
        check_entries(packed, self.state)
        for name, entry in self.state.items():
            for key, value in packed.get(name, {}).items():
                if expected := self.expected_in_state(name, key, value):
                    raise ValueError(f"state[{name!r}][{key!r}] is {described_value(value)}, expected {expected}")
            entry.clear()
            entry.update(packed.get(name, {}))

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Return what an invalid value in an entry of the state should be, or an empty string if the value is valid."""
        return ""

    # Values ---------------------------------------------------------------------------------------------------------

    def resolve(self, clock: Clock) -> None:
        """Start the schedules, once the length of the fit is known."""
        self._clock = clock
        self._applied = None
        self._schedules.clear()
        self._step_metrics.clear()
        for key, valid, value in self._values_given():
            if isinstance(value, Schedule):
                self._check_markers(f"{self.name}: {key}={value!r}", value, clock)
                self._schedules[key] = value.at_moment
            elif callable(value):
                self._schedules[key] = _of_progress(value)
            else:
                self.current[key] = self._check_value(key, valid, value)

    def _check_markers(self, what: str, schedule: Schedule, clock: Clock) -> None:
        """Check that the markers of a schedule come in order, and before the fit ends."""
        for earlier, later in pairwise(schedule.markers):
            if clock.comes_before(later, earlier):
                raise ValueError(f"{what}: the markers must not decrease, but {later!r} comes before {earlier!r} in this run")
        late = [marker for marker in schedule.markers if clock.ends_before(marker)]
        if late:
            rank_zero_warn(
                f"{what} has the marker {late[0]!r}, but the run ends {clock.describe_end(late[0])}, so the schedule does not "
                "reach it: train longer, or use an earlier marker"
            )

    def update(self, moment: Moment) -> None:
        """Set the scheduled values to those of a moment."""
        for key, valid, value in self._values_given() if self._schedules else ():
            if key in self._schedules:
                number = self._schedules[key](moment)
                if type(number) is not float or number not in valid:  # building the message costs more than the rest
                    number = valid.check(f"{self.name}: {key}={value!r} at progress {moment.progress:g}", number)
                self.current[key] = number
        if self.current != self._applied:
            self._applied = dict(self.current)
            self.values_changed()

    def refuse_endless(self) -> None:
        """Raise an error if a value depends on the end of an endless fit."""
        for key, _, value in self._values_given():
            if (isinstance(value, Schedule) and value.needs_end) or (callable(value) and not isinstance(value, Schedule)):
                raise ValueError(
                    f"{self.name}: {key}={value!r} depends on the fraction of training, but the run has no end "
                    "(max_epochs=-1): set max_epochs or max_steps, or use epochs or steps, as in until='3ep' or '500st'"
                )

    def _values_given(self) -> Iterator[tuple[str, Interval, Value]]:
        """Yield the key, the valid range, and the constructor argument for each value that may be scheduled."""
        for key, valid in self.valid_ranges.items():
            given: Value | Mapping[str, Value] = getattr(self, key)
            if isinstance(given, Mapping) and key in self.accept_mappings:
                yield from ((f"{key}/{glob}", valid, value) for glob, value in given.items())
            else:
                yield key, valid, cast("Value", given)

    def _check_value(self, key: str, valid: Interval, value: Value) -> float:
        """Check a value from the constructor. Return it, or a placeholder until its schedule starts."""
        what = f"{type(self).__name__}: {key}"
        if isinstance(value, type):
            raise TypeError(
                f"{what} must be a number or a schedule, got the class {value.__name__}: create one, as in {value.__name__}(…)"
            )
        if isinstance(value, Schedule):
            extremes = [valid.check(f"{what}={value!r}", extreme) for extreme in value.extremes]
            return extremes[0]
        if callable(value):
            return _probed(what, valid, value)
        return valid.check(what, value)

    # Arguments and names --------------------------------------------------------------------------------------------

    def _repr_value(self, argument: str) -> Any:
        """Return a constructor argument for ``repr``, without a generated name."""
        is_generated = argument == "name" and self.name == self._default_name()
        return None if is_generated else super()._repr_value(argument)

    def _default_name(self) -> str:
        arguments = (
            argument for cls in type(self).__mro__ if issubclass(cls, Technique) for argument in constructor_arguments(cls)
        )
        argument = next((found for found in arguments if found.name == self.selector), None)
        selection = getattr(self, self.selector, None)
        if argument is None or selection == argument.default:
            return type(self).__name__
        is_list = isinstance(selection, Sequence) and not isinstance(selection, str)
        parts: list[str] = list(selection) if is_list else [_short_name(selection)]  # type: ignore[arg-type]
        return "-".join([type(self).__name__, *(re.sub(r"\W+", "_", part).strip("_") for part in parts)])


def _probed(what: str, valid: Interval, function: Callable[[float], float]) -> float:
    """Return the value of a function at the start of training, or NaN if it is known only in a fit.

    Raises:
        TypeError: If the function is not a schedule: it does not take a number, or does not return one.
        ValueError: If the number is out of range.
    """
    expected = f"{what} must be a number, a schedule, or a function progress -> float, got {readable(function)}"
    start = 0.0
    try:
        number = function(start)
    except Exception as error:
        if isinstance(error, TypeError) or (isinstance(error, AttributeError) and error.obj is start):
            raise TypeError(f"{expected}, which cannot be called with the progress 0.0: {error}") from error
        return math.nan  # it may need what exists only in a fit
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{expected}, which returned {described_value(number)} of type {type(number).__name__} for 0.0")
    return valid.check(f"{what}={readable(function)} at progress 0", number)


def _short_name(selection: Any) -> str:
    """Return the name of a function, which may be given by its import path, or the string of another selection."""
    if isinstance(selection, str) and is_function_path(selection) and selection.partition(":")[0] not in KEYWORDS:
        return selection.rpartition(":")[2].rpartition(".")[2]
    return str(getattr(selection, "__name__", type(selection).__name__ if callable(selection) else selection))


def _of_progress(function: Callable[[float], float]) -> Callable[[Moment], float]:
    return lambda moment: function(moment.progress)


def _declared(cls: type[Technique], what: str) -> list[str]:
    """Return the names that a class and its parents list under a class attribute."""
    return [name for parent in reversed(cls.__mro__) for name in vars(parent).get(what, ())]


def _emptied(value: Any) -> Any:
    """Return an empty container for a container, and ``None`` for anything else."""
    return type(value)() if isinstance(value, (dict, list, set)) else None


def _abbreviated(value: Any) -> str:
    """Return the ``repr`` of a setting. Of a long list, show only the first entries."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > _LONG:
        return f"[{abbreviate(list(map(repr, value)), _LONG)}]"
    return readable(value)


def _packed(value: Any) -> Any:
    return full_tensor(value).cpu() if hasattr(value, "cpu") else value
