"""The same model with and without regularization, on scikit-learn's handwritten digits.

Without arguments it trains the plain model and the regularized one, each with several seeds on few samples, prints a table and
draws the curves. With arguments it is an ordinary LightningCLI:

    python examples/digits.py
    python examples/digits.py fit --trainer.callbacks+=L1Penalty --trainer.callbacks.strength=1e-4
    python examples/digits.py fit --config examples/digits.yaml
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, TypeAlias, cast

import matplotlib.pyplot as plt
import numpy as np
import rich
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import DropoutInjection, GradientNormClipping, L1Penalty, L2Penalty, WeightClipping

if TYPE_CHECKING:
    from collections.abc import Callable

Batch: TypeAlias = tuple[Tensor, ...]

SEEDS = range(5)
EPOCHS = 100
OUTPUT = Path("runs/digits")


class Digits(LightningDataModule):
    """1797 images of 8 by 8 pixels in ten classes, few of them for training; each pixel is standardized.

    The labels of the validation and test images are always right.

    Args:
        train_samples: Number of training images. 300 others are for validation, and the rest for testing.
        label_noise: Fraction of the training labels to replace by classes drawn at random, from all ten.
        batch_size: Number of images in a training batch.
        seed: Seed of the split and of the label noise.

    Raises:
        ValueError: If ``train_samples`` is not in [10, 1487] or ``label_noise`` is not in [0, 1].
    """

    def __init__(self, train_samples: int = 300, label_noise: float = 0.3, batch_size: int = 40, seed: int = 0) -> None:
        super().__init__()
        if not 10 <= train_samples <= 1487:  # the split needs an image of each class to train on, and one to test on
            raise ValueError(f"Digits: train_samples must be in [10, 1487], got {train_samples}")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"Digits: label_noise must be in [0, 1], got {label_noise}")
        self.train_samples = train_samples
        self.label_noise = label_noise
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Split the images, stratified by class; standardize them by the training images; replace training labels."""
        digits = load_digits()
        images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
        train, rest = train_test_split(
            range(len(labels)), train_size=self.train_samples, stratify=labels, random_state=self.seed
        )
        val, test = train_test_split(rest, train_size=300, stratify=labels[rest], random_state=self.seed)
        random = np.random.default_rng(self.seed)
        noisy = random.choice(train, round(self.label_noise * len(train)), replace=False)
        labels[noisy] = torch.from_numpy(random.integers(10, size=len(noisy)))
        std, mean = torch.std_mean(images[train], dim=0)
        data = TensorDataset((images - mean) / std.where(std > 0, 1), labels)
        self.training, self.validation, self.testing = Subset(data, train), Subset(data, val), Subset(data, test)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images, shuffled."""
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation images."""
        return DataLoader(self.validation, batch_size=512)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the test images and, to see what was memorized, the training images."""
        return [DataLoader(self.testing, batch_size=2048), DataLoader(self.training, batch_size=2048)]


class DigitsClassifier(LightningModule):
    """A perceptron with two hidden layers; nothing in it knows of regularization.

    Args:
        hidden: Units in each hidden layer.
        lr: The learning rate of Adam.
    """

    def __init__(self, hidden: int = 256, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        self.train_accuracy = MulticlassAccuracy(10, average="micro")
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = nn.ModuleList(MulticlassAccuracy(10, average="micro") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return cast("Tensor", self.net(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "test", cast("MulticlassAccuracy", self.test_accuracy[dataloader_idx]))

    def _step(self, batch: Batch, part: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{part}/loss", loss, on_step=False, on_epoch=True)
        self.log(f"{part}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, without weight decay."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def regularization() -> list[Callback]:
    """Return the five techniques together, as strong as few samples need them."""
    return [
        L1Penalty(1e-4),
        L2Penalty(1e-3),
        DropoutInjection(0.2, after="Flatten"),
        DropoutInjection(0.5, after="ReLU"),
        GradientNormClipping(1.0),
        WeightClipping(0.2),
    ]


class History(Callback):
    """Keeps what each epoch measured, for the curves."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the epoch's figures."""
        self.epochs.append({key: value.item() for key, value in trainer.callback_metrics.items()})


@dataclass
class Run:
    """What came of one training."""

    train: float
    test: float
    zeros: float
    seconds: float
    history: list[dict[str, float]]


def train(kind: str, callbacks: list[Callback], seed: int) -> Run:
    """Train the model with some callbacks and one seed."""
    seed_everything(seed, verbose=False)
    model, data, history = DigitsClassifier(), Digits(seed=seed), History()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[*callbacks, history],
        logger=TensorBoardLogger(OUTPUT, name=kind, version=f"seed_{seed}"),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=seed == SEEDS[0],
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    tested, trained = trainer.test(model, data, verbose=False)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
    return Run(
        train=trained["test/accuracy/dataloader_idx_1"],
        test=tested["test/accuracy/dataloader_idx_0"],
        zeros=(weights == 0).float().mean().item(),
        seconds=seconds,
        history=history.epochs,
    )


def table(runs: dict[str, list[Run]]) -> Table:
    """Return the means over the seeds, with their standard deviations."""
    shown = Table(title=f"Digits, {Digits().train_samples} training images, mean ± standard deviation of {len(SEEDS)} seeds")
    for column in ("Model", "Train accuracy", "Test accuracy", "Gap", "Exact zeros", "Seconds"):
        shown.add_column(column, justify="left" if column == "Model" else "right")
    for kind, of_kind in runs.items():
        shown.add_row(
            kind,
            percent([run.train for run in of_kind]),
            percent([run.test for run in of_kind]),
            percent([run.train - run.test for run in of_kind]),
            percent([run.zeros for run in of_kind]),
            f"{mean(run.seconds for run in of_kind):.1f}",
        )
    return shown


def percent(shares: list[float]) -> str:
    """Return the mean and the standard deviation of shares, in percent."""
    return f"{mean(shares):.1%} ± {stdev(shares):.1%}"


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the accuracy and the loss of each epoch, mean over the seeds, and save the figure."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, quantity in zip(axes, ("accuracy", "loss"), strict=True):
        for colour, (kind, of_kind) in zip(("tab:red", "tab:blue"), runs.items(), strict=True):
            for part, style in (("train", "--"), ("val", "-")):
                curves = torch.tensor([[epoch[f"{part}/{quantity}"] for epoch in run.history] for run in of_kind])
                axis.plot(range(1, EPOCHS + 1), curves.mean(0), style, color=colour, label=f"{kind}, {part}")
        axis.set(xlabel="epoch", ylabel=quantity)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0.6, 1.01)
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.suptitle("Digits: training (dashed, with dropout where there is any) and validation")
    figure.savefig(path, dpi=120)


def compare() -> dict[str, list[Run]]:
    """Train both models with every seed; print the table, draw the curves, and say where things are."""
    callbacks: dict[str, Callable[[], list[Callback]]] = {"plain": list, "regularized": regularization}
    runs = {kind: [train(kind, make(), seed) for seed in SEEDS] for kind, make in callbacks.items()}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(runs, OUTPUT / "curves.png")
    rich.print(table(runs))
    rich.print(f"Curves: {OUTPUT / 'curves.png'}\nTensorBoard: tensorboard --logdir {OUTPUT}")
    return runs


def main() -> None:
    """Compare without arguments; with arguments, be a LightningCLI."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # the data are too small for worker processes
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own, of no concern here
    if len(sys.argv) == 1:
        compare()
    else:
        LightningCLI(DigitsClassifier, Digits, seed_everything_default=0, trainer_defaults={"max_epochs": EPOCHS})


if __name__ == "__main__":
    main()
