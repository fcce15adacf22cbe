"""Measurement of time and memory: functions take turns, times are medians, memory is the growth at its peak."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.benchmark import Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where everything is measured: on the GPU if there is one."""


class Comparison(NamedTuple):
    """Two implementations of the same work.

    Args:
        work: What is measured.
        ours: The implementation of this package.
        other: The other implementation.
        once: Run the other implementation only once, because it is slow.
    """

    work: str
    ours: Callable[[], object]
    other: Callable[[], object]
    once: bool = False


def shapes_of_124m() -> list[tuple[int, ...]]:
    """Return the 148 shapes of a decoder of 124 million parameters: embeddings, twelve blocks, a last normalization."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return random parameters of given shapes, with random gradients."""
    params = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def measure(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median times of functions in seconds. They take turns; a turn is a block of calls by torch's Timer."""
    threads = torch.get_num_threads()
    timers = [Timer("run()", globals={"run": function}, num_threads=threads) for function in functions]
    calls = [math.ceil(_BLOCK / timer.timeit(1).mean) for timer in timers]
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for measured, timer, number in zip(times, timers, calls, strict=True):
            measured.append(timer.timeit(number).mean)
    return [median(measured) for measured in times]


_BLOCK = 0.02
"""The minimum duration of a block of calls, in seconds."""


def measure_both(comparison: Comparison, seconds: float) -> tuple[list[float], list[float]]:
    """Return the times of both implementations in seconds, and their peak memory growth in MB."""
    ours, other = comparison.ours, comparison.other
    if not comparison.once:
        return measure([ours, other], seconds), [peak_growth(ours), peak_growth(other)]
    times = measure([ours], seconds)
    memory = peak_growth(ours)
    start = time.perf_counter()
    other_memory = peak_growth(other, warm=False)  # it waits for the device
    return [*times, time.perf_counter() - start], [memory, other_memory]


def peak_growth(work: Callable[[], object], *, warm: bool = True) -> float:
    """Return the growth of the memory at its peak in MB: what is allocated on the GPU, or the resident memory of the process.

    It is NaN if the system does not report it.
    """
    if DEVICE == "cuda":
        return peak_growth_on_gpu(work, warm=warm)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        return float("nan")
    if warm:
        work()  # the first call fills caches
    before = resident(status, "VmRSS")
    reset.write_text("5")
    work()
    return (resident(status, "VmHWM") - before) / 1024


def peak_growth_on_gpu(work: Callable[[], object], *, warm: bool = True) -> float:
    """Return the growth of the allocated GPU memory at its peak in MB."""
    if warm:
        work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident(status: Path, key: str) -> int:
    """Return a memory size of the process in kB."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])
