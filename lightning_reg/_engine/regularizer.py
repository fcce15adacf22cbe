"""A technique as a Lightning callback: it passes Lightning's hooks on to the driver of the fit."""

from __future__ import annotations

import sys
from abc import ABCMeta
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback

from lightning_reg._engine import _lightning
from lightning_reg._engine.driver import Driver, in_order
from lightning_reg._engine.front import front_of, install_front
from lightning_reg._engine.summary import Summary, print_line, summarize
from lightning_reg._engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer


_summaries: WeakKeyDictionary[Trainer, Summary] = WeakKeyDictionary()
"""The summary of each trainer's last fit, since a callback may serve several trainers."""


class _KeyOfInstance(property):
    """A property that Lightning may read from an instance only.

    The state key is the first attribute that a Trainer reads from a callback. So if a class is passed instead of an instance,
    the error says so before Lightning calls the hooks of the class without ``self``.
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None and owner is not None and _lightning.is_code_of_lightning(sys._getframe(1)):
            raise TypeError(_class_message(owner))
        return super().__get__(instance, owner)


class _CallbackClass(ABCMeta):
    """The class of callback classes, which raises a clear error if Lightning mistakes one for the list of callbacks."""

    def __getitem__(cls, key: Any) -> Any:
        if isinstance(key, int) and _lightning.is_code_of_lightning(sys._getframe(1)):  # the first entry of a loop
            raise TypeError(_class_message(cls))
        if not hasattr(cls, "__class_getitem__"):
            raise TypeError(f"type {cls.__name__!r} is not subscriptable")
        return cls.__class_getitem__(key)


def _class_message(cls: type) -> str:
    return (
        f"callbacks must be instances, got the class {cls.__name__}: create one, as in Trainer(callbacks=[{cls.__name__}(…)])"
    )


class Regularizer(Technique, Callback, metaclass=_CallbackClass):
    """Base class of all callbacks in this package. Subclasses override methods of ``Technique``, never a Lightning hook.

    Args:
        name: The name in metrics and checkpoints. Built from the class and any non-default selection by default.
    """

    fit_attributes: ClassVar[tuple[str, ...]] = ("_driver",)

    def __init__(self, name: str | None) -> None:
        _lightning.derive_from_both(Regularizer)  # the package may have been imported since
        super().__init__(name)
        self._driver: Driver | None = None
        self._state_key = self._generate_state_key(name=self.name)
        self._was_set_up = self._predicting = self._evaluating = False

    @_KeyOfInstance
    def state_key(self) -> str:
        """The key of its state in a checkpoint."""
        return self._state_key if self._was_set_up else _NewStateKey(self._state_key, self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the configuration against the run."""
        self._was_set_up, self._evaluating = True, stage != "fit"
        if stage == "fit":
            self._act_first(trainer)
            self._check_fit(trainer)
            self.saved_clock = None
            forget = self.reset if self.resets_each_fit else self.running.reset
            forget()  # a checkpoint is loaded later
            self.prepare(trainer, pl_module)
        if stage == "predict" and self.overrides("start_predict"):
            self.prepare_predict(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the module's methods, which Lightning sets on each callback of a fit."""
        return {name: value for name, value in super().__getstate__().items() if name not in _lightning.METHODS_OF_MODULE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the resumed run. Evaluation needs no state, so it accepts any layout."""
        with suppress(ValueError) if self._evaluating else nullcontext():
            super().load_state_dict(state_dict)

    def _act_first(self, trainer: Trainer) -> None:
        """Put a hidden callback before all others, unless the first one belongs to this package."""
        if not isinstance(next(iter(trainer.callbacks), None), Regularizer):  # type: ignore[attr-defined]
            install_front(trainer)

    def _check_fit(self, trainer: Trainer) -> None:
        if self.deepspeed_alternative and _lightning.uses_deepspeed(trainer):
            raise ValueError(f"{type(self).__name__} does not work with DeepSpeed: {self.deepspeed_alternative}")
        if _lightning.is_endless(trainer):
            self.refuse_endless()
        if sum(cb.name == self.name for cb in regularizers_of(trainer)) > 1:
            raise ValueError(_same_name(self.name))

    def refuse_others(self, trainer: Trainer, reason: str) -> None:
        """Raise an error if the trainer has another callback of the same class, for techniques that act on everything."""
        for other in regularizers_of(trainer):
            if type(other) is type(self) and other is not self:
                raise ValueError(f"{self.name} and {other.name} {reason}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the driver of the fit, which the first regularizer of the list owns, and print the summary."""
        regularizers = regularizers_of(trainer)
        if regularizers[0] is self:
            self._driver = Driver(trainer, pl_module, regularizers)
            self._act_first(trainer)  # another callback may have changed the list since
            if front := front_of(trainer):
                front.driver = self._driver
            self._driver.start()
            _summaries[trainer] = summarize(self._driver.techniques)
            if _lightning.prints_summary(trainer):
                _summaries[trainer].print()

    def summary(self, trainer: Trainer) -> Summary:
        """Return the current summary of all regularizers. After a fit, return the one from its start."""
        if self._driver:
            return summarize(self._driver.techniques)
        return _summaries.get(trainer) or summarize(in_order(regularizers_of(trainer)), attached=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, now that the data are loaded."""
        if self._driver:
            self._driver.start_clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set every value to that of the current progress."""
        if self._driver:
            self._driver.before_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the penalties to the loss."""
        if self._driver:
            self._driver.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what was changed for the forward pass."""
        if self._driver:
            self._driver.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Change the gradients."""
        if self._driver:
            self._driver.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the epoch after its last batch, and log."""
        if self._driver:
            self._driver.after_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch that is cut short before it is validated."""
        if self._driver:
            self._driver.before_validation()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validated module."""
        if self._driver:
            self._driver.after_validation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch whose last batch was not known to be the last."""
        if self._driver:
            self._driver.after_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary lines of the whole fit."""
        self.fit_over()
        if (self.prints_always or _lightning.prints_summary(trainer)) and (line := self.fit_summary()):
            print_line(trainer, f"{self.name}: {line}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the predictions."""
        self._predicting = True
        self.start_predict(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model."""
        self._stop_predict()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the model."""
        self._stop()

    def _stop_predict(self) -> None:
        if self._predicting:
            self._predicting = False
            self.stop_predict()

    def _stop(self) -> None:
        """Stop acting, and release everything that belongs to the run, including attributes that Lightning has set."""
        self._stop_predict()
        for method in _lightning.METHODS_OF_MODULE:
            vars(self).pop(method, None)
        if self._driver:
            driver, self._driver = self._driver, None
            driver.stop()


_lightning.derive_from_both(Regularizer)


class _NewStateKey(str):
    """The state key of a callback that no Trainer has set up yet.

    When Lightning compares the keys of a new Trainer's callbacks, this class raises a better error: Lightning's own does not
    say that ``name=`` sets the key. Everywhere else, it is an ordinary string.
    """

    def __new__(cls, key: str, owner: Regularizer) -> _NewStateKey:
        self = super().__new__(cls, key)
        self.owner = owner
        return self

    owner: Regularizer

    def __eq__(self, other: object) -> bool:
        equal = str.__eq__(self, other)
        if equal is True and sys._getframe(1).f_code.co_name == "_validate_callbacks_list":
            raise ValueError(_same_name(self.owner.name))
        return equal

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def _same_name(name: str) -> str:
    return f"two callbacks have the name {name!r}: set name='…' for one of them, because metrics and checkpoints use the name"


def summary(trainer: Trainer) -> None:
    """Print what each callback of this package acts on, with which settings, and where. Only rank zero prints.

    The same summary is printed when a fit starts, unless ``enable_model_summary=False``. During a fit, this function prints
    the current state, for example after a callback has unfrozen layers. After a fit, it prints the summary from its start.
    Before any fit, targets are not known yet.

    Args:
        trainer: The trainer whose callbacks to list.

    Raises:
        ValueError: If the trainer has no callback of this package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import GradientNormClipping
        >>> summary(Trainer(callbacks=[GradientNormClipping(1.0)], logger=False))
        Regularization
        ┏━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┓
        ┃ Callback             ┃ Acts on       ┃ Setting      ┃ Where           ┃
        ┡━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━┩
        │ GradientNormClipping │ not known yet │ max_norm=1.0 │ before the step │
        └──────────────────────┴───────────────┴──────────────┴─────────────────┘
    """
    regularizers = regularizers_of(trainer)
    if not regularizers:
        raise ValueError("summary: the trainer has no callback of lightning_reg")
    if trainer.is_global_zero:
        regularizers[0].summary(trainer).print()


def regularizers_of(trainer: Trainer) -> list[Regularizer]:
    """Return the regularizers among a trainer's callbacks."""
    return [cb for cb in trainer.callbacks if isinstance(cb, Regularizer)]  # type: ignore[attr-defined]
