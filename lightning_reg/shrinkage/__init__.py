"""Shrinkage: weights that become smaller by a rule of their own, beside the gradient."""

from lightning_reg.shrinkage.decay import WeightDecay, WeightDecayScheduler, decay_groups, decay_weights_
from lightning_reg.shrinkage.proximal import (
    GroupSoftThresholding,
    SoftThresholding,
    group_soft_threshold_,
    soft_threshold_,
)
from lightning_reg.shrinkage.random import RandomShrinkage, shrink_randomly_

__all__ = [
    "GroupSoftThresholding",
    "RandomShrinkage",
    "SoftThresholding",
    "WeightDecay",
    "WeightDecayScheduler",
    "decay_groups",
    "decay_weights_",
    "group_soft_threshold_",
    "shrink_randomly_",
    "soft_threshold_",
]
