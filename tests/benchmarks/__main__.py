"""Measure side by side what is claimed to be fast, and print the ratios: ``python -m tests.benchmarks``.

Every row is measured in this run, the contenders taking turns; a ratio is one of medians. Memory is what the resident size of
the process grows by at its peak, which Linux tells.
"""

from __future__ import annotations

import argparse

import rich
import torch
from rich.table import Table

from tests.benchmarks import dropout, gradients, penalties, pruning
from tests.benchmarks.measuring import Claim, both, parameters, shapes_of_124m


def table_of(claims: list[Claim], seconds: float) -> Table:
    """Measure claims, and return the table of what came."""
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for column in ("Work", "ms", "peer ms", "faster", "at least", "MB", "peer MB"):
        table.add_column(column, justify="left" if column == "Work" else "right")
    for claim in claims:
        (ours, theirs), grown = both(claim, seconds)
        memory = [f"{megabytes:.0f}" for megabytes in grown]
        faster = f"{theirs / ours:.1f} ×"
        table.add_row(claim.work, f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", faster, f"{claim.at_least} ×", *memory)
    return table


def main() -> None:
    """Print the table of all claims and the distance to the floor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each row is measured")
    seconds = parser.parse_args().seconds
    small, large = parameters([(32, 32)] * 600), parameters(shapes_of_124m())
    claims = [
        *penalties.claims("600 tensors of 32 × 32", small, {"L1": 10, "L2": 20}, 2),
        *penalties.claims("124M in 148 tensors", large, {"L1": 5, "L2": 12}, 1),
        *gradients.claims("124M in 148 tensors", large),
        *dropout.claims(),
        pruning.claim("124M in 148 tensors", large, 0.8, 35),
    ]
    rich.print(table_of(claims, seconds))
    if gradients.adaptive_clipping_of_timm() is None:
        rich.print(
            "Adaptive clipping was not measured: timm is missing (pip install --no-deps timm is enough, one file of it is used)"
        )
    for label, params in (("600 tensors of 32 × 32", small), ("124M in 148 tensors", large)):
        rich.print(penalties.told_of_floor(label, params, seconds))
    rich.print(pruning.told_of_masks("124M in 148 tensors", large, 0.8))


if __name__ == "__main__":
    main()
