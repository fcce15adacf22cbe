"""Measure penalties beside their autograd versions, and print the ratios: ``python -m tests.benchmarks``.

Every row is measured in this run, the contenders taking turns; a ratio is one of medians. Memory is what the resident size of
the process grows by at its peak, which Linux tells.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import rich
import torch
from rich.table import Table

from lightning_reg.functional import add_l1_gradient_, add_l2_gradient_, l1_penalty, l2_penalty

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Row(NamedTuple):
    """A claim: how many times faster one way is than another."""

    work: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    at_least: float


def shapes_of_124m() -> list[tuple[int, ...]]:
    """Return the 148 shapes of a decoder of 124 million parameters: embeddings, twelve blocks, a last normalisation."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return parameters of some shapes, with gradients."""
    made = [torch.randn(shape).requires_grad_() for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def autograd(params: list[Tensor], value: Callable[[list[Tensor]], Tensor]) -> Callable[[], None]:
    """Return what differentiates a penalty into the gradients that there are."""
    return lambda: value(params).backward()


def rows(label: str, params: list[Tensor], gradient: dict[str, float], loss: float) -> list[Row]:
    """Return the claims on both penalties and both routes for one set of parameters."""
    sums: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "L1": lambda params: sum(p.abs().sum() for p in params),  # type: ignore[return-value]
        "L2": lambda params: sum(p.pow(2).sum() for p in params) / 2,  # type: ignore[return-value]
    }
    fused = {"L1": l1_penalty, "L2": l2_penalty}
    added = {"L1": add_l1_gradient_, "L2": add_l2_gradient_}
    found = []
    for name in sums:
        naive = autograd(params, lambda p, name=name: 1e-4 * sums[name](p))
        by_gradient = lambda name=name: added[name](params, 1e-4)  # noqa: E731
        found.append(Row(f"{name}, gradient route, {label}", by_gradient, naive, gradient[name]))
        found.append(
            Row(f"{name}, loss route, {label}", autograd(params, lambda p, name=name: 1e-4 * fused[name](p)), naive, loss)
        )
    return found


def measure(contenders: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median times of functions that take turns, in seconds."""
    times: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for kept, contender in zip(times, contenders, strict=True):
            start = time.perf_counter()
            contender()
            kept.append(time.perf_counter() - start)
    return [median(kept) for kept in times]


def peak_growth(work: Callable[[], object]) -> float:
    """Return by how many MB the resident size grows at its peak, or NaN where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        return float("nan")
    work()  # a first call fills caches
    before = resident(status, "VmRSS")
    reset.write_text("5")
    work()
    return (resident(status, "VmHWM") - before) / 1024


def resident(status: Path, key: str) -> int:
    """Return a size of the process in kB."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def main() -> None:
    """Print the table of all rows and the distance to the floor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each row is measured")
    seconds = parser.parse_args().seconds
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for column in ("Penalty", "ms", "autograd ms", "faster", "at least", "MB", "autograd MB"):
        table.add_column(column, justify="left" if column == "Penalty" else "right")
    small = parameters([(32, 32)] * 600)
    large = parameters(shapes_of_124m())
    claims = rows("600 tensors of 32 × 32", small, {"L1": 10, "L2": 20}, 2)
    claims += rows("124M in 148 tensors", large, {"L1": 5, "L2": 12}, 1)
    for row in claims:
        ours, theirs = measure([row.ours, row.theirs], seconds)
        memory = [f"{peak_growth(work):.0f}" for work in (row.ours, row.theirs)]
        table.add_row(
            row.work, f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", f"{theirs / ours:.1f} ×", f"{row.at_least} ×", *memory
        )
    rich.print(table)
    for label, params in (("600 tensors of 32 × 32", small), ("124M in 148 tensors", large)):
        gradients, weights = [p.grad for p in params if p.grad is not None], [p.detach() for p in params]
        floor = lambda g=gradients, w=weights: torch._foreach_add_(g, w, alpha=1e-4)  # noqa: E731
        l1, l2 = (lambda p=params, add=add: add(p, 1e-4) for add in (add_l1_gradient_, add_l2_gradient_))
        base, *times = measure([floor, l1, l2], seconds)
        most = {"L1": 3, "L2": 1.2}
        told = ", ".join(f"{name} {took / base:.2f} × (at most {most[name]} ×)" for name, took in zip(most, times, strict=True))
        rich.print(f"To the floor, one torch._foreach_add_ over {label} ({base * 1e3:.2f} ms): {told}")


if __name__ == "__main__":
    main()
