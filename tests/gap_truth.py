"""Many small fits on digits with wrong labels, each with a large held-out sample that tells the true gap."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from helpers import QUIET, digits, seed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import OverfittingMonitor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHARES = (0.0, 0.2, 0.4)
"""The shares of wrong labels."""

_TRAIN, _VAL, _ALL = 200, 300, 1797
_EPOCHS = 8


class Outcome(NamedTuple):
    """What a fit has shown.

    Args:
        share: The share of wrong labels.
        gap: What the monitor measured.
        margin: Half the length of its interval.
        true_gap: The loss on the held-out sample minus the loss on the training sample.
        true_error: The standard error of the loss on the held-out sample.
        logged_gap: The loss that was logged in the validation minus the loss that was logged in the training.
    """

    share: float
    gap: float
    margin: float
    true_gap: float
    true_error: float
    logged_gap: float

    @property
    def is_covered(self) -> bool:
        """Whether the interval, with the uncertainty of the held-out sample, contains the true gap."""
        return abs(self.gap - self.true_gap) <= math.hypot(self.margin, 1.96 * self.true_error)


class Network(LightningModule):
    """A small perceptron with dropout, which logs the loss as most people do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def losses(self, part: TensorDataset) -> Tensor:
        """Return the loss of each sample."""
        images, labels = part.tensors
        with torch.no_grad():
            return cross_entropy(self.eval().net(images), labels, reduction="none").double()


def outcome(number: int, share: float) -> Outcome:
    """Train once, with a split, labels, and weights that depend on the number of the run."""
    seed(number)
    train, val, held_out = _parts(share)
    model, monitor = Network(), OverfittingMonitor(metric="val/loss", every_n_epochs=_EPOCHS)
    monitor.prints_always = False
    trainer = Trainer(**QUIET, max_epochs=_EPOCHS, callbacks=[monitor], num_sanity_val_steps=0)
    trainer.fit(model, DataLoader(train, 32, shuffle=True), DataLoader(val, 100))
    last = monitor.points[-1]
    losses = model.losses(held_out)
    true_gap = float(losses.mean() - model.losses(train).mean())
    logged_gap = float(trainer.callback_metrics["val/loss"] - trainer.callback_metrics["train/loss"])
    return Outcome(share, last.gap, last.gap_margin, true_gap, float(losses.std() / len(losses) ** 0.5), logged_gap)


def _parts(share: float) -> list[TensorDataset]:
    """Return a random split of digits, in which a share of the labels is replaced by random ones."""
    images, labels = digits(_ALL)
    order = torch.randperm(_ALL)
    wrong = torch.rand(_ALL) < share
    labels = torch.where(wrong, torch.randint(0, 10, (_ALL,)), labels)
    parts = order.split([_TRAIN, _VAL, _ALL - _TRAIN - _VAL])
    return [TensorDataset(images[part], labels[part]) for part in parts]


def outcomes(runs: Iterable[int]) -> list[Outcome]:
    """Train each run with each share of wrong labels."""
    return [outcome(3 * number + index, share) for number in runs for index, share in enumerate(SHARES)]


def covered(found: Sequence[Outcome]) -> int:
    """Count the fits whose interval contains the true gap."""
    return sum(one.is_covered for one in found)


def missed_by_logs(found: Sequence[Outcome]) -> float:
    """Return the mean of the logged gap minus the true one."""
    return fmean(one.logged_gap - one.true_gap for one in found)
