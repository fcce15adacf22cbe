"""What the gradient route and clipping reach on a GPU: the share of its memory bandwidth, memory, waiting for the device."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_reg.functional import add_l1_gradient_, add_l2_gradient_, clip_gradient_norm_, clip_unit_gradients_
from tests.benchmarks.measuring import measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Reached", "reached", "waits"]


class Reached(NamedTuple):
    """What one kind of work reaches.

    Args:
        work: What is done.
        share: The bytes that it must move, by the time that it takes, as a share of what a copy on the device reaches.
        megabytes: By how much the allocated memory grows at its peak.
    """

    work: str
    share: float
    megabytes: float


def reached(device: torch.device | str, millions: int, seconds: float) -> list[Reached]:
    """Measure work over so many million float32 parameters, in tensors of four million."""
    params = [torch.randn(2000, 2000, device=device, requires_grad=True) for _ in range(max(millions // 4, 1))]
    for p in params:
        p.grad = torch.randn_like(p)
    size = sum(p.numel() * p.element_size() for p in params)
    work: dict[str, tuple[int, Callable[[], object]]] = {  # how often all parameters or gradients are read or written
        "L1, gradient route": (3, partial(add_l1_gradient_, params, 1e-4)),
        "L2, gradient route": (3, partial(add_l2_gradient_, params, 1e-4)),
        "global norm clipping": (3, partial(clip_gradient_norm_, params, 1e3)),
        "adaptive clipping": (4, partial(clip_unit_gradients_, params, 0.01)),
    }
    source = torch.empty(size // 4, device=device)
    target = torch.empty_like(source)
    contenders = [partial(target.copy_, source), *(act for _, act in work.values())]
    copy, *times = measure([partial(_finished, act) for act in contenders], seconds)
    fastest = 2 * size / copy
    pairs = zip(work.items(), times, strict=True)
    return [Reached(name, streams * size / took / fastest, _growth(act)) for (name, (streams, act)), took in pairs]


def waits(step: Callable[[], object]) -> int:
    """Return how often some work on the GPU makes the host wait for it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _finished(act: Callable[[], object]) -> None:
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _growth(act: Callable[[], Tensor | object]) -> float:
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
