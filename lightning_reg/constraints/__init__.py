"""Constraints: projections of the weights that hold after every optimizer step."""

from lightning_reg.constraints.entries import NonNegative, WeightClipping, clip_negative_weights_, clip_weights_
from lightning_reg.constraints.norms import MaxNorm, MinMaxNorm, UnitNorm, project_unit_norms_

__all__ = [
    "MaxNorm",
    "MinMaxNorm",
    "NonNegative",
    "UnitNorm",
    "WeightClipping",
    "clip_negative_weights_",
    "clip_weights_",
    "project_unit_norms_",
]
