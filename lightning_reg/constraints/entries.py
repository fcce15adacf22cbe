"""Constraints on single weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.arguments import POSITIVE
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.reductions import fraction_above
from lightning_reg._tensors.shards import full_tensor, local_tensors
from lightning_reg.constraints.base import Constraint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def clip_weights_(params: Tensors, clip_value: float) -> None:
    """Clamp each entry to [−c, c]: θ ← max(−c, min(c, θ)) = argmin ‖w − θ‖ over all w with ‖w‖_∞ ≤ c.

    Args:
        params: Tensors, which are changed in place.
        clip_value: The largest magnitude c > 0.

    Example:
        >>> theta = torch.tensor([-3.0, 0.5, 4.0])
        >>> clip_weights_([theta], 1.0)
        >>> theta
        tensor([-1.0000,  0.5000,  1.0000])
    """
    params = tensor_list("clip_weights_: params", params)
    if params:
        torch._foreach_clamp_min_(local_tensors(params), -clip_value)
        torch._foreach_clamp_max_(local_tensors(params), clip_value)


@torch.no_grad()
def clip_negative_weights_(params: Tensors) -> None:
    """Set each negative entry to 0: θ ← max(0, θ) = argmin ‖w − θ‖ over all w ≥ 0.

    Args:
        params: Tensors, which are changed in place.

    Example:
        >>> theta = torch.tensor([-3.0, 0.5])
        >>> clip_negative_weights_([theta])
        >>> theta
        tensor([0.0000, 0.5000])
    """
    params = tensor_list("clip_negative_weights_: params", params)
    if params:
        torch._foreach_clamp_min_(local_tensors(params), 0.0)


class WeightClipping(Constraint):
    """Keep each weight in [−c, c]: θ ← max(−c, min(c, θ)).

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    The name "weight clipping" is sometimes used for random shrinkage, too: see ``RandomShrinkage``.
    Works with sharded parameters.

    Args:
        clip_value: The largest magnitude c > 0, or a schedule. Infinity does nothing. The paper uses 0.01.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``clip_value`` is not positive, or nothing is selected.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WeightClipping(0.01, params="critic.*")], logger=False)

    Reference:
        M. Arjovsky, S. Chintala, L. Bottou, "Wasserstein GAN", 2017.
    """

    valid_ranges = {"clip_value": POSITIVE}

    def __init__(self, clip_value: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.clip_value = clip_value
        super().__init__(params, name)

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clamp the weights, and log the fraction that changed."""
        clip_value = self.current["clip_value"]
        if self.logging:
            self.log_metrics(**{self.label("constrained", optimizer): fraction_above(params, clip_value)})
        super().weights(params, optimizer, step)

    def reproject(self, params: list[Parameter]) -> None:
        """Clamp the weights."""
        clip_weights_(params, self.current["clip_value"])


class NonNegative(Constraint):
    """Keep each weight nonnegative: θ ← max(0, θ).

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    Acts before constraints on norms, so it combines with them.
    Works with sharded parameters.

    Args:
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If nothing is selected.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonNegative(params="decoder.*.weight")], logger=False)

    Reference:
        D. D. Lee, H. S. Seung, "Learning the parts of objects by non-negative matrix factorization", 1999.
    """

    phase = Phase.NON_NEGATIVE

    def __init__(self, *, params: Params = "weights", name: str | None = None) -> None:
        super().__init__(params, name)

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Set negative weights to 0, and log the fraction that changed."""
        if self.logging:
            self.log_metrics(**{self.label("constrained", optimizer): _negative_fraction(params)})
        super().weights(params, optimizer, step)

    def reproject(self, params: list[Parameter]) -> None:
        """Set negative weights to 0."""
        clip_negative_weights_(params)


def _negative_fraction(params: Sequence[Tensor]) -> Tensor:
    """Return the fraction of negative entries, over all shards."""
    return torch.stack([full_tensor((p < 0).sum()) for p in params]).sum() / max(sum(p.numel() for p in params), 1)
