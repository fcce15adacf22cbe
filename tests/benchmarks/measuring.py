"""How time and memory are measured: contenders take turns, medians are compared, memory is what the process grows by."""

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


class Claim(NamedTuple):
    """That one way is at least some times faster than another.

    Args:
        work: What is done.
        ours: Does it our way.
        theirs: Does it the other way.
        at_least: How many times faster ours has to be.
        once: Whether the other way is so slow that it is run a single time.
    """

    work: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    at_least: float
    once: bool = False


def shapes_of_124m() -> list[tuple[int, ...]]:
    """Return the 148 shapes of a decoder of 124 million parameters: embeddings, twelve blocks, a last normalization."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return parameters of some shapes, with gradients."""
    made = [torch.randn(shape).requires_grad_() for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def measure(contenders: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median times of functions that take turns, in seconds; a turn is a block of calls by torch's Timer."""
    threads = torch.get_num_threads()
    timers = [Timer("run()", globals={"run": contender}, num_threads=threads) for contender in contenders]
    calls = [math.ceil(_BLOCK / timer.timeit(1).mean) for timer in timers]
    times: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for kept, timer, number in zip(times, timers, calls, strict=True):
            kept.append(timer.timeit(number).mean)
    return [median(kept) for kept in times]


_BLOCK = 0.02
"""How many seconds a block of calls takes at least."""


def both(claim: Claim, seconds: float) -> tuple[list[float], list[float]]:
    """Return the times of both ways, in seconds, and by how many MB each grows at its peak."""
    if not claim.once:
        return measure([claim.ours, claim.theirs], seconds), [peak_growth(claim.ours), peak_growth(claim.theirs)]
    times = measure([claim.ours], seconds)
    memory = peak_growth(claim.ours)
    start = time.perf_counter()
    peer_memory = peak_growth(claim.theirs, warm=False)
    return [*times, time.perf_counter() - start], [memory, peer_memory]


def peak_growth(work: Callable[[], object], *, warm: bool = True) -> float:
    """Return by how many MB the resident size grows at its peak, or NaN where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        return float("nan")
    if warm:
        work()  # a first call fills caches
    before = resident(status, "VmRSS")
    reset.write_text("5")
    work()
    return (resident(status, "VmHWM") - before) / 1024


def resident(status: Path, key: str) -> int:
    """Return a size of the process in kB."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])
