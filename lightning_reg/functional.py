"""The functions behind the callbacks, for plain PyTorch or Fabric, without a Trainer.

Most functions take tensors: a list, any other iterable such as ``model.parameters()``, or a single tensor. Anything else raises
a ``TypeError``. Functions that change their arguments in place have names that end in ``_``.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> loss = model(torch.ones(1, 4)).sum() + 1e-3 * l1_penalty([model.weight])
    >>> loss.backward()
    >>> norm = clip_gradient_norm_(model.parameters(), max_norm=1.0)
"""

from lightning_reg._tensors.layers import (
    units_of as units_of,
)
from lightning_reg._tensors.units import (
    Units as Units,
)
from lightning_reg.constraints.entries import (
    clip_negative_weights_ as clip_negative_weights_,
    clip_weights_ as clip_weights_,
)
from lightning_reg.constraints.norms import (
    project_unit_norms_ as project_unit_norms_,
)
from lightning_reg.dropout.functions import (
    alpha_dropout as alpha_dropout,
    dropout as dropout,
    packed_dropout as packed_dropout,
)
from lightning_reg.dropout.injection import (
    inject_dropout as inject_dropout,
)
from lightning_reg.dropout.montecarlo import (
    sample_predictions as sample_predictions,
)
from lightning_reg.dropout.rates import (
    Rate as Rate,
)
from lightning_reg.dropout.sites import (
    find_dropout as find_dropout,
    set_dropout_ as set_dropout_,
)
from lightning_reg.gradients.adaptive import (
    clip_unit_gradients_ as clip_unit_gradients_,
)
from lightning_reg.gradients.centralization import (
    centralize_gradients_ as centralize_gradients_,
)
from lightning_reg.gradients.clipping import (
    clip_gradient_norm_ as clip_gradient_norm_,
    clip_gradient_norm_per_tensor_ as clip_gradient_norm_per_tensor_,
    clip_gradient_value_ as clip_gradient_value_,
)
from lightning_reg.gradients.guard import (
    nonfinite_gradients as nonfinite_gradients,
    zero_nonfinite_gradients_ as zero_nonfinite_gradients_,
)
from lightning_reg.gradients.noise import (
    add_gradient_noise_ as add_gradient_noise_,
)
from lightning_reg.gradients.peaks import (
    drop_peak_gradients_ as drop_peak_gradients_,
)
from lightning_reg.gradients.statistical import (
    quantile_bound as quantile_bound,
    update_norm_history as update_norm_history,
    update_norm_statistics as update_norm_statistics,
    z_score_bound as z_score_bound,
)
from lightning_reg.penalties.activity import (
    activity_penalty as activity_penalty,
)
from lightning_reg.penalties.groups import (
    add_group_lasso_gradient_ as add_group_lasso_gradient_,
    group_lasso_penalty as group_lasso_penalty,
)
from lightning_reg.penalties.norms import (
    add_l1_gradient_ as add_l1_gradient_,
    add_l2_gradient_ as add_l2_gradient_,
    l1_penalty as l1_penalty,
    l2_penalty as l2_penalty,
)
from lightning_reg.penalties.structure import (
    add_distance_gradient_ as add_distance_gradient_,
    distance_penalty as distance_penalty,
    orthogonality_penalty as orthogonality_penalty,
)
from lightning_reg.pruning.masks import (
    clear_state_ as clear_state_,
    mask_ as mask_,
    mask_gradients_ as mask_gradients_,
)
from lightning_reg.pruning.report import (
    sparsity as sparsity,
)
from lightning_reg.pruning.select import (
    smallest_entries as smallest_entries,
)
from lightning_reg.pruning.structures import (
    pruning_masks as pruning_masks,
)
from lightning_reg.shrinkage.decay import (
    decay_weights_ as decay_weights_,
)
from lightning_reg.shrinkage.proximal import (
    group_soft_threshold_ as group_soft_threshold_,
    soft_threshold_ as soft_threshold_,
)
from lightning_reg.shrinkage.random import (
    shrink_randomly_ as shrink_randomly_,
)
