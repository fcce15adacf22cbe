"""The growth of costs with the number of parameters, which should be in proportion."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lightning_reg.functional import (
    add_l1_gradient_,
    add_l2_gradient_,
    clip_gradient_norm_,
    clip_unit_gradients_,
    project_unit_norms_,
)
from tests.benchmarks.measuring import measure, parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SIZES = (1, 10, 100)
"""Numbers of parameters in millions, in tensors of one million each."""

WORK: dict[str, Callable[[list[Tensor]], object]] = {
    "L1 on the gradients": lambda params: add_l1_gradient_(params, 1e-4),
    "L2 on the gradients": lambda params: add_l2_gradient_(params, 1e-4),
    "global norm clipping": lambda params: clip_gradient_norm_(params, 1e3),
    "adaptive clipping": lambda params: clip_unit_gradients_(params, 0.01),
    "max norm": lambda params: project_unit_norms_([p.detach() for p in params], 0.0, 1e3),
}


def scaling(seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds per million parameters, for each kind of work at each size."""
    results: dict[str, list[float]] = {name: [] for name in WORK}
    for size in SIZES:
        params = parameters([(1000, 1000)] * size)
        times = measure([partial(work, params) for work in WORK.values()], seconds)
        for name, time in zip(WORK, times, strict=True):
            results[name].append(1e3 * time / size)
    return results
