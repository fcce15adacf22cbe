"""Measure side by side what is claimed to be fast, and print the ratios: ``python -m tests.benchmarks``.

Every row is measured in this run, the contenders taking turns; a ratio is one of medians. Memory is what the resident size of
the process grows by at its peak, which Linux tells.
"""

from __future__ import annotations

import argparse
import logging

import rich
import torch
from rich.table import Table

from tests.benchmarks import cuda, dropout, gradients, penalties, pruning, scaling, steps
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


def table_of_steps() -> Table:
    """Measure what each callback adds to a step of a tiny model, and return the table."""
    table = Table(title="µs that a callback adds to a step of a tiny model, not logging (at most 100)")
    for column in ("Callback", "without a logger", "with one"):
        table.add_column(column, justify="left" if column == "Callback" else "right")
    for name, (silent, with_logger) in steps.added_by_each().items():
        table.add_row(name, f"{silent:.0f}", f"{with_logger:.0f}")
    return table


def table_of_scaling(seconds: float) -> Table:
    """Measure how costs grow, and return the table."""
    table = Table(title="ms for a million parameters (the same number at each size if costs grow in proportion)")
    table.add_column("Work")
    for size in scaling.SIZES:
        table.add_column(f"{size}M", justify="right")
    for name, per_million in scaling.scaling(seconds).items():
        table.add_row(name, *(f"{ms:.2f}" for ms in per_million))
    return table


def table_of_cuda(seconds: float) -> Table:
    """Measure on the GPU, and return the table."""
    table = Table(title=f"{torch.cuda.get_device_name()}: 1,000M parameters, float32")
    for column in ("Work", "share of a copy's bandwidth", "MB"):
        table.add_column(column, justify="left" if column == "Work" else "right")
    for found in cuda.reached("cuda", 1000, seconds):
        table.add_row(found.work, f"{found.share:.0%}", f"{found.megabytes:.0f}")
    return table


def main() -> None:
    """Print all tables, and what could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each row is measured")
    seconds = parser.parse_args().seconds
    for name in ("lightning.pytorch", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    small, large = parameters([(32, 32)] * 600), parameters(shapes_of_124m())
    claims = [
        *penalties.claims("600 tensors of 32 × 32", small, {"L1": 10, "L2": 20}, 2),
        *penalties.claims("124M in 148 tensors", large, {"L1": 5, "L2": 12}, 1),
        *gradients.claims("124M in 148 tensors", large),
        *dropout.claims(),
        pruning.claim("124M in 148 tensors", large, 0.8, 35),
    ]
    rich.print(table_of(claims, seconds))
    for label, params in (("600 tensors of 32 × 32", small), ("124M in 148 tensors", large)):
        rich.print(penalties.report_floor(label, params, seconds))
    rich.print(pruning.report_masks("124M in 148 tensors", large, 0.8))
    rich.print(dropout.report_graphs())
    if gradients.adaptive_clipping_of_timm() is None:
        rich.print(
            "Adaptive clipping was not measured: timm is missing (pip install --no-deps timm is enough, one file of it is used)"
        )
    rich.print(table_of_scaling(seconds))
    rich.print(table_of_steps())
    if torch.cuda.is_available():
        rich.print(table_of_cuda(seconds))
    else:
        rich.print("CUDA was not measured: there is none here")


if __name__ == "__main__":
    main()
