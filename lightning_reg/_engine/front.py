"""A hidden callback that acts before all others in a fit, regardless of the order in the user's list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.driver import Driver


class Front(Callback):
    """Passes on those hooks to the driver in which no other callback may come first.

    It is the first entry of ``trainer.callbacks`` from ``setup`` to ``teardown`` of a fit.

    Args:
        callbacks: The trainer's own list, which is restored after the fit.
    """

    def __init__(self, callbacks: list[Callback]) -> None:
        self.driver: Driver | None = None
        self._callbacks = callbacks

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies: everything but the driver, which serves only this trainer."""
        return {**vars(self), "driver": None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, now that the data are loaded."""
        if self.driver:
            self.driver.start_clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set every value to that of the moment."""
        if self.driver:
            self.driver.before_batch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what was changed for the forward pass."""
        if self.driver:
            self.driver.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the epoch after its last batch, before other callbacks average or save the weights."""
        if self.driver:
            self.driver.after_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch that is cut short before it is validated."""
        if self.driver:
            self.driver.before_validation()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validated module, before other callbacks change it or read metrics."""
        if self.driver:
            self.driver.after_validation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch whose last batch was not known to be the last, before other callbacks save it."""
        if self.driver:
            self.driver.after_epoch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the list of callbacks and the model, whatever other callbacks raise later."""
        if self.driver:
            self.driver.stop()
        self._remove(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the list of callbacks."""
        self._remove(trainer)

    def _remove(self, trainer: Trainer) -> None:
        """Restore the trainer's own list of callbacks, including changes that others have made to it."""
        self.driver = None
        left = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = self._callbacks if left == self._callbacks else left  # type: ignore[attr-defined]


def install_front(trainer: Trainer) -> None:
    """Put a hidden callback before all others, unless there is one. Replace the list, since Lightning iterates over it."""
    if front_of(trainer) is None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [Front(callbacks), *callbacks]  # type: ignore[attr-defined]


def front_of(trainer: Trainer) -> Front | None:
    """Return the hidden callback of a trainer."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Front)), None)  # type: ignore[attr-defined]
