"""Regularization for PyTorch Lightning: every technique is one callback.

Penalties, gradient clipping, weight constraints, shrinkage and dropout for an unchanged ``LightningModule``, in any combination
and any order, from Python or from LightningCLI.
"""

from importlib.metadata import version

from lightning_reg import functional
from lightning_reg.constraints import WeightClipping
from lightning_reg.dropout import DropoutInjection, DropoutScheduler
from lightning_reg.gradients import GradientNormClipping, GradientValueClipping, PeakGradientDropping
from lightning_reg.penalties import L1Penalty, L2Penalty, Penalty
from lightning_reg.schedules import Cosine, Cubic, Exponential, Linear, Steps
from lightning_reg.shrinkage import RandomShrinkage

__version__ = version("lightning-reg")

__all__ = [
    "Cosine",
    "Cubic",
    "DropoutInjection",
    "DropoutScheduler",
    "Exponential",
    "GradientNormClipping",
    "GradientValueClipping",
    "L1Penalty",
    "L2Penalty",
    "Linear",
    "PeakGradientDropping",
    "Penalty",
    "RandomShrinkage",
    "Steps",
    "WeightClipping",
    "functional",
]
