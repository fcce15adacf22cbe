"""Proximal steps: what gives exact zeros, where the subgradient of a penalty only hovers around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softshrink

from lightning_reg._engine.arguments import NON_NEGATIVE
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.shards import full_tensor, local_tensor
from lightning_reg._tensors.units import Units, local_unit_norms, unit_norms, unit_size, unit_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def soft_threshold_(params: Sequence[Tensor], threshold: float) -> None:
    r"""Move every entry towards 0, and stop there: :math:`w \leftarrow \mathrm{sign}(w) \max(|w| - t, 0)`.

    It is :math:`\arg\min_v \frac{1}{2} \|v - w\|^2 + t \|v\|_1`.

    Args:
        params: Tensors, changed in place.
        threshold: t ≥ 0.

    Example:
        >>> w = torch.tensor([-3.0, 0.5, 2.0])
        >>> soft_threshold_([w], 1.0)
        >>> w
        tensor([-2.,  0.,  1.])

    Reference:
        I. Daubechies, M. Defrise, C. De Mol, "An Iterative Thresholding Algorithm for Linear Inverse Problems", 2004.
    """
    for p in params:
        local_tensor(p).copy_(softshrink(local_tensor(p), threshold))


@torch.no_grad()
def group_soft_threshold_(params: Sequence[Tensor], threshold: float, units: Sequence[Units] | None = None) -> None:
    r"""Shorten every unit, down to 0: :math:`w_g \leftarrow w_g \max(1 - t \sqrt{|g|} / \|w_g\|_2, 0)`.

    It is :math:`\arg\min_v \frac{1}{2} \|v - w\|^2 + t \sum_g \sqrt{|g|}\,\|v_g\|_2`.

    Args:
        params: Tensors, changed in place.
        threshold: t ≥ 0.
        units: Where each tensor keeps its output units; by default in dimension 0.

    Example:
        >>> w = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
        >>> group_soft_threshold_([w], 2.5 / 2**0.5)
        >>> w
        tensor([[1.5000, 2.0000],
                [0.0000, 0.0000]])

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """
    if not threshold:
        return
    for p, u in zip(params, units or [Units()] * len(params), strict=True):
        norms = local_unit_norms(p, u)
        factors = norms.reciprocal().mul_(-threshold * unit_size(p, u) ** 0.5).add_(1).clamp_(min=0)  # 0 for a unit of zeros
        unit_view(p, u).mul_(factors.to(p.dtype))


class SoftThresholding(ParameterRegularizer):
    r"""The proximal step of L1: :math:`w \leftarrow \mathrm{sign}(w) \max(|w| - \eta\lambda, 0)`, η the learning rate.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler skips.

    With plain SGD it is proximal gradient descent (ISTA) on :math:`J = L + \lambda \sum |w|`: the Lasso, whose zeros are exact.
    With a momentum μ the fixed point is that of λ(1 - μ); with Adam, whose steps are not scaled by the gradient, the strength
    is measured against those steps.

    Args:
        strength: λ ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, or a selection of nothing.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SoftThresholding(1e-3)], logger=False)

    Reference:
        I. Daubechies, M. Defrise, C. De Mol, "An Iterative Thresholding Algorithm for Linear Inverse Problems", 2004.
    """

    phase = Phase.SOFT_THRESHOLD
    valid_ranges = {"strength": NON_NEGATIVE}

    def __init__(self, strength: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.strength = strength
        super().__init__(params, name)

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Threshold each group's parameters by its learning rate, and keep the fraction of exact zeros."""
        if self.current["strength"]:
            for group, parameters_of in self.by_group(params, optimizer):
                self.threshold_(parameters_of, float(group["lr"]) * self.current["strength"])
        if self.logging:
            self.log_metrics(**self.zeros(params))

    def threshold_(self, params: list[Parameter], threshold: float) -> None:
        """Take the proximal step."""
        soft_threshold_(params, threshold)

    def zeros(self, params: list[Parameter]) -> dict[str, Tensor]:
        """Return the fraction of entries that are exactly zero."""
        return {"zeros": _share_of_zeros(params)}

    def route(self) -> str:
        """Say that it acts after the step."""
        return "after the step"


class GroupSoftThresholding(SoftThresholding):
    r"""The proximal step of the group lasso: :math:`w_g \leftarrow w_g \max(1 - \eta\lambda\sqrt{|g|} / \|w_g\|_2, 0)`.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler skips.

    A group is an output unit: a row of a linear layer, a filter of a convolution (dimension 1 where it is transposed), the
    vector of a token. Whole units become exactly zero. η is the learning rate of the parameter's group; under momentum and
    Adam the strength means what it means for :class:`SoftThresholding`.

    Args:
        strength: λ ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, or a selection of nothing.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GroupSoftThresholding(1e-3)], logger=False)

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """

    supports_fsdp1 = False

    def threshold_(self, params: list[Parameter], threshold: float) -> None:
        """Take the proximal step."""
        group_soft_threshold_(params, threshold, self.units(params))

    def zeros(self, params: list[Parameter]) -> dict[str, Tensor]:
        """Return the fraction of units that are exactly zero."""
        norms = [unit_norms(p, u) for p, u in zip(params, self.units(params), strict=True)]
        return {"zero_units": _share_of_zeros(norms)}


def _share_of_zeros(tensors: Sequence[Tensor]) -> Tensor:
    counts = torch.stack([full_tensor((tensor == 0).sum()) for tensor in tensors])
    return counts.sum() / sum(tensor.numel() for tensor in tensors)
