"""What regularization is for: few training images, and many of their labels wrong.

Without arguments, this trains the same model on scikit-learn's handwritten digits without regularization, with each of five
techniques alone, and with all five, on the same ten random splits. It takes about a minute and a half on two cores, prints a
table, and draws a figure. With arguments, it is an ordinary LightningCLI:

    python examples/digits.py
    python examples/digits.py fit --trainer.callbacks+=L1Penalty --trainer.callbacks.strength=1e-4
    python examples/digits.py fit --config examples/digits.yaml
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import warnings
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias, cast

import matplotlib.pyplot as plt
import numpy as np
import rich
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import DropoutInjection, GradientNormClipping, L1Penalty, L2Penalty, OverfittingMonitor, WeightClipping
from lightning_reg.tuning import Comparison, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Batch: TypeAlias = tuple[Tensor, ...]

SPLITS = 10
EPOCHS = 60
OUTPUT = Path("runs/digits")
PLAIN, ALL = "plain", "all five"
ORANGE, BLUE, GRAY = "#D55E00", "#0072B2", "#7F7F7F"  # distinct for color-blind readers too


class Digits(LightningDataModule):
    """1797 images of 8 by 8 pixels in ten classes, few of them for training; each pixel is standardized.

    The labels of the validation and test images are always right.

    Args:
        train_samples: Number of training images. A quarter as many others are for validation, and the rest is for testing.
        label_noise: Fraction of the training labels to replace by classes drawn at random, from all ten.
        batch_size: Number of images in a training batch.
        seed: Seed of the split and of the label noise.

    Raises:
        ValueError: If ``train_samples`` is not in [40, 1430] or ``label_noise`` is not in [0, 1].
    """

    def __init__(self, train_samples: int = 300, label_noise: float = 0.3, batch_size: int = 40, seed: int = 0) -> None:
        super().__init__()
        if not 40 <= train_samples <= 1430:  # the split needs an image of each class to validate on, and one to test on
            raise ValueError(f"Digits: train_samples must be in [40, 1430], got {train_samples}")
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
        quarter = self.train_samples // 4
        val, test = train_test_split(rest, train_size=quarter, stratify=labels[rest], random_state=self.seed)
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


def techniques() -> dict[str, list[Callback]]:
    """Return the callbacks of each technique. Alone, they are as strong as together with the others."""
    return {
        "L1 penalty": [L1Penalty(5e-4)],
        "L2 penalty": [L2Penalty(1e-2)],
        "dropout": [DropoutInjection(0.2, after="Flatten"), DropoutInjection(0.5, after="ReLU")],
        "norm clipping": [GradientNormClipping(1.0)],
        "weight clipping": [WeightClipping(0.1)],
    }


def candidates() -> dict[str, list[Callback]]:
    """Return the callbacks to compare: none, each technique alone, and all together."""
    return {PLAIN: [], **techniques(), ALL: list(chain(*techniques().values()))}


class History(Callback):
    """Keeps the metrics of each epoch, for curves.

    Args:
        folder: Where to write them when the fit ends, since ``compare`` trains with copies of callbacks, in several processes.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the epoch."""
        self.epochs.append({key: value.item() for key, value in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics to a file."""
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            split = trainer.datamodule.seed  # type: ignore[attr-defined]
            (self.folder / f"{split}.json").write_text(json.dumps(self.epochs))


def compare_all(folder: Path, progress: bool) -> Comparison:
    """Train every candidate on every split, unless another process does, and test each against plain.

    Args:
        folder: Where to keep the runs, and the metrics of each epoch.
        progress: Whether to show a progress bar.
    """
    torch.set_num_threads(1)
    return compare(
        DigitsClassifier,
        lambda split: Digits(seed=split),
        {name: [*callbacks, History(folder / name)] for name, callbacks in candidates().items()},
        metric="val/accuracy",
        mode="max",
        repeats=SPLITS,
        trainer={"max_epochs": EPOCHS, "accelerator": "cpu"},
        storage=f"sqlite:///{folder}/runs.db",
        progress=progress,
    )


