"""What regularization is for: few training images, and many of their labels wrong.

Without arguments, this trains the same model on scikit-learn's handwritten digits without regularization, with each of five
techniques alone, and with all five, ten times each. It takes about a minute on two cores, prints a table and draws a figure.
With arguments, it is an ordinary LightningCLI:

    python examples/digits.py
    python examples/digits.py fit --trainer.callbacks+=L1Penalty --trainer.callbacks.strength=1e-4
    python examples/digits.py fit --config examples/digits.yaml
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import matplotlib.pyplot as plt
import numpy as np
import rich
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import DropoutInjection, GradientNormClipping, L1Penalty, L2Penalty, OverfittingMonitor, WeightClipping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

Batch: TypeAlias = tuple[Tensor, ...]

SEEDS = range(10)
EPOCHS = 60
WORKERS = 2
OUTPUT = Path("runs/digits")
PLAIN, ALL = "plain", "all five"
ORANGE, BLUE, GRAY = "#D55E00", "#0072B2", "#7F7F7F"  # distinct for color-blind readers too


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


def techniques() -> dict[str, list[Callback]]:
    """Return the callbacks of each technique. Alone, they are as strong as together with the others."""
    return {
        "L1Penalty": [L1Penalty(5e-4)],
        "L2Penalty": [L2Penalty(1e-2)],
        "DropoutInjection": [DropoutInjection(0.2, after="Flatten"), DropoutInjection(0.5, after="ReLU")],
        "GradientNormClipping": [GradientNormClipping(1.0)],
        "WeightClipping": [WeightClipping(0.1)],
    }


def candidates() -> dict[str, list[Callback]]:
    """Return the callbacks to compare: none, each technique alone, and all together."""
    return {PLAIN: [], **techniques(), ALL: list(chain(*techniques().values()))}


class History(Callback):
    """Keeps the metrics of each epoch, for the curves."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the epoch."""
        self.epochs.append({key: value.item() for key, value in trainer.callback_metrics.items()})


@dataclass
class Run:
    """The outcome of one training."""

    test: float
    train: float
    seconds: float
    history: list[dict[str, float]]


def train(name: str, seed: int, show_callbacks: bool = False) -> Run:
    """Train one candidate with one seed."""
    seed_everything(seed, verbose=False)
    model, data, history = DigitsClassifier(), Digits(seed=seed), History()
    callbacks = [*candidates()[name], history]
    if show_callbacks:
        callbacks.append(ModelSummary(max_depth=0))  # with depth 0, only the summary of the regularization remains
    log = name in (PLAIN, ALL) and seed == SEEDS[0]
    if log:
        callbacks.append(OverfittingMonitor(metric="val/loss", name=name))  # prints a verdict, and saves a figure in the log
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=TensorBoardLogger(OUTPUT, name=name.replace(" ", "_")) if log else False,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=show_callbacks,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    tested, trained = trainer.test(model, data, verbose=False)
    return Run(tested["test/accuracy/dataloader_idx_0"], trained["test/accuracy/dataloader_idx_1"], seconds, history.epochs)


