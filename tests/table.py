"""One row for each public callback. The laws in ``test_laws.py`` and similar files test every row.

A new technique adds its row here, and all laws test it.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import observed
import pytest
from helpers import Classifier

from lightning_reg import (
    ActivityPenalty,
    AdaptiveGradientClipping,
    Cubic,
    DropoutInjection,
    DropoutScheduler,
    ElasticNetPenalty,
    GradientCentralization,
    GradientNoise,
    GradientNormClipping,
    GradientValueClipping,
    GroupLassoPenalty,
    GroupSoftThresholding,
    L1Penalty,
    L2Penalty,
    Linear,
    MaxNorm,
    MinMaxNorm,
    MonteCarloDropout,
    NonFiniteGradientGuard,
    NonNegative,
    OrthogonalityPenalty,
    OverfittingMonitor,
    ParameterMonitor,
    PeakGradientDropping,
    QuantileGradientClipping,
    RandomShrinkage,
    SoftThresholding,
    StartingPointPenalty,
    UnitNorm,
    WeightClipping,
    WeightDecay,
    WeightDecayScheduler,
    WeightPruning,
    ZScoreGradientClipping,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_reg._engine.regularizer import Regularizer


@dataclass(frozen=True)
class Row:
    """A callback in several configurations: some change training, one does not.

    Args:
        active: Returns a callback that changes the training of ``helpers.Classifier``.
        holds: Raises an error unless the active callback did its work in a step; see ``observed.py``.
        inactive: Returns one of strength 0 or with an inactive bound; ``None`` if that is not possible.
        scheduled: Returns one whose value changes during training; ``None`` if it has nothing to schedule.
        parts: Returns two that act on separate parts of the model; ``None`` if it does not select parts.
        options: The arguments of ``helpers.Classifier`` that it needs.
        exempt: Laws that do not apply to it, each with the reason.
    """

    active: Callable[[], Regularizer]
    holds: Callable[[observed.Observed], None]
    inactive: Callable[[], Regularizer] | None
    scheduled: Callable[[], Regularizer] | None
    parts: Callable[[], list[Regularizer]] | None
    options: dict[str, float] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[Regularizer]:
        """Return the callbacks of all configurations."""
        return [
            self.active(),
            *([self.inactive()] if self.inactive else []),
            *(self.parts() if self.parts else []),
            *([self.scheduled()] if self.scheduled else []),
        ]


DENSE = {"sparse_gradients": "it needs all entries of a gradient"}
DEVICES = {"devices": "each device has its own random generator"}
MASKS = {
    **DEVICES,
    "random_numbers": "it draws masks from the global generator, as torch's dropout does",
    "accumulation": "it draws new masks for each micro-batch; test_dropout.py tests that the rate is constant within a step",
    "tensor_parallel": "each rank draws masks for its part of the activations, as torch's dropout does",
}

WATCHES = {"changes_training": "it only watches, see test_overfitting.py and test_parameter_monitor.py"}

ROWS = {
    "ActivityPenalty": Row(
        active=lambda: ActivityPenalty(0.1, modules="ReLU"),
        holds=observed.penalized(observed.activity_l1(0.1)),
        inactive=lambda: ActivityPenalty(0.0, modules="ReLU"),
        scheduled=lambda: ActivityPenalty(Linear(0.0, 0.2), modules="ReLU"),
        parts=lambda: [ActivityPenalty(0.1, modules="ReLU"), ActivityPenalty(0.01, modules="net.4", p=2)],
        exempt={"several_optimizers": "it does not support manual optimization, where it cannot know which loss to add to"},
    ),
    "AdaptiveGradientClipping": Row(
        active=lambda: AdaptiveGradientClipping(0.01),
        holds=observed.adaptive_clipped(0.01, eps=1e-3),
        inactive=lambda: AdaptiveGradientClipping(float("inf")),
        scheduled=lambda: AdaptiveGradientClipping(Linear(0.1, 0.001)),
        parts=lambda: [AdaptiveGradientClipping(0.01, params="net.0.*"), AdaptiveGradientClipping(0.02, params="net.4.*")],
        exempt=DENSE,
    ),
    "DropoutInjection": Row(
        active=lambda: DropoutInjection(0.3, after="ReLU"),
        holds=observed.dropped_after_relu(0.3),
        inactive=lambda: DropoutInjection(0.0, after="ReLU"),
        scheduled=lambda: DropoutInjection(Linear(0.0, 0.5), after="ReLU"),
        parts=lambda: [DropoutInjection(0.3, after="ReLU"), DropoutInjection(0.2, after="net.0")],
        exempt=MASKS,
    ),
    "DropoutScheduler": Row(
        active=lambda: DropoutScheduler(0.4),
        holds=observed.drops_at_rate(0.4),
        inactive=lambda: DropoutScheduler(0.1),  # the model's own rate
        scheduled=lambda: DropoutScheduler(Linear(0.0, 0.5)),
        parts=lambda: [DropoutScheduler(0.4, modules="net.3"), DropoutScheduler(0.2, modules="extra")],
        exempt=MASKS,
    ),
    "GradientCentralization": Row(
        active=lambda: GradientCentralization(),
        holds=observed.gradients_are(observed.centered),
        inactive=lambda: GradientCentralization(params="net.*.bias"),  # vectors are not centralized
        scheduled=None,
        parts=lambda: [GradientCentralization(params="net.0.*"), GradientCentralization(params="net.4.*")],
        exempt=DENSE,
    ),
    "GradientNoise": Row(
        active=lambda: GradientNoise(0.1),
        holds=observed.noisy(0.1, decay=0.55),
        inactive=lambda: GradientNoise(0.0),
        scheduled=lambda: GradientNoise(Linear(0.0, 0.2)),
        parts=lambda: [GradientNoise(0.1, params="net.0.*"), GradientNoise(0.2, params="net.4.*")],
        exempt={**DENSE, **DEVICES},
    ),
    "GradientNormClipping": Row(
        active=lambda: GradientNormClipping(0.1),
        holds=observed.norm_clipped(lambda model: 0.1),
        inactive=lambda: GradientNormClipping(float("inf")),
        scheduled=lambda: GradientNormClipping(Linear(1.0, 0.01)),
        parts=lambda: [GradientNormClipping(0.1, params="net.0.*"), GradientNormClipping(0.2, params="net.4.*")],
    ),
    "GradientValueClipping": Row(
        active=lambda: GradientValueClipping(0.01),
        holds=observed.value_clipped(0.01),
        inactive=lambda: GradientValueClipping(float("inf")),
        scheduled=lambda: GradientValueClipping(Linear(1.0, 0.001)),
        parts=lambda: [GradientValueClipping(0.01, params="net.0.*"), GradientValueClipping(0.02, params="net.4.*")],
    ),
    "ElasticNetPenalty": Row(
        active=lambda: ElasticNetPenalty(0.01, 0.1),
        holds=observed.penalized(observed.of_matrices(lambda w: 0.01 * w.abs().sum() + 0.05 * w.pow(2).sum())),
        inactive=lambda: ElasticNetPenalty(0.0, 0.0),
        scheduled=lambda: ElasticNetPenalty(Linear(0.0, 0.02), Linear(0.2, 0.0)),
        parts=lambda: [ElasticNetPenalty(0.01, 0.1, params="net.0.*"), ElasticNetPenalty(0.02, 0.0, params="net.4.*")],
    ),
    "GroupLassoPenalty": Row(
        active=lambda: GroupLassoPenalty(0.01),
        holds=observed.penalized(observed.of_matrices(lambda w: 0.01 * w.shape[1] ** 0.5 * w.norm(dim=1).sum())),
        inactive=lambda: GroupLassoPenalty(0.0),
        scheduled=lambda: GroupLassoPenalty(Linear(0.0, 0.02)),
        parts=lambda: [GroupLassoPenalty(0.01, params="net.0.*"), GroupLassoPenalty(0.02, params="net.4.*")],
    ),
    "GroupSoftThresholding": Row(
        active=lambda: GroupSoftThresholding(0.02),
        holds=observed.units_soft_thresholded(0.02),
        inactive=lambda: GroupSoftThresholding(0.0),
        scheduled=lambda: GroupSoftThresholding(Linear(0.0, 0.04)),
        parts=lambda: [GroupSoftThresholding(0.02, params="net.0.*"), GroupSoftThresholding(0.04, params="net.4.*")],
    ),
    "L1Penalty": Row(
        active=lambda: L1Penalty(0.01),
        holds=observed.penalized(observed.of_matrices(lambda w: 0.01 * w.abs().sum())),
        inactive=lambda: L1Penalty(0.0),
        scheduled=lambda: L1Penalty(Linear(0.0, 0.02)),
        parts=lambda: [L1Penalty(0.01, params="net.0.*"), L1Penalty(0.02, params="net.4.*")],
    ),
    "L2Penalty": Row(
        active=lambda: L2Penalty(0.1),
        holds=observed.penalized(observed.of_matrices(lambda w: 0.05 * w.pow(2).sum())),
        inactive=lambda: L2Penalty(0.0),
        scheduled=lambda: L2Penalty(Linear(0.0, 0.2)),
        parts=lambda: [L2Penalty(0.1, params="net.0.*"), L2Penalty(0.2, params="net.4.*")],
    ),
    "MaxNorm": Row(
        active=lambda: MaxNorm(0.3),
        holds=observed.row_norms(0.0, 0.3),
        inactive=lambda: MaxNorm(float("inf")),
        scheduled=lambda: MaxNorm(Linear(0.6, 0.2)),
        parts=lambda: [MaxNorm(0.3, params="net.0.*"), MaxNorm(0.2, params="net.4.*")],
    ),
    "MinMaxNorm": Row(
        active=lambda: MinMaxNorm(0.8, 0.9),
        holds=observed.row_norms(0.8, 0.9),
        inactive=lambda: MinMaxNorm(0.8, 0.9, rate=0.0),
        scheduled=lambda: MinMaxNorm(0.1, Linear(0.9, 0.3), rate=Linear(0.1, 1.0)),
        parts=lambda: [MinMaxNorm(0.8, 0.9, params="net.0.*"), MinMaxNorm(0.1, 0.2, rate=0.5, params="net.4.*")],
    ),
    "NonFiniteGradientGuard": Row(
        active=lambda: NonFiniteGradientGuard(),
        holds=observed.unchanged,
        inactive=lambda: NonFiniteGradientGuard(patience=1),
        scheduled=None,
        parts=lambda: [NonFiniteGradientGuard(params="net.0.*"), NonFiniteGradientGuard("zero", params="net.4.*")],
        exempt={
            "changes_training": "it acts only on non-finite gradients, see test_guard.py",
            "waits": "the CPU decides whether to skip the step",
        },
    ),
    "NonNegative": Row(
        active=lambda: NonNegative(),
        holds=observed.clamped(0.0, math.inf),
        inactive=lambda: NonNegative(params="net.1.weight"),  # far above zero
        scheduled=None,
        parts=lambda: [NonNegative(params="net.0.*"), NonNegative(params="net.4.*")],
    ),
    "MonteCarloDropout": Row(
        active=lambda: MonteCarloDropout(samples=3),
        holds=observed.unchanged,
        inactive=MonteCarloDropout,
        scheduled=None,
        parts=None,
        exempt={
            "changes_training": "it acts in predict, see test_montecarlo.py",
            "predictions": "it is meant to change them",
        },
    ),
    "OrthogonalityPenalty": Row(
        active=lambda: OrthogonalityPenalty(0.1),
        holds=observed.penalized(observed.of_matrices(lambda w: 0.1 * observed.half_gram_distance(w))),
        inactive=lambda: OrthogonalityPenalty(0.0),
        scheduled=lambda: OrthogonalityPenalty(Linear(0.0, 0.04)),
        parts=lambda: [OrthogonalityPenalty(0.02, params="net.0.weight"), OrthogonalityPenalty(0.04, params="net.4.weight")],
    ),
    "OverfittingMonitor": Row(
        active=lambda: OverfittingMonitor(),
        holds=observed.unchanged,
        inactive=lambda: OverfittingMonitor(every_n_epochs=5),
        scheduled=None,
        parts=None,
        options={"validates": True},
        exempt=WATCHES,
    ),
    "ParameterMonitor": Row(
        active=lambda: ParameterMonitor(every_n_steps=1),
        holds=observed.unchanged,
        inactive=lambda: ParameterMonitor(),
        scheduled=None,
        parts=lambda: [ParameterMonitor(params="net.0.*"), ParameterMonitor(params="net.4.*")],
        exempt=WATCHES,
    ),
    "PeakGradientDropping": Row(
        active=lambda: PeakGradientDropping(1),
        holds=observed.gradients_are(observed.peak_dropped),
        inactive=lambda: PeakGradientDropping(0),
        scheduled=None,
        parts=lambda: [PeakGradientDropping(1, params="net.0.*"), PeakGradientDropping(2, params="net.4.*")],
        exempt=DENSE,
    ),
    "QuantileGradientClipping": Row(
        active=lambda: QuantileGradientClipping(0.01),
        holds=observed.norm_clipped(observed.quantile_so_far(0.01)),
        inactive=lambda: QuantileGradientClipping(0.5, window=1),  # a norm is its own median
        scheduled=lambda: QuantileGradientClipping(Linear(0.9, 0.01)),
        parts=lambda: [QuantileGradientClipping(0.1, params="net.0.*"), QuantileGradientClipping(0.2, params="net.4.*")],
        exempt=DENSE,
    ),
    "RandomShrinkage": Row(
        active=lambda: RandomShrinkage(0.1),
        holds=observed.shrunk(0.1),
        inactive=lambda: RandomShrinkage(0.0),
        scheduled=lambda: RandomShrinkage(Linear(0.0, 0.2)),
        parts=lambda: [RandomShrinkage(0.1, params="net.0.*"), RandomShrinkage(0.2, params="net.4.*")],
        exempt=DEVICES,
    ),
    "SoftThresholding": Row(
        active=lambda: SoftThresholding(0.05),
        holds=observed.soft_thresholded(0.05),
        inactive=lambda: SoftThresholding(0.0),
        scheduled=lambda: SoftThresholding(Linear(0.0, 0.1)),
        parts=lambda: [SoftThresholding(0.05, params="net.0.*"), SoftThresholding(0.1, params="net.4.*")],
    ),
    "StartingPointPenalty": Row(
        active=lambda: StartingPointPenalty(1.0),
        holds=observed.penalized(observed.distance_from_start),
        inactive=lambda: StartingPointPenalty(0.0),
        scheduled=lambda: StartingPointPenalty(Linear(0.0, 2.0)),
        parts=lambda: [StartingPointPenalty(1.0, params="net.0.*"), StartingPointPenalty(2.0, params="net.4.*")],
        exempt={
            "second_fit": "it keeps the starting point of the first fit",
            "lazy_modules": "it does not support weights that do not exist when the fit starts",
        },
    ),
    "UnitNorm": Row(
        active=lambda: UnitNorm(),
        holds=observed.row_norms(1.0, 1.0),
        inactive=None,
        scheduled=None,
        parts=lambda: [UnitNorm(params="net.0.*"), UnitNorm(params="net.4.*")],
        exempt={"inactive": "it has neither strength nor bound, and changes every weight of this model"},
    ),
    "WeightClipping": Row(
        active=lambda: WeightClipping(0.05),
        holds=observed.clamped(-0.05, 0.05),
        inactive=lambda: WeightClipping(float("inf")),
        scheduled=lambda: WeightClipping(Linear(0.1, 0.01)),
        parts=lambda: [WeightClipping(0.05, params="net.0.*"), WeightClipping(0.02, params="net.4.*")],
    ),
    "WeightDecay": Row(
        active=lambda: WeightDecay(0.5),
        holds=observed.decayed(0.5),
        inactive=lambda: WeightDecay(0.0),
        scheduled=lambda: WeightDecay(Linear(0.0, 1.0)),
        parts=lambda: [WeightDecay(0.5, params="net.0.*"), WeightDecay(1.0, params="net.4.*")],
    ),
    "WeightDecayScheduler": Row(
        active=lambda: WeightDecayScheduler(0.2),
        holds=observed.optimizer_decays(0.2),
        inactive=lambda: WeightDecayScheduler(0.01),  # the optimizer's own decay
        scheduled=lambda: WeightDecayScheduler(Linear(0.0, 0.4)),
        parts=None,
        options={"weight_decay": 0.01},
        exempt={"sparse_gradients": "torch's SGD does not decay parameters with sparse gradients"},
    ),
    "ZScoreGradientClipping": Row(
        active=lambda: ZScoreGradientClipping(0.1, warmup=1),
        holds=observed.norm_clipped(observed.z_score_so_far(0.1, decay=0.97)),
        inactive=lambda: ZScoreGradientClipping(float("inf")),
        scheduled=lambda: ZScoreGradientClipping(Linear(1.0, 0.1), warmup=2),
        parts=lambda: [
            ZScoreGradientClipping(0.1, warmup=1, params="net.0.*"),
            ZScoreGradientClipping(0.2, warmup=1, params="net.4.*"),
        ],
        exempt=DENSE,
    ),
    "WeightPruning": Row(
        active=lambda: WeightPruning(0.5),
        holds=observed.pruned(0.5),
        inactive=lambda: WeightPruning(0.0),
        scheduled=lambda: WeightPruning(Cubic(0.0, 0.9)),
        parts=lambda: [WeightPruning(0.5, params="net.0.weight"), WeightPruning(0.3, params="net.4.*")],
        exempt={"second_fit": "it keeps its masks in the second fit of the same model"},
    ),
}


every_callback = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])


def changes(row: Row) -> bool:
    """Return whether a row's active callback changes ordinary training."""
    return "changes_training" not in row.exempt


def model(row: Row, kind: type[Classifier] = Classifier) -> Classifier:
    """Return a new model with the row's options."""
    return kind(**row.options)


def everything() -> list[Regularizer]:
    """Return one active callback of each class, for a model with the default options."""
    return [row.active() for row in ROWS.values() if not row.options]


SEED = int(os.environ.get("LIGHTNING_REG_SEED", "0"))
"""The seed of the random sets below. Test ids show it."""

PAIRS = list(itertools.combinations(ROWS, 2))
SETS = [
    random.Random(f"{SEED}/{size}").sample([name for name, row in ROWS.items() if not row.options], size)
    for size in (4, 6, 8, 12)
]
