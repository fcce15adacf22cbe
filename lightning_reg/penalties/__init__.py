"""Penalties: terms of the training objective that depend on the weights, J = L + λ R(θ)."""

from lightning_reg.penalties.base import Penalty
from lightning_reg.penalties.norms import (
    L1Penalty,
    L2Penalty,
    add_l1_gradient_,
    add_l2_gradient_,
    l1_penalty,
    l2_penalty,
)

__all__ = ["L1Penalty", "L2Penalty", "Penalty", "add_l1_gradient_", "add_l2_gradient_", "l1_penalty", "l2_penalty"]
