"""Gradient processing: what happens to the gradients between the backward pass and the optimizer's update."""

from lightning_reg.gradients.adaptive import AdaptiveGradientClipping, clip_unit_gradients_
from lightning_reg.gradients.centralization import GradientCentralization, centralize_gradients_
from lightning_reg.gradients.clipping import (
    GradientNormClipping,
    GradientValueClipping,
    clip_gradient_norm_,
    clip_gradient_norms_,
    clip_gradient_value_,
)
from lightning_reg.gradients.guard import NonFiniteGradientGuard, nonfinite_gradients, zero_nonfinite_gradients_
from lightning_reg.gradients.noise import GradientNoise, add_gradient_noise_
from lightning_reg.gradients.peaks import PeakGradientDropping, drop_peak_gradients_
from lightning_reg.gradients.statistical import (
    QuantileGradientClipping,
    ZScoreGradientClipping,
    quantile_bound,
    remember_norm,
    update_norm_statistics,
    z_score_bound,
)

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
    "add_gradient_noise_",
    "centralize_gradients_",
    "clip_gradient_norm_",
    "clip_gradient_norms_",
    "clip_gradient_value_",
    "clip_unit_gradients_",
    "drop_peak_gradients_",
    "nonfinite_gradients",
    "quantile_bound",
    "remember_norm",
    "update_norm_statistics",
    "z_score_bound",
    "zero_nonfinite_gradients_",
]
