"""Constraints: projections of the weights after each optimizer step."""

from lightning_reg.constraints.entries import NonNegative, WeightClipping
from lightning_reg.constraints.norms import MaxNorm, MinMaxNorm, UnitNorm

__all__ = ["MaxNorm", "MinMaxNorm", "NonNegative", "UnitNorm", "WeightClipping"]