def help_compare(folder: Path) -> None:
    """Do half of the runs, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    compare_all(folder, progress=False)


def watch(name: str) -> None:
    """Train a candidate on the first split, with a monitor that prints a verdict, and saves a figure in the log."""
    seed_everything(0, verbose=False)
    summary = [ModelSummary(max_depth=0)] if name == ALL else []  # with depth 0, only that of the regularization remains
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[*candidates()[name], OverfittingMonitor(metric="val/loss", name=name), *summary],
        logger=TensorBoardLogger(OUTPUT, name=name.replace(" ", "_")),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=bool(summary),
    )
    trainer.fit(DigitsClassifier(), Digits())


def setting() -> str:
    """Return what the models are trained on, in words."""
    data = Digits()
    return f"{data.train_samples} training images, {data.label_noise:.0%} random labels"


def draw(result: Comparison, folder: Path, path: Path) -> None:
    """Draw the accuracy over the epochs and the gain of each candidate, and save the figure."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 13})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_curves(folder, left)
    draw_gains(result, right)
    gain = 100 * result.differences[ALL].mean
    figure.suptitle(f"{setting()}: five techniques gain {gain:.0f} points of accuracy", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_curves(folder: Path, axis: Axes) -> None:
    """Draw the accuracy of each epoch: the mean over the splits, with its standard deviation as a band."""
    for name, metric, color, style, label in (
        (ALL, "val/accuracy", BLUE, "-", "all five, validation"),
        (PLAIN, "val/accuracy", ORANGE, "-", "plain, validation"),
        (PLAIN, "train/accuracy", ORANGE, "--", "plain, training (noisy labels)"),
    ):
        runs = [json.loads(path.read_text()) for path in (folder / name).glob("*.json")]
        accuracies = 100 * np.array([[epoch[metric] for epoch in run] for run in runs])
        mean, deviation, epochs = accuracies.mean(0), accuracies.std(0, ddof=1), range(1, EPOCHS + 1)
        axis.plot(epochs, mean, style, color=color, label=label)
        axis.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    axis.set(
        title="Plain training memorizes the wrong labels",
        xlabel=f"epoch (mean ± standard deviation of {SPLITS} splits)",
        ylabel="accuracy (%)",
        xlim=(1, EPOCHS),
        ylim=(50, 102),
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def draw_gains(result: Comparison, axis: Axes) -> None:
    """Draw a bar for the gain of each candidate, with its interval."""
    means, lows, highs = (100 * np.array([found[i] for found in result.differences.values()]) for i in range(3))
    names = list(result.differences)
    colors = [BLUE if name == ALL else GRAY for name in names]
    axis.barh(names, means, xerr=[means - lows, highs - means], color=colors, capsize=3)
    for row, (mean, high) in enumerate(zip(means, highs, strict=True)):
        axis.annotate(f"{mean:+.1f}", (max(high, 0), row), (6, 0), textcoords="offset points", va="center")
    axis.set(title="Each technique alone, and all five", xlabel="gain over plain in validation (points, 90% interval)")
    axis.invert_yaxis()
    axis.set_xlim(right=1.25 * highs.max())  # room for the numbers
    axis.locator_params("x", nbins=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params("y", length=0)


def silence_notices() -> None:
    """Turn off what Lightning repeats for every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # the data are too few for loader processes
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # a deprecation within Lightning


def report() -> None:
    """Compare the candidates in two processes that share a database, print the table, and draw the figure."""
    print(f"{len(candidates())} candidates, {SPLITS} splits each: {setting()}", flush=True)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        helper = get_context("spawn").Process(target=help_compare, args=(folder,))
        helper.start()
        try:
            watch(ALL)
            watch(PLAIN)
            result = compare_all(folder, progress=True)
        finally:
            helper.kill()  # it has nothing left to do, or an error or Ctrl-C ends this process
            helper.join()
        draw(result, folder, OUTPUT / "digits.png")
    rich.print(result.table())
    for path in sorted(OUTPUT.glob("*/version_*/*.png")):
        print(f"Overfitting: {path}")
    print(f"Figure: {OUTPUT / 'digits.png'}\nTensorBoard: tensorboard --logdir {OUTPUT}")


class BriefCLI(LightningCLI):
    """A LightningCLI that reports a wrong argument of a callback in three lines, without a traceback."""

    def instantiate_classes(self) -> None:
        """Create the model, the data, and the trainer with its callbacks."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            reasons = re.findall(r"^  - (?!Expected|Not a valid)(.+)", str(error), re.MULTILINE)
            if not reasons:  # not from an argument with several types, such as callbacks
                raise
            self.parser.error("\n".join(reasons))


USAGE = {command: {"usage": "%(prog)s [--config FILE] [--help] [options]"} for command in LightningCLI.subcommands()}


def main() -> None:
    """Compare without arguments; with arguments, be a LightningCLI."""
    silence_notices()
    if len(sys.argv) == 1:
        report()
    else:
        defaults = {"max_epochs": EPOCHS}
        BriefCLI(DigitsClassifier, Digits, seed_everything_default=0, trainer_defaults=defaults, parser_kwargs=USAGE)


if __name__ == "__main__":
    main()
