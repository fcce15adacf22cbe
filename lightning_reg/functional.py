"""The pure functions behind the callbacks, on lists of tensors: for plain PyTorch or Fabric, with no Trainer.

Those that change their arguments end in ``_``.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> loss = model(torch.ones(1, 4)).sum() + 1e-3 * l1_penalty([model.weight])
    >>> loss.backward()
    >>> norm = clip_gradient_norm_(list(model.parameters()), max_norm=1.0)
"""

from lightning_reg.constraints import clip_negative_weights_, clip_weights_, project_unit_norms_
from lightning_reg.dropout import (
    Rate,
    alpha_dropout,
    dropout,
    find_dropout,
    inject_dropout,
    sample_predictions,
    set_dropout_,
)
from lightning_reg.gradients import (
    add_gradient_noise_,
    centralize_gradients_,
    clip_gradient_norm_,
    clip_gradient_norms_,
    clip_gradient_value_,
    clip_unit_gradients_,
    drop_peak_gradients_,
    nonfinite_gradients,
    quantile_bound,
    remember_norm,
    update_norm_statistics,
    z_score_bound,
    zero_nonfinite_gradients_,
)
from lightning_reg.penalties import (
    activity_penalty,
    add_distance_gradient_,
    add_group_lasso_gradient_,
    add_l1_gradient_,
    add_l2_gradient_,
    distance_penalty,
    group_lasso_penalty,
    l1_penalty,
    l2_penalty,
    orthogonality_penalty,
)
from lightning_reg.pruning import clear_state_, mask_, mask_gradients_, pruning_masks, smallest_entries, sparsity
from lightning_reg.shrinkage import decay_weights_, group_soft_threshold_, shrink_randomly_, soft_threshold_
from lightning_reg.units import Units, units_of

__all__ = [
    "Rate",
    "Units",
    "activity_penalty",
    "add_distance_gradient_",
    "add_gradient_noise_",
    "add_group_lasso_gradient_",
    "add_l1_gradient_",
    "add_l2_gradient_",
    "alpha_dropout",
    "centralize_gradients_",
    "clear_state_",
    "clip_gradient_norm_",
    "clip_gradient_norms_",
    "clip_gradient_value_",
    "clip_negative_weights_",
    "clip_unit_gradients_",
    "clip_weights_",
    "decay_weights_",
    "distance_penalty",
    "drop_peak_gradients_",
    "dropout",
    "find_dropout",
    "group_lasso_penalty",
    "group_soft_threshold_",
    "inject_dropout",
    "l1_penalty",
    "l2_penalty",
    "mask_",
    "mask_gradients_",
    "nonfinite_gradients",
    "orthogonality_penalty",
    "project_unit_norms_",
    "pruning_masks",
    "quantile_bound",
    "remember_norm",
    "sample_predictions",
    "set_dropout_",
    "shrink_randomly_",
    "smallest_entries",
    "soft_threshold_",
    "sparsity",
    "units_of",
    "update_norm_statistics",
    "z_score_bound",
    "zero_nonfinite_gradients_",
]
