"""Pruning: an exact fraction of the weights is set to zero and stays zero while training goes on."""

from lightning_reg.pruning.callback import WeightPruning
from lightning_reg.pruning.report import sparsity

__all__ = ["WeightPruning", "sparsity"]
