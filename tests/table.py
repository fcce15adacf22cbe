"""One row for each public callback: what the laws in ``test_laws.py`` are tested with.

A new technique adds its row here and gets the whole battery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_reg import (
    DropoutInjection,
    DropoutScheduler,
    GradientNormClipping,
    GradientValueClipping,
    L1Penalty,
    L2Penalty,
    Linear,
    PeakGradientDropping,
    RandomShrinkage,
    WeightClipping,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_reg.base import Regularizer


@dataclass(frozen=True)
class Row:
    """A callback with arguments under which it acts, and with such under which it does not.

    Args:
        active: Makes one that changes the training of ``helpers.Classifier``.
        inactive: Makes one of strength 0 or with an inactive bound.
        scheduled: Makes one whose value changes over training, or ``None`` where there is nothing to schedule.
        parts: Makes two that act on different parts, side by side.
    """

    active: Callable[[], Regularizer]
    inactive: Callable[[], Regularizer]
    scheduled: Callable[[], Regularizer] | None
    parts: Callable[[], list[Regularizer]]


ROWS = {
    "DropoutInjection": Row(
        active=lambda: DropoutInjection(0.3, after="ReLU"),
        inactive=lambda: DropoutInjection(0.0, after="ReLU"),
        scheduled=lambda: DropoutInjection(Linear(0.0, 0.5), after="ReLU"),
        parts=lambda: [DropoutInjection(0.3, after="ReLU"), DropoutInjection(0.2, after="net.0")],
    ),
    "DropoutScheduler": Row(
        active=lambda: DropoutScheduler(0.4),
        inactive=lambda: DropoutScheduler(0.1),  # the rate that the model has
        scheduled=lambda: DropoutScheduler(Linear(0.0, 0.5)),
        parts=lambda: [DropoutScheduler(0.4, modules="net.3"), DropoutScheduler(0.2, modules="extra")],
    ),
    "GradientNormClipping": Row(
        active=lambda: GradientNormClipping(0.1),
        inactive=lambda: GradientNormClipping(float("inf")),
        scheduled=lambda: GradientNormClipping(Linear(1.0, 0.01)),
        parts=lambda: [GradientNormClipping(0.1, params="net.0.*"), GradientNormClipping(0.2, params="net.4.*")],
    ),
    "GradientValueClipping": Row(
        active=lambda: GradientValueClipping(0.01),
        inactive=lambda: GradientValueClipping(float("inf")),
        scheduled=lambda: GradientValueClipping(Linear(1.0, 0.001)),
        parts=lambda: [GradientValueClipping(0.01, params="net.0.*"), GradientValueClipping(0.02, params="net.4.*")],
    ),
    "L1Penalty": Row(
        active=lambda: L1Penalty(0.01),
        inactive=lambda: L1Penalty(0.0),
        scheduled=lambda: L1Penalty(Linear(0.0, 0.02)),
        parts=lambda: [L1Penalty(0.01, params="net.0.*"), L1Penalty(0.02, params="net.4.*")],
    ),
    "L2Penalty": Row(
        active=lambda: L2Penalty(0.1),
        inactive=lambda: L2Penalty(0.0),
        scheduled=lambda: L2Penalty(Linear(0.0, 0.2)),
        parts=lambda: [L2Penalty(0.1, params="net.0.*"), L2Penalty(0.2, params="net.4.*")],
    ),
    "PeakGradientDropping": Row(
        active=lambda: PeakGradientDropping(1),
        inactive=lambda: PeakGradientDropping(0),
        scheduled=None,
        parts=lambda: [PeakGradientDropping(1, params="net.0.*"), PeakGradientDropping(2, params="net.4.*")],
    ),
    "RandomShrinkage": Row(
        active=lambda: RandomShrinkage(0.1),
        inactive=lambda: RandomShrinkage(0.0),
        scheduled=lambda: RandomShrinkage(Linear(0.0, 0.2)),
        parts=lambda: [RandomShrinkage(0.1, params="net.0.*"), RandomShrinkage(0.2, params="net.4.*")],
    ),
    "WeightClipping": Row(
        active=lambda: WeightClipping(0.05),
        inactive=lambda: WeightClipping(float("inf")),
        scheduled=lambda: WeightClipping(Linear(0.1, 0.01)),
        parts=lambda: [WeightClipping(0.05, params="net.0.*"), WeightClipping(0.02, params="net.4.*")],
    ),
}


def everything() -> list[Regularizer]:
    """Return one of each callback, active; the penalties and the two clippings are weak enough for all to matter."""
    return [row.active() for row in ROWS.values()]
