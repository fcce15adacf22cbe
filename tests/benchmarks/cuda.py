"""Penalties on the gradients, clipping, and constraints on a GPU: memory bandwidth, memory, and waiting for the device."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_reg.functional import (
    add_l1_gradient_,
    add_l2_gradient_,
    clip_gradient_norm_,
    clip_unit_gradients_,
    project_unit_norms_,
)
from tests.benchmarks.measuring import measure, peak_growth

if TYPE_CHECKING:
    from collections.abc import Callable


class Bandwidth(NamedTuple):
    """The memory bandwidth of one kind of work.

    Args:
        work: What is measured.
        fraction: The bytes that it must move per second, as a fraction of what a copy on the device reaches.
        megabytes: The peak growth of the allocated memory.
    """

    work: str
    fraction: float
    megabytes: float


def measure_bandwidth(device: torch.device | str, millions: int, seconds: float) -> list[Bandwidth]:
    """Measure work over millions of float32 parameters, in tensors of four million each."""
    params = [torch.randn(2000, 2000, device=device, requires_grad=True) for _ in range(max(millions // 4, 1))]
    for p in params:
        p.grad = torch.randn_like(p)
    size = sum(p.numel() * p.element_size() for p in params)
    work: dict[str, tuple[int, Callable[[], object]]] = {  # how often it reads or writes all parameters or gradients
        "L1 on the gradients": (3, partial(add_l1_gradient_, params, 1e-4)),
        "L2 on the gradients": (3, partial(add_l2_gradient_, params, 1e-4)),
        "global norm clipping": (3, partial(clip_gradient_norm_, params, 1e3)),
        "adaptive clipping": (4, partial(clip_unit_gradients_, params, 0.01)),
        "max norm": (3, partial(project_unit_norms_, params, 0.0, 1e3)),
    }
    source = torch.empty(size // 4, device=device)
    target = torch.empty_like(source)
    functions = [partial(target.copy_, source), *(function for _, function in work.values())]
    copy_time, *times = measure(functions, seconds)
    copy_bandwidth = 2 * size / copy_time
    rows = zip(work.items(), times, strict=True)
    return [
        Bandwidth(name, passes * size / time / copy_bandwidth, peak_growth(function))
        for (name, (passes, function)), time in rows
    ]


def count_syncs(function: Callable[[], object]) -> int:
    """Return how often a function makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
