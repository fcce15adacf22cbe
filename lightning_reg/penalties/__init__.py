"""Penalties: terms of the training objective that depend on the weights or the activations, J = L + λ R."""

from lightning_reg.penalties.activity import ActivityPenalty, activity_penalty
from lightning_reg.penalties.base import Penalty
from lightning_reg.penalties.groups import GroupLassoPenalty, add_group_lasso_gradient_, group_lasso_penalty
from lightning_reg.penalties.norms import (
    ElasticNetPenalty,
    L1Penalty,
    L2Penalty,
    add_l1_gradient_,
    add_l2_gradient_,
    l1_penalty,
    l2_penalty,
)
from lightning_reg.penalties.structure import (
    OrthogonalityPenalty,
    StartingPointPenalty,
    add_distance_gradient_,
    distance_penalty,
    orthogonality_penalty,
)

__all__ = [
    "ActivityPenalty",
    "ElasticNetPenalty",
    "GroupLassoPenalty",
    "L1Penalty",
    "L2Penalty",
    "OrthogonalityPenalty",
    "Penalty",
    "StartingPointPenalty",
    "activity_penalty",
    "add_distance_gradient_",
    "add_group_lasso_gradient_",
    "add_l1_gradient_",
    "add_l2_gradient_",
    "distance_penalty",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
    "orthogonality_penalty",
]