def train_all() -> dict[str, list[Run]]:
    """Train every candidate with every seed, in worker processes.

    Each run sets its own seed and uses one thread, so the results depend neither on the number of workers nor on the order.
    """
    first = (ALL, SEEDS[0])
    jobs = [(name, seed) for seed in SEEDS for name in candidates()]
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), initializer=start_worker) as pool:
        try:
            futures = {job: pool.submit(train, *job) for job in jobs if job != first}
            runs = {first: train(*first, show_callbacks=True)}  # in this process, so that only one run prints
            show_progress(list(futures.values()), done=len(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # on an error or Ctrl-C, do not start what is still waiting
            raise
    runs |= {job: future.result() for job, future in futures.items()}
    return {name: [runs[name, seed] for seed in SEEDS] for name in candidates()}


def start_worker() -> None:
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    torch.set_num_threads(1)
    silence_notices()


def show_progress(futures: list[Future[Run]], done: int) -> None:
    """Wait for the runs, with a progress bar in a terminal, and a line for every ten runs elsewhere."""
    total, terminal = done + len(futures), rich.get_console().is_terminal
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not terminal) as progress:
        task = progress.add_task("Training", total=total, completed=done)
        for finished, future in enumerate(as_completed(futures), done + 1):
            future.result()  # raises what the run raised
            progress.update(task, completed=finished)
            if not terminal and finished % 10 == 0:
                print(f"Trained {finished} of {total} models", flush=True)


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean x̄ and its confidence interval x̄ ± t·s/√n, with Student's t for n − 1 degrees of freedom."""
    t = float(student_t.ppf((1 + level) / 2, len(values) - 1))
    center, half = mean(values), t * stdev(values) / sqrt(len(values))
    return Interval(center, center - half, center + half)


def gain(runs: Sequence[Run], plain: Sequence[Run]) -> Interval:
    """Return the gain in test accuracy over plain, in percentage points, as a mean of differences paired by seed.

    Runs of one seed have the same split, the same wrong labels and the same initial weights.
    """
    return mean_interval([100 * (run.test - base.test) for run, base in zip(runs, plain, strict=True)])


def percent(fractions: Sequence[float]) -> str:
    """Return the mean and the standard deviation of fractions, in percent."""
    return f"{mean(fractions):.1%} ± {stdev(fractions):.1%}"


def table(runs: dict[str, list[Run]]) -> Table:
    """Return a table with a row for each candidate."""
    shown = Table(
        title=f"{setting()}, mean ± standard deviation of {len(SEEDS)} seeds",
        caption="Gain: percentage points over plain, paired by seed, with 95% interval",
    )
    shown.add_column("Callbacks")
    for column in ("Test accuracy", "Gain", "Train\naccuracy", "Time"):
        shown.add_column(column, justify="right")
    for name, of_name in runs.items():
        points, low, high = gain(of_name, runs[PLAIN])
        seconds = mean(run.seconds for run in of_name)
        shown.add_row(
            name,
            percent([run.test for run in of_name]),
            "" if name == PLAIN else f"{points:+.1f} [{low:.1f}, {high:.1f}]",
            f"{mean(run.train for run in of_name):.1%}",
            f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s",  # wider, the table would not fit a terminal
        )
    return shown


def setting() -> str:
    """Return what the models are trained on, in words."""
    data = Digits()
    return f"{data.train_samples} training images, {data.label_noise:.0%} random labels"


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the accuracy over the epochs and the gain of each candidate, and save the figure."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 13})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_curves(runs, left)
    draw_gains(runs, right)
    points = gain(runs[ALL], runs[PLAIN]).mean
    figure.suptitle(f"{setting()}: five techniques gain {points:.0f} points of test accuracy", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=180)


def draw_curves(runs: dict[str, list[Run]], axis: Axes) -> None:
    """Draw the accuracy of each epoch: the mean over the seeds, with its 95% interval as a band."""
    epochs = range(1, EPOCHS + 1)
    for name, metric, color, style, label in (
        (ALL, "val/accuracy", BLUE, "-", "all five, validation"),
        (PLAIN, "val/accuracy", ORANGE, "-", "plain, validation"),
        (PLAIN, "train/accuracy", ORANGE, "--", "plain, training (noisy labels)"),
    ):
        by_epoch = zip(*([100 * epoch[metric] for epoch in run.history] for run in runs[name]), strict=True)
        means, lows, highs = zip(*map(mean_interval, by_epoch), strict=True)
        axis.plot(epochs, means, style, color=color, label=label)
        axis.fill_between(epochs, lows, highs, color=color, alpha=0.2, linewidth=0)
    axis.set(
        title="Plain training memorizes the wrong labels",
        xlabel=f"epoch (mean of {len(SEEDS)} seeds, 95% interval)",
        ylabel="accuracy (%)",
        xlim=(1, EPOCHS),
        ylim=(50, 102),
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def draw_gains(runs: dict[str, list[Run]], axis: Axes) -> None:
    """Draw a bar for the gain of each candidate, with its 95% interval."""
    gains = {name: gain(of_name, runs[PLAIN]) for name, of_name in runs.items() if name != PLAIN}
    means, errors = [found.mean for found in gains.values()], [found.high - found.mean for found in gains.values()]
    axis.barh(list(gains), means, xerr=errors, color=[BLUE if name == ALL else GRAY for name in gains], capsize=3)
    for row, found in enumerate(gains.values()):
        axis.annotate(f"{found.mean:+.1f}", (max(found.high, 0), row), (6, 0), textcoords="offset points", va="center")
    axis.set(title="Each technique alone, and all five", xlabel="gain over plain (points, 95% interval)")
    axis.invert_yaxis()
    axis.set_xlim(right=1.2 * max(found.high for found in gains.values()))  # room for the numbers
    axis.locator_params("x", nbins=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params("y", length=0)


def silence_notices() -> None:
    """Turn off what Lightning repeats for every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # the data are too few for loader processes
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # a deprecation within Lightning


def compare() -> None:
    """Train all candidates, print the table, draw the figure, and say where the output is."""
    print(f"Training {len(candidates())} models with {len(SEEDS)} seeds each: {setting()}")
    torch.set_num_threads(1)
    runs = train_all()
    draw(runs, OUTPUT / "digits.png")
    rich.print(table(runs))
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
        compare()
    else:
        defaults = {"max_epochs": EPOCHS}
        BriefCLI(DigitsClassifier, Digits, seed_everything_default=0, trainer_defaults=defaults, parser_kwargs=USAGE)


if __name__ == "__main__":
    main()
