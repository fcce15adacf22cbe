"""Accuracy against sparsity: the digits model pruned gradually to ever larger shares, by magnitude and at random.

    python examples/pruning_curve.py

trains a network for each share, criterion and seed (one or two minutes), prints a table and draws the curve as a PNG.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, TypeAlias

import matplotlib.pyplot as plt
import rich
from digits import Digits, DigitsClassifier, percent, silence_notices
from lightning.pytorch import Trainer, seed_everything
from rich.table import Table

from lightning_reg import Cubic, WeightPruning, sparsity

Criterion: TypeAlias = Literal["magnitude", "random"]
Curves: TypeAlias = dict[Criterion, dict[float, list[float]]]

SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
CRITERIA: tuple[Criterion, ...] = ("magnitude", "random")


def accuracy(share: float, criterion: Criterion, seed: int, epochs: int) -> float:
    """Train with gradual pruning, over the first 70 % of training, and return the accuracy on the test images."""
    seed_everything(seed, verbose=False)
    model = DigitsClassifier(hidden=64)
    data = Digits(train_samples=600, label_noise=0.0, batch_size=100, seed=seed)
    pruning = WeightPruning(Cubic(0.0, share, until=0.7), criterion=criterion, scope="layer")
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
    assert abs(sparsity(model).fraction - share) < 1e-3, "each layer's share is exact up to rounding"
    tested, _ = trainer.test(model, data, verbose=False)
    return float(tested["test/accuracy/dataloader_idx_0"])


def table(curves: Curves, seeds: int) -> Table:
    """Return the mean accuracies over the seeds, with their standard deviations."""
    shown = Table(title=f"Digits: test accuracy, mean ± standard deviation of {seeds} seeds")
    for column in ("Sparsity", *curves):
        shown.add_column(column, justify="right")
    for share in curves["magnitude"]:
        shown.add_row(f"{share:.0%}", *(percent(curve[share]) for curve in curves.values()))
    return shown


def draw(curves: Curves, path: Path) -> None:
    """Draw the mean accuracy over the share of zeros, with the standard deviation, and save the figure."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for criterion, curve in curves.items():
        means, deviations = [mean(found) for found in curve.values()], [stdev(found) for found in curve.values()]
        axis.errorbar([100 * share for share in curve], means, deviations, marker="o", capsize=3, label=criterion)
    axis.set(xlabel="weights that are zero (%)", ylabel="test accuracy", title="Digits, pruned gradually, each layer alike")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print the table, draw the curve, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings for each share and criterion, at least 2")
    parser.add_argument("--output", type=Path, default=Path("runs/pruning"), help="the folder for the curve")
    given = parser.parse_args()
    silence_notices()
    curves: Curves = {
        criterion: {share: [accuracy(share, criterion, seed, given.epochs) for seed in range(given.seeds)] for share in SHARES}
        for criterion in CRITERIA
    }
    given.output.mkdir(parents=True, exist_ok=True)
    draw(curves, given.output / "curve.png")
    rich.print(table(curves, given.seeds))
    rich.print(f"Curve: {given.output / 'curve.png'}")


if __name__ == "__main__":
    main()
