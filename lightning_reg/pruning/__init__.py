"""Pruning: exact shares of the weights set to 0, and kept there while training goes on."""

from lightning_reg.pruning.callback import Criterion, WeightPruning
from lightning_reg.pruning.masks import clear_state_, mask_, mask_gradients_, pack_bits, unpack_bits
from lightning_reg.pruning.report import Share, Sparsity, sparsity
from lightning_reg.pruning.select import smallest_entries
from lightning_reg.pruning.structures import pruning_masks

__all__ = [
    "Criterion",
    "Share",
    "Sparsity",
    "WeightPruning",
    "clear_state_",
    "mask_",
    "mask_gradients_",
    "pack_bits",
    "pruning_masks",
    "smallest_entries",
    "sparsity",
    "unpack_bits",
]
