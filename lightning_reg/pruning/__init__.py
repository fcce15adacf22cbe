"""Pruning: set an exact fraction of the weights to zero during training, and keep them at zero."""

from lightning_reg.pruning.callback import WeightPruning
from lightning_reg.pruning.report import sparsity

__all__ = ["WeightPruning", "sparsity"]
