"""Compare time and memory with other implementations: ``python -m tests.benchmarks``.

Both implementations of a row are measured in the same run and take turns. Times are medians. Memory is the growth at its peak.
With a GPU, tensors are on it; otherwise memory is the resident memory of the process, which only Linux reports.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from contextlib import redirect_stdout
from io import StringIO

import rich
import torch
from rich.table import Table

from tests.benchmarks import cuda, dropout, gradients, penalties, pruning, scaling, steps, watching
from tests.benchmarks.measuring import DEVICE, Comparison, measure_both, parameters, shapes_of_124m

SMALL, LARGE = "600 tensors of 32 × 32", "124M parameters in 148 tensors"


def comparison_table(comparisons: list[Comparison], seconds: float) -> Table:
    """Measure comparisons, and return a table of the results."""
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(title=f"torch {torch.__version__}, {where}, float32")
    for column in ("Work", "ms", "other ms", "times as fast", "MB", "other MB"):
        table.add_column(column, justify="left" if column == "Work" else "right")
    for comparison in comparisons:
        (time, other_time), megabytes = measure_both(comparison, seconds)
        cells = [f"{time * 1e3:.2f}", f"{other_time * 1e3:.2f}", f"{other_time / time:.1f}", *(f"{mb:.0f}" for mb in megabytes)]
        table.add_row(comparison.work, *cells)
    return table


def step_table() -> Table:
    """Measure what each callback adds to a step of a tiny model, and return a table of the results."""
    table = Table(title="µs that a callback adds to a step of a tiny model, in steps that are not logged")
    for column in ("Callback", "without a logger", "with a logger"):
        table.add_column(column, justify="left" if column == "Callback" else "right")
    with redirect_stdout(StringIO()):  # the verdicts of the monitor
        added = steps.added_by_each()
    for name, (without_logger, with_logger) in added.items():
        table.add_row(name, f"{without_logger:.0f}", f"{with_logger:.0f}")
    return table


def scaling_table(seconds: float) -> Table:
    """Measure how costs grow with the number of parameters, and return a table of the results."""
    table = Table(title="ms per million parameters, at three model sizes")
    table.add_column("Work")
    for size in scaling.SIZES:
        table.add_column(f"{size}M", justify="right")
    for name, per_million in scaling.scaling(seconds).items():
        table.add_row(name, *(f"{ms:.2f}" for ms in per_million))
    return table


def cuda_table(seconds: float) -> Table:
    """Measure on the GPU, and return a table of the results."""
    table = Table(title=f"{torch.cuda.get_device_name()}: 1,000M parameters, float32")
    for column in ("Work", "fraction of a copy's bandwidth", "MB"):
        table.add_column(column, justify="left" if column == "Work" else "right")
    for row in cuda.measure_bandwidth("cuda", 1000, seconds):
        table.add_row(row.work, f"{row.fraction:.0%}", f"{row.megabytes:.0f}")
    return table


def main() -> None:
    """Print all tables, and what was not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to measure each row")
    seconds = parser.parse_args().seconds
    for name in ("lightning.pytorch", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if DEVICE == "cuda":
        rich.print(cuda_table(seconds))
    else:
        rich.print("CUDA was not measured, because there is no CUDA device")
    small, large = parameters([(32, 32)] * 600), parameters(shapes_of_124m())
    comparisons = [
        *penalties.comparisons(SMALL, small),
        *penalties.comparisons(LARGE, large),
        *gradients.comparisons(LARGE, large),
        *dropout.comparisons(),
        pruning.comparison(LARGE, large, 0.8),
    ]
    rich.print(comparison_table(comparisons, seconds))
    for label, params in ((SMALL, small), (LARGE, large)):
        rich.print(penalties.report_floor(label, params, seconds))
        rich.print(watching.report_cost(label, params, seconds))
    rich.print(pruning.report_threshold(LARGE, large, 0.8))
    rich.print(dropout.report_graphs())
    if gradients.load_timm_clipping() is None:
        rich.print(
            "Adaptive clipping was not measured, because timm is not installed (pip install --no-deps timm is enough: only one "
            "file of it is used)"
        )
    rich.print(scaling_table(seconds))
    rich.print(step_table())
    rich.print(watching.coverage_table())


if __name__ == "__main__":
    main()
