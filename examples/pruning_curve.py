"""Accuracy against sparsity: a model for handwritten digits, pruned gradually by magnitude and at random.

    python examples/pruning_curve.py

This trains a network for each sparsity, criterion, and seed, which takes one or two minutes. It prints a table, and draws the
curves as a PNG.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, TypeAlias

import matplotlib.pyplot as plt
import rich
from digits import Digits, DigitsClassifier, silence_notices
from lightning.pytorch import Trainer, seed_everything
from rich.table import Table

from lightning_reg import Cubic, WeightPruning, sparsity

Criterion: TypeAlias = Literal["magnitude", "random"]
Curves: TypeAlias = dict[Criterion, dict[float, list[float]]]

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
CRITERIA: tuple[Criterion, ...] = ("magnitude", "random")


def accuracy(target: float, criterion: Criterion, seed: int, epochs: int) -> float:
    """Prune gradually over the first 70% of training, and return the accuracy on the test images."""
    seed_everything(seed, verbose=False)
    model = DigitsClassifier(hidden=64)
    data = Digits(train_samples=600, label_noise=0.0, batch_size=100, seed=seed)
    pruning = WeightPruning(Cubic(0.0, target, until=0.7), criterion=criterion, scope="layer")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[pruning],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    assert abs(sparsity(model).fraction - target) < 1e-3, "the sparsity of each layer is exact up to rounding"
    on_test, _ = trainer.test(model, data, verbose=False)
    return float(on_test["test/accuracy/dataloader_idx_0"])


def accuracy_table(curves: Curves, seeds: int) -> Table:
    """Return a table of the mean accuracies over the seeds, with their standard deviations."""
    table = Table(title=f"Digits: test accuracy, mean ± standard deviation of {seeds} seeds")
    for column in ("Sparsity", *curves):
        table.add_column(column, justify="right")
    for target in SPARSITIES:
        found = [curve[target] for curve in curves.values()]
        table.add_row(f"{target:.0%}", *(f"{mean(part):.1%} ± {stdev(part):.1%}" for part in found))
    return table


def draw(curves: Curves, path: Path) -> None:
    """Draw the mean accuracy against the sparsity, with its standard deviation, and save the figure."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for criterion, curve in curves.items():
        means, deviations = list(map(mean, curve.values())), list(map(stdev, curve.values()))
        axis.errorbar([100 * target for target in curve], means, deviations, marker="o", capsize=3, label=criterion)
    axis.set(xlabel="sparsity of each layer (%)", ylabel="test accuracy", title="Handwritten digits, pruned gradually")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print a table, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="number of epochs of each training")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings for each sparsity and criterion, at least 2")
    parser.add_argument("--output", type=Path, default=Path("runs/pruning"), help="folder for the figure")
    arguments = parser.parse_args()
    silence_notices()
    seeds = range(arguments.seeds)
    curves: Curves = {
        criterion: {target: [accuracy(target, criterion, seed, arguments.epochs) for seed in seeds] for target in SPARSITIES}
        for criterion in CRITERIA
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(curves, arguments.output / "curve.png")
    rich.print(accuracy_table(curves, arguments.seeds))
    rich.print(f"Curves: {arguments.output / 'curve.png'}")


if __name__ == "__main__":
    main()
