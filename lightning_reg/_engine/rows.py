"""Metrics of callbacks in the rows that Lightning writes to loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_reg._engine import _lightning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning.pytorch import Trainer


class LoggerRows:
    """Adds metrics to the next row that Lightning writes for the current step, which has the step and the epoch.

    Lightning offers a row to the loggers after each batch that it logs, after a validation, and at the end of each epoch, and
    writes it if it has metrics. A separate row for the same step would be a second line in a CSV file.

    Args:
        trainer: The trainer of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._waiting: dict[str, float] = {}

    def start(self) -> Callable[[], None]:
        """Follow the rows of the trainer. Return a function that stops this."""
        return _lightning.wrap_method(self._trainer._logger_connector, "log_metrics", self._wrapper)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the next row, and make them available to callbacks that monitor one, with and without a logger."""
        if self._trainer.loggers:
            self._waiting.update(metrics)
        self.publish(metrics)

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Make metrics available to callbacks that monitor one."""
        device = self._trainer.strategy.root_device
        available = _lightning.available_metrics(self._trainer)
        available.update({key: torch.tensor(value, device=device) for key, value in metrics.items()})

    def _wrapper(self, log_metrics: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(metrics: Mapping[str, Any], step: int | None = None) -> None:
            if step is not None:  # a batch of a validation, counted on its own
                log_metrics(metrics, step=step)
                return
            waiting, self._waiting = self._waiting, {}
            if waiting and "step" in metrics:  # the module gives the row another step
                log_metrics(waiting)
                waiting = {}
            log_metrics({**metrics, **waiting})

        return wrapped
