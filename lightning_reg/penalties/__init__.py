"""Penalties: terms of the objective that depend on weights or activations, J = L + λ R."""

from lightning_reg.penalties.activity import ActivityPenalty
from lightning_reg.penalties.base import Penalty
from lightning_reg.penalties.groups import GroupLassoPenalty
from lightning_reg.penalties.norms import ElasticNetPenalty, L1Penalty, L2Penalty
from lightning_reg.penalties.structure import OrthogonalityPenalty, StartingPointPenalty

__all__ = [
    "ActivityPenalty",
    "ElasticNetPenalty",
    "GroupLassoPenalty",
    "L1Penalty",
    "L2Penalty",
    "OrthogonalityPenalty",
    "Penalty",
    "StartingPointPenalty",
]
