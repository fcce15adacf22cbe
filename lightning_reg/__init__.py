"""Regularization for PyTorch Lightning: every technique is one callback.

Penalties, gradient clipping, weight constraints, shrinkage, pruning and dropout for an unchanged ``LightningModule``, in any
combination and any order, from Python or from LightningCLI.
"""

from importlib.metadata import version

from lightning_reg import functional
from lightning_reg.constraints import WeightClipping
from lightning_reg.dropout import DropoutInjection, DropoutScheduler
from lightning_reg.gradients import GradientNormClipping, GradientValueClipping, PeakGradientDropping
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
from lightning_reg.schedules import Cosine, Cubic, Exponential, Linear, Steps
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
    "ActivityPenalty",
    "Cosine",
    "Cubic",
    "DropoutInjection",
    "DropoutScheduler",
    "ElasticNetPenalty",
    "Exponential",
    "GradientNormClipping",
    "GradientValueClipping",
    "GroupLassoPenalty",
    "GroupSoftThresholding",
    "L1Penalty",
    "L2Penalty",
    "Linear",
    "OrthogonalityPenalty",
    "PeakGradientDropping",
    "Penalty",
    "RandomShrinkage",
    "SoftThresholding",
    "StartingPointPenalty",
    "Steps",
    "WeightClipping",
    "WeightDecay",
    "WeightDecayScheduler",
    "WeightPruning",
    "decay_groups",
    "functional",
    "sparsity",
]
