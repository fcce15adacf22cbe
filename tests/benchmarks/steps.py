"""The time that a callback adds to a step of a tiny model, where only overhead counts."""

from __future__ import annotations

import time
import warnings
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from table import ROWS
from torch import Tensor, nn
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Callable


class Tiny(LightningModule):
    """A model of 100 parameters that records when each step ends. The callbacks of the table select its layers by name."""

    def __init__(self, weight_decay: float = 0.0, validates: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.weight_decay = weight_decay
        if validates:
            self.__class__ = Validated
        self.ends: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a loss."""
        return self.net(batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the time, after the callbacks."""
        self.ends.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, weight_decay=self.weight_decay)


class Validated(Tiny):
    """The model with a validation after the last step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log a loss."""
        self.log("val/loss", self.net(batch).square().mean())

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return random data."""
        return DataLoader(torch.zeros(64, 8), batch_size=4)


def step_times(callback: Callback, steps: int, with_logger: bool, **options: float) -> list[float]:
    """Return the duration of each step, with or without a logger. No step is logged."""
    model = Tiny(**options)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=DummyLogger() if with_logger else False,
        log_every_n_steps=10 * steps,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(torch.randn(4 * steps, 8), batch_size=4))
    return [after - before for before, after in zip(model.ends[20:], model.ends[21:], strict=False)]


def added(make: Callable[[], Callback], with_logger: bool, rounds: int = 5, steps: int = 220, **options: float) -> float:
    """Return the seconds per step that a callback takes more than an empty one. The two take turns."""
    differences = []
    for _ in range(rounds):
        empty, ours = (median(step_times(callback, steps, with_logger, **options)) for callback in (Callback(), make()))
        differences.append(ours - empty)
    return median(differences)


def added_by_each() -> dict[str, tuple[float, float]]:
    """Return the microseconds per step that each callback adds, without and with a logger, by name."""
    return {
        name: (1e6 * added(row.active, False, **row.options), 1e6 * added(row.active, True, **row.options))
        for name, row in ROWS.items()
    }
