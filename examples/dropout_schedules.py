"""Early, late and constant dropout on scikit-learn's handwritten digits: the same model, three schedules of the rate.

    python examples/dropout_schedules.py
    python examples/dropout_schedules.py --epochs=20 --seeds=2

It prints the accuracy on the training and the test images, and draws the rate and the validation loss of each epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import rich
import torch
from digits import Digits, DigitsClassifier, History, percent, silence_notices
from lightning.pytorch import Trainer, seed_everything
from rich.table import Table

from lightning_reg import DropoutInjection, Steps

OUTPUT = Path("runs/dropout_schedules")
P = 0.5


def schedules() -> dict[str, Steps | float]:
    """Return the rate of dropout over training, by its name."""
    return {
        "none": 0.0,
        "constant": P,
        "early": Steps([P, 0.0], at=[0.5]),
        "late": Steps([0.0, P], at=[0.5]),
    }


def train(p: Steps | float, seed: int, epochs: int) -> tuple[float, float, list[dict[str, float]]]:
    """Train with a schedule and a seed; return the accuracy in training and test, and what each epoch measured."""
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
    tested, trained = trainer.test(model, data, verbose=False)
    return trained["test/accuracy/dataloader_idx_1"], tested["test/accuracy/dataloader_idx_0"], history.epochs


def draw(histories: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Draw the rate and the losses of each epoch, mean over the seeds, and save the figure."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for kind, of_kind in histories.items():
        epochs = range(1, len(of_kind[0]) + 1)
        p = schedules()[kind]
        axes[0].plot(epochs, [p((epoch - 0.5) / len(epochs)) if callable(p) else p for epoch in epochs], label=kind)
        for axis, quantity in zip(axes[1:], ("train/loss", "val/loss"), strict=True):
            curves = torch.tensor([[epoch[quantity] for epoch in history] for history in of_kind])
            axis.plot(epochs, curves.mean(0), label=kind)
    for axis, label in zip(axes, ("rate of dropout", "training loss, with its dropout", "validation loss"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def compare(epochs: int, seeds: int) -> None:
    """Train with every schedule and seed; print the table, draw the curves, and say where they are."""
    shown = Table(title=f"Digits, {epochs} epochs, mean ± standard deviation of {seeds} seeds", title_justify="left")
    for column in ("Dropout", "Train accuracy", "Test accuracy", "Validation loss"):
        shown.add_column(column, justify="left" if column == "Dropout" else "right")
    histories = {}
    for kind, p in schedules().items():
        runs = [train(p, seed, epochs) for seed in range(seeds)]
        histories[kind] = [history for _, _, history in runs]
        loss = mean(history[-1]["val/loss"] for history in histories[kind])
        shown.add_row(kind, percent([run[0] for run in runs]), percent([run[1] for run in runs]), f"{loss:.3f}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(histories, OUTPUT / "curves.png")
    rich.print(shown)
    rich.print(f"Curves: {OUTPUT / 'curves.png'}")


def main() -> None:
    """Read the arguments, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="how many epochs each model is trained for")
    parser.add_argument("--seeds", type=int, default=4, help="how many times, at least 2")
    arguments = parser.parse_args()
    silence_notices()
    compare(arguments.epochs, arguments.seeds)


if __name__ == "__main__":
    main()
