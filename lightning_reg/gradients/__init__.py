"""Gradient processing: changes to the gradients between the backward pass and the optimizer step."""

from lightning_reg.gradients.adaptive import AdaptiveGradientClipping
from lightning_reg.gradients.centralization import GradientCentralization
from lightning_reg.gradients.clipping import GradientNormClipping, GradientValueClipping
from lightning_reg.gradients.guard import NonFiniteGradientGuard
from lightning_reg.gradients.noise import GradientNoise
from lightning_reg.gradients.peaks import PeakGradientDropping
from lightning_reg.gradients.statistical import QuantileGradientClipping, ZScoreGradientClipping

__all__ = [
    "AdaptiveGradientClipping",
    "GradientCentralization",
    "GradientNoise",
    "GradientNormClipping",
    "GradientValueClipping",
    "NonFiniteGradientGuard",
    "PeakGradientDropping",
    "QuantileGradientClipping",
    "ZScoreGradientClipping",
]
