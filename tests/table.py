"""One row for each public callback: what the laws in ``test_laws.py`` are tested with.

A new technique adds its row here and gets the whole battery.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_reg import (
    ActivityPenalty,
    Cubic,
    DropoutInjection,
    DropoutScheduler,
    ElasticNetPenalty,
    GradientNormClipping,
    GradientValueClipping,
    GroupLassoPenalty,
    GroupSoftThresholding,
    L1Penalty,
    L2Penalty,
    Linear,
    OrthogonalityPenalty,
    PeakGradientDropping,
    RandomShrinkage,
    SoftThresholding,
    StartingPointPenalty,
    WeightClipping,
    WeightDecay,
    WeightDecayScheduler,
    WeightPruning,
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
        parts: Makes two that act on different parts, side by side, or ``None`` where it has no parts to choose.
        options: What the model needs: arguments of ``helpers.Classifier``.
        exempt: Laws that cannot hold for it, by the name of the test, with the reason.
    """

    active: Callable[[], Regularizer]
    inactive: Callable[[], Regularizer]
    scheduled: Callable[[], Regularizer] | None
    parts: Callable[[], list[Regularizer]] | None
    options: dict[str, float] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[Regularizer]:
        """Return one of each kind."""
        return [
            self.active(),
            self.inactive(),
            *(self.parts() if self.parts else []),
            *([self.scheduled()] if self.scheduled else []),
        ]


ROWS = {
    "ActivityPenalty": Row(
        active=lambda: ActivityPenalty(0.1, modules="ReLU"),
        inactive=lambda: ActivityPenalty(0.0, modules="ReLU"),
        scheduled=lambda: ActivityPenalty(Linear(0.0, 0.2), modules="ReLU"),
        parts=lambda: [ActivityPenalty(0.1, modules="ReLU"), ActivityPenalty(0.01, modules="net.4", p=2)],
        exempt={"several_optimizers": "it refuses manual optimization, where it cannot know which loss is meant"},
    ),
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
    "ElasticNetPenalty": Row(
        active=lambda: ElasticNetPenalty(0.01, 0.1),
        inactive=lambda: ElasticNetPenalty(0.0, 0.0),
        scheduled=lambda: ElasticNetPenalty(Linear(0.0, 0.02), Linear(0.2, 0.0)),
        parts=lambda: [ElasticNetPenalty(0.01, 0.1, params="net.0.*"), ElasticNetPenalty(0.02, 0.0, params="net.4.*")],
    ),
    "GroupLassoPenalty": Row(
        active=lambda: GroupLassoPenalty(0.01),
        inactive=lambda: GroupLassoPenalty(0.0),
        scheduled=lambda: GroupLassoPenalty(Linear(0.0, 0.02)),
        parts=lambda: [GroupLassoPenalty(0.01, params="net.0.*"), GroupLassoPenalty(0.02, params="net.4.*")],
    ),
    "GroupSoftThresholding": Row(
        active=lambda: GroupSoftThresholding(0.02),
        inactive=lambda: GroupSoftThresholding(0.0),
        scheduled=lambda: GroupSoftThresholding(Linear(0.0, 0.04)),
        parts=lambda: [GroupSoftThresholding(0.02, params="net.0.*"), GroupSoftThresholding(0.04, params="net.4.*")],
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
    "OrthogonalityPenalty": Row(
        active=lambda: OrthogonalityPenalty(0.1),
        inactive=lambda: OrthogonalityPenalty(0.0),
        scheduled=lambda: OrthogonalityPenalty(Linear(0.0, 0.04)),
        parts=lambda: [OrthogonalityPenalty(0.02, params="net.0.weight"), OrthogonalityPenalty(0.04, params="net.4.weight")],
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
    "SoftThresholding": Row(
        active=lambda: SoftThresholding(0.05),
        inactive=lambda: SoftThresholding(0.0),
        scheduled=lambda: SoftThresholding(Linear(0.0, 0.1)),
        parts=lambda: [SoftThresholding(0.05, params="net.0.*"), SoftThresholding(0.1, params="net.4.*")],
    ),
    "StartingPointPenalty": Row(
        active=lambda: StartingPointPenalty(1.0),
        inactive=lambda: StartingPointPenalty(0.0),
        scheduled=lambda: StartingPointPenalty(Linear(0.0, 2.0)),
        parts=lambda: [StartingPointPenalty(1.0, params="net.0.*"), StartingPointPenalty(2.0, params="net.4.*")],
        exempt={
            "second_fit": "its starting point is that of the first fit, not of the second",
            "lazy_modules": "it refuses weights that do not exist when the fit starts",
        },
    ),
    "WeightClipping": Row(
        active=lambda: WeightClipping(0.05),
        inactive=lambda: WeightClipping(float("inf")),
        scheduled=lambda: WeightClipping(Linear(0.1, 0.01)),
        parts=lambda: [WeightClipping(0.05, params="net.0.*"), WeightClipping(0.02, params="net.4.*")],
    ),
    "WeightDecay": Row(
        active=lambda: WeightDecay(0.5),
        inactive=lambda: WeightDecay(0.0),
        scheduled=lambda: WeightDecay(Linear(0.0, 1.0)),
        parts=lambda: [WeightDecay(0.5, params="net.0.*"), WeightDecay(1.0, params="net.4.*")],
    ),
    "WeightDecayScheduler": Row(
        active=lambda: WeightDecayScheduler(0.2),
        inactive=lambda: WeightDecayScheduler(0.01),  # the decay that the optimizer has
        scheduled=lambda: WeightDecayScheduler(Linear(0.0, 0.4)),
        parts=None,
        options={"weight_decay": 0.01},
    ),
    "WeightPruning": Row(
        active=lambda: WeightPruning(0.5),
        inactive=lambda: WeightPruning(0.0),
        scheduled=lambda: WeightPruning(Cubic(0.0, 0.9)),
        parts=lambda: [WeightPruning(0.5, params="net.0.weight"), WeightPruning(0.3, params="net.4.*")],
        exempt={"second_fit": "its masks go on in the second fit of the same model"},
    ),
}


def everything() -> list[Regularizer]:
    """Return one of each callback, active, for a model whose optimizer does not decay."""
    return [row.active() for name, row in ROWS.items() if name != "WeightDecayScheduler"]
