"""Shrinkage: decay and thresholding, which make weights smaller independently of the gradient."""

from lightning_reg.shrinkage.decay import WeightDecay, WeightDecayScheduler, decay_groups
from lightning_reg.shrinkage.proximal import GroupSoftThresholding, SoftThresholding
from lightning_reg.shrinkage.random import RandomShrinkage

__all__ = [
    "GroupSoftThresholding",
    "RandomShrinkage",
    "SoftThresholding",
    "WeightDecay",
    "WeightDecayScheduler",
    "decay_groups",
]
