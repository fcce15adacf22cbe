"""Tabular data: a perceptron, plain and with the callbacks that `choose` finds, beside gradient boosting.

Two sets that scikit-learn ships: is a breast tumor malignant (569 patients), and how far does diabetes progress in a year
(442 patients)? `choose` works on 60% of the patients only. Then all three models train on new random splits. Their test
patients come from the other 40%, so `choose` has seen none of them. Gradient boosting is scikit-learn's, with its
default settings.

The loss is the cross-entropy, or the squared error divided by the variance. This takes about 70 seconds on one core, prints a
table, and draws a figure. `choose` may keep the plain model, and boosting may win; the table shows either.

    python examples/tabular.py
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import rich
import torch
from digits import silence_notices
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.tuning import choose
from lightning_reg.tuning.statistics import PairedTest, corrected_t_test

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PLAIN, CHOSEN, BOOSTING = "plain", "chosen", "boosting"
MODELS = {PLAIN: "#D55E00", CHOSEN: "#0072B2", BOOSTING: "#7F7F7F"}  # distinct for color-blind readers too
OVERLAP = 1.0  # more than the 0.25 of test to training patients: two test sets share half of a pool. The most cautious value


class Perceptron(LightningModule):
    """Two hidden layers; nothing in it knows of regularization.

    Args:
        inputs: Number of features.
        outputs: Number of classes, or 1 for a number.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.loss = mse_loss if outputs == 1 else cross_entropy
        layers = [nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs)]
        self.net = nn.Sequential(*layers, *([nn.Flatten(0)] if outputs == 1 else []))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Measure a batch."""
        self.log("val/loss", self.loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, without weight decay."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@dataclass
class Patients:
    """A data set, of which ``reserved`` patients are for the final splits only."""

    x: NDArray[Any]
    y: NDArray[Any]
    classes: int

    def __post_init__(self) -> None:
        everyone = np.arange(len(self.y))
        self.development, self.reserved = train_test_split(everyone, test_size=0.4, random_state=0, stratify=self.strata)

    @property
    def strata(self) -> NDArray[Any] | None:
        """The classes to stratify by, or None for numbers."""
        return self.y if self.classes > 1 else None

    def inner(self, split: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return training and validation patients of a split of the development part, for `choose`."""
        strata = None if self.strata is None else self.strata[self.development]
        train, val = train_test_split(self.development, test_size=0.2, random_state=split, stratify=strata)
        return train, val

    def outer(self, split: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the training and test patients of a final split: a fifth of all, from the reserved ones, are for testing."""
        test = np.random.default_rng(split).choice(self.reserved, len(self.y) // 5, replace=False)
        return np.setdiff1d(np.arange(len(self.y)), test), test

    def scaled(self, train: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return features, and numbers to predict, standardized by the training patients."""
        x = (self.x - self.x[train].mean(0)) / self.x[train].std(0)
        y = self.y if self.classes > 1 else (self.y - self.y[train].mean()) / self.y[train].std()
        return x.astype(np.float32), y if self.classes > 1 else y.astype(np.float32)

    def loaders(self, train: NDArray[Any], test: NDArray[Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return the loaders of a split."""
        x, y = map(torch.from_numpy, self.scaled(train))
        parts = [TensorDataset(x[part], y[part]) for part in (train, test)]
        return DataLoader(parts[0], batch_size=32, shuffle=True), DataLoader(parts[1], batch_size=len(test))

    def model(self) -> Perceptron:
        """Return a new perceptron."""
        return Perceptron(self.x.shape[1], self.classes)


def train(data: Patients, split: int, callbacks: Sequence[Callback], epochs: int) -> float:
    """Train a perceptron on a final split, and return its test loss."""
    seed_everything(split, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=deepcopy(list(callbacks)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(data.model(), *data.loaders(*data.outer(split)))
    return trainer.callback_metrics["val/loss"].item()


def boost(data: Patients, split: int) -> float:
    """Train gradient boosting on a final split, and return its test loss."""
    train, test = data.outer(split)
    x, y = data.scaled(train)
    if data.classes > 1:
        classifier = HistGradientBoostingClassifier(random_state=split).fit(x[train], y[train])
        return float(log_loss(y[test], classifier.predict_proba(x[test])))
    regressor = HistGradientBoostingRegressor(random_state=split).fit(x[train], y[train])
    return float(mean_squared_error(y[test], regressor.predict(x[test])))


def measure(data: Patients, callbacks: Sequence[Callback], splits: range, epochs: int) -> dict[str, list[float]]:
    """Return the test losses of the three models on the same splits. If plain was kept, the chosen model is plain."""
    plain = [train(data, split, [], epochs) for split in splits]
    chosen = [train(data, split, callbacks, epochs) for split in splits] if callbacks else plain
    return {PLAIN: plain, CHOSEN: chosen, BOOSTING: [boost(data, split) for split in splits]}


def gain(losses: dict[str, list[float]], name: str, base: str) -> PairedTest:
    """Test whether a model has a lower loss than another, paired by split, with the correction for splits that share data."""
    return corrected_t_test([b - a for a, b in zip(losses[name], losses[base], strict=True)], OVERLAP)


def table(results: dict[str, dict[str, list[float]]], kept: dict[str, str]) -> Table:
    """Return a table with a row for each model and data set."""
    shown = Table(
        title="Test loss of patients that choose never saw", caption=caption(kept), box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("Data", "Model", "Loss", "Gain over plain", "Gain over boosting"):
        shown.add_column(column, justify="left" if column in ("Data", "Model") else "right", no_wrap=True)
    for data, losses in results.items():
        for name, values in losses.items():
            gains = [in_words(losses, name, base) for base in (PLAIN, BOOSTING)]
            shown.add_row(data if name == PLAIN else "", name, f"{mean(values):.2f} ± {stdev(values):.2f}", *gains)
    return shown


def caption(kept: dict[str, str]) -> str:
    """Return what `choose` found, and what the table shows."""
    found = "\n".join(f"{data}: choose {what}" for data, what in kept.items())
    return f"{found}\nGain: lower loss, paired by split, with the 5% bound on each side"


def in_words(losses: dict[str, list[float]], name: str, base: str) -> str:
    """Return the gain of a model over another, with its bounds."""
    if losses[name] is losses[base]:
        return "" if name == base else "is plain"
    found = gain(losses, name, base)
    return f"{found.mean:+.2f} [{found.low:.2f}, {found.high:.2f}]"


def draw(results: dict[str, dict[str, list[float]]], kept: dict[str, str], path: Path) -> None:
    """Draw the losses on each split, a panel for each data set, and save the figure."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 13})
    figure, axes = plt.subplots(1, len(results), figsize=(10, 4), layout="constrained")
    for axis, (data, losses) in zip(axes, results.items(), strict=True):
        axis.plot(np.array(list(losses.values())), color="#7F7F7F", alpha=0.4, linewidth=0.8)
        for row, (name, values) in enumerate(losses.items()):
            axis.plot([row] * len(values), values, "o", color=MODELS[name], alpha=0.7)
            axis.plot(row, mean(values), "_", color="black", markersize=30, label="mean" if row == 0 else None)
        axis.set_xticks(range(len(losses)), list(losses))
        axis.set(title=f"{data}\n(choose {kept[data]})", ylabel="test loss (lower is better)", xlim=(-0.5, 2.5))
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    figure.suptitle("A perceptron and gradient boosting; a line joins one split", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Choose, compare, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, meaning in (
        ("--epochs", 40, "epochs of each run"),
        ("--trials", 20, "runs of the search"),
        ("--confirm", 8, "splits of the confirmation, at least 3"),
        ("--repeats", 8, "final splits, at least 2"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--output", type=Path, default=Path("runs/tabular"), help="folder for the figure")
    given = parser.parse_args()
    silence_notices()
    torch.set_num_threads(1)
    cancer, diabetes = load_breast_cancer(), load_diabetes()
    sets = {
        "tumors": Patients(cancer.data, cancer.target, classes=2),
        "diabetes": Patients(diabetes.data, diabetes.target, classes=1),
    }
    results, kept = {}, {}
    for name, data in sets.items():
        choice = choose(
            data.model,
            lambda split, data=data: data.loaders(*data.inner(split)),  # type: ignore[misc]
            trials=given.trials,
            confirm=given.confirm,
            metric="val/loss",
            trainer={"max_epochs": given.epochs, "accelerator": "cpu"},
            storage=None,
        )
        kept[name] = "took " + ", ".join(choice.kept) if choice.callbacks else "kept the plain model"
        results[name] = measure(data, choice.callbacks, range(given.repeats), given.epochs)
    rich.print(table(results, kept))
    draw(results, kept, given.output / "tabular.png")
    print(f"Figure: {given.output / 'tabular.png'}")


if __name__ == "__main__":
    main()
