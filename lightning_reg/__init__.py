"""Regularization for PyTorch Lightning: every technique is one callback.

Penalties, gradient clipping, weight constraints, shrinkage, pruning, and dropout for an unchanged ``LightningModule``, in any
combination and any order, from Python or from LightningCLI.
"""

from importlib.metadata import version

from lightning_reg import custom, functional
from lightning_reg._engine.regularizer import summary
from lightning_reg._engine.selection import select_parameters
from lightning_reg._tensors.layers import WEIGHT_LAYERS
from lightning_reg.constraints import MaxNorm, MinMaxNorm, NonNegative, UnitNorm, WeightClipping
from lightning_reg.dropout import DROPOUT_ATTRIBUTES, DropoutInjection, DropoutScheduler, MonteCarloDropout
from lightning_reg.gradients import (
    AdaptiveGradientClipping,
    GradientCentralization,
    GradientNoise,
    GradientNormClipping,
    GradientValueClipping,
    NonFiniteGradientGuard,
    PeakGradientDropping,
    QuantileGradientClipping,
    ZScoreGradientClipping,
)
from lightning_reg.monitors import OverfittingMonitor, ParameterMonitor
from lightning_reg.penalties import (
    ActivityPenalty,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    OrthogonalityPenalty,
    Penalty,
    StartingPointPenalty,
)
from lightning_reg.pruning import WeightPruning, sparsity
from lightning_reg.schedules import Cosine, Cubic, Exponential, Linear, SequentialSchedule, Steps
from lightning_reg.shrinkage import (
    GroupSoftThresholding,
    RandomShrinkage,
    SoftThresholding,
    WeightDecay,
    WeightDecayScheduler,
    decay_groups,
)

__version__ = version("lightning-reg")

__all__ = [
    "DROPOUT_ATTRIBUTES",
    "WEIGHT_LAYERS",
    "ActivityPenalty",
    "AdaptiveGradientClipping",
    "Cosine",
    "Cubic",
    "DropoutInjection",
    "DropoutScheduler",
    "ElasticNetPenalty",
    "Exponential",
    "GradientCentralization",
    "GradientNoise",
    "GradientNormClipping",
    "GradientValueClipping",
    "GroupLassoPenalty",
    "GroupSoftThresholding",
    "L1Penalty",
    "L2Penalty",
    "Linear",
    "MaxNorm",
    "MinMaxNorm",
    "MonteCarloDropout",
    "NonFiniteGradientGuard",
    "NonNegative",
    "OrthogonalityPenalty",
    "OverfittingMonitor",
    "ParameterMonitor",
    "PeakGradientDropping",
    "Penalty",
    "QuantileGradientClipping",
    "RandomShrinkage",
    "SoftThresholding",
    "StartingPointPenalty",
    "SequentialSchedule",
    "Steps",
    "UnitNorm",
    "WeightClipping",
    "WeightDecay",
    "WeightDecayScheduler",
    "WeightPruning",
    "ZScoreGradientClipping",
    "custom",
    "decay_groups",
    "functional",
    "select_parameters",
    "sparsity",
    "summary",
]
