"""Constant, early, and late dropout for the same model, on scikit-learn's handwritten digits.

    python examples/dropout_schedules.py
    python examples/dropout_schedules.py --epochs=20 --seeds=2

This prints the accuracy on the training and test images, and draws the dropout rate and the losses of each epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import rich
import torch
from digits import Digits, DigitsClassifier, History, silence_notices
from lightning.pytorch import Trainer, seed_everything
from rich.table import Table

from lightning_reg import DropoutInjection, Steps

OUTPUT = Path("runs/dropout_schedules")
P = 0.5


def schedules() -> dict[str, Steps | float]:
    """Return the dropout rates over training, by name."""
    return {
        "none": 0.0,
        "constant": P,
        "early": Steps([P, 0.0], at=[0.5]),
        "late": Steps([0.0, P], at=[0.5]),
    }


def train(p: Steps | float, seed: int, epochs: int) -> tuple[float, float, list[dict[str, float]]]:
    """Train with a schedule and a seed; return the training and test accuracy, and the metrics of each epoch."""
    seed_everything(seed, verbose=False)
    model, data, history = DigitsClassifier(), Digits(train_samples=200, label_noise=0.0, seed=seed), History()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[DropoutInjection(p, after="ReLU", name="dropout"), history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    on_test, on_train = trainer.test(model, data, verbose=False)
    return on_train["test/accuracy/dataloader_idx_1"], on_test["test/accuracy/dataloader_idx_0"], history.epochs


def draw(histories: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Draw the dropout rate and the mean losses over the seeds for each epoch, and save the figure."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, runs in histories.items():
        epochs = range(1, len(runs[0]) + 1)
        p = schedules()[name]
        axes[0].plot(epochs, [p((epoch - 0.5) / len(epochs)) if callable(p) else p for epoch in epochs], label=name)
        for axis, metric in zip(axes[1:], ("train/loss", "val/loss"), strict=True):
            curves = torch.tensor([[epoch[metric] for epoch in run] for run in runs])
            axis.plot(epochs, curves.mean(0), label=name)
    for axis, label in zip(axes, ("dropout rate", "training loss (with dropout)", "validation loss"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def compare(epochs: int, seeds: int) -> None:
    """Train with every schedule and seed, print a table, and draw the curves."""
    table = Table(title=f"Digits, {epochs} epochs, mean ± standard deviation of {seeds} seeds", title_justify="left")
    for column in ("Dropout", "Train accuracy", "Test accuracy", "Validation loss"):
        table.add_column(column, justify="left" if column == "Dropout" else "right")
    histories = {}
    for name, p in schedules().items():
        runs = [train(p, seed, epochs) for seed in range(seeds)]
        histories[name] = [history for _, _, history in runs]
        loss = mean(history[-1]["val/loss"] for history in histories[name])
        accuracies = [f"{mean(part):.1%} ± {stdev(part):.1%}" for part in list(zip(*runs, strict=True))[:2]]
        table.add_row(name, *accuracies, f"{loss:.3f}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(histories, OUTPUT / "curves.png")
    rich.print(table)
    rich.print(f"Curves: {OUTPUT / 'curves.png'}")


def main() -> None:
    """Parse the arguments, and compare the schedules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="number of epochs of each training")
    parser.add_argument("--seeds", type=int, default=4, help="number of trainings with each schedule, at least 2")
    arguments = parser.parse_args()
    silence_notices()
    compare(arguments.epochs, arguments.seeds)


if __name__ == "__main__":
    main()
