"""Constraints on every entry by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.arguments import POSITIVE
from lightning_reg._engine.technique import Phase
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
    from lightning_reg.schedules import Value


@torch.no_grad()
def clip_weights_(params: Sequence[Tensor], clip_value: float) -> None:
    r"""Clamp every entry: :math:`\arg\min_{\|w\|_\infty \le c} \|w - \theta\|`, which is :math:`\max(-c, \min(c, \theta))`.

    Args:
        params: Tensors, changed in place.
        clip_value: The largest magnitude c, > 0.

    Example:
        >>> theta = torch.tensor([-3.0, 0.5, 4.0])
        >>> clip_weights_([theta], 1.0)
        >>> theta
        tensor([-1.0000,  0.5000,  1.0000])
    """
    if params:
        torch._foreach_clamp_min_(local_tensors(params), -clip_value)
        torch._foreach_clamp_max_(local_tensors(params), clip_value)


@torch.no_grad()
def clip_negative_weights_(params: Sequence[Tensor]) -> None:
    r"""Set every negative entry to 0: :math:`\arg\min_{w \ge 0} \|w - \theta\|`, which is :math:`\max(0, \theta)`.

    Args:
        params: Tensors, changed in place.

    Example:
        >>> theta = torch.tensor([-3.0, 0.5])
        >>> clip_negative_weights_([theta])
        >>> theta
        tensor([0.0000, 0.5000])
    """
    if params:
        torch._foreach_clamp_min_(local_tensors(params), 0.0)


class WeightClipping(Constraint):
    r"""Keep every weight within bounds: :math:`\theta_i \leftarrow \max(-c, \min(c, \theta_i))`.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler or a guard skips.

    Not to be mixed up with :class:`~lightning_reg.RandomShrinkage`, which an article of this project's origin calls weight
    clipping.

    Args:
        clip_value: The largest magnitude c > 0, or a schedule; infinity does nothing.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a bound that is not positive, or a selection of nothing.

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
        """Clamp the weights, and keep the fraction that this changes."""
        clip_value = self.current["clip_value"]
        if self.logging:
            self.log_metrics(**{self.label("constrained", optimizer): fraction_above(params, clip_value)})
        super().weights(params, optimizer, step)

    def reproject(self, params: list[Parameter]) -> None:
        """Clamp the weights."""
        clip_weights_(params, self.current["clip_value"])


class NonNegative(Constraint):
    r"""Keep every weight at or above zero: :math:`\theta_i \leftarrow \max(0, \theta_i)`.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler or a guard skips;
    before the constraints on norms, so that it can be combined with them.

    Args:
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a selection of nothing.

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
        """Clip the weights, and keep the fraction that this changes."""
        if self.logging:
            self.log_metrics(**{self.label("constrained", optimizer): _negative_fraction(params)})
        super().weights(params, optimizer, step)

    def reproject(self, params: list[Parameter]) -> None:
        """Clip the weights."""
        clip_negative_weights_(params)


def _negative_fraction(params: Sequence[Tensor]) -> Tensor:
    """Return the share of entries, over all shards, that are below zero."""
    return torch.stack([full_tensor((p < 0).sum()) for p in params]).sum() / max(sum(p.numel() for p in params), 1)
