"""Proximal steps, which give exact zeros. With a penalty, weights only come close to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from lightning_reg._engine.arguments import NON_NEGATIVE
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list, units_list
from lightning_reg._tensors.reductions import in_accumulation_dtype, is_cpu
from lightning_reg._tensors.shards import full_tensor, local_tensors
from lightning_reg._tensors.units import Units, local_unit_norms, unit_size, unit_view, wide_unit_norms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def soft_threshold_(params: Tensors, threshold: float | Tensor) -> None:
    """Move each entry toward 0, and stop there: θ ← sign(θ) · max(|θ| − t, 0).

    This is the proximal step of L1: argmin ½ ‖v − θ‖² + t ‖v‖₁ over v.

    Args:
        params: Tensors, which are changed in place.
        threshold: The threshold t ≥ 0, a number or a scalar tensor. A tensor's value is never read on the host, so nothing
            waits for its device.

    Example:
        >>> w = torch.tensor([-3.0, 0.5, 2.0])
        >>> soft_threshold_([w], 1.0)
        >>> w
        tensor([-2.,  0.,  1.])

    Reference:
        I. Daubechies, M. Defrise, C. De Mol, "An Iterative Thresholding Algorithm for Linear Inverse Problems", 2004.
    """
    params = tensor_list("soft_threshold_: params", params)
    for part in local_tensors(params):
        if isinstance(threshold, Tensor):
            part.copy_(_shrunk(part, threshold))
        else:
            part.copy_(softshrink(in_accumulation_dtype(part), threshold))  # torch 2.14 rounds the threshold to half precision


@torch.no_grad()
def group_soft_threshold_(params: Tensors, threshold: float | Tensor, units: Units | Sequence[Units] | None = None) -> None:
    """Shrink each output unit u of n entries toward 0, and stop there: w_u ← w_u · max(1 − t √n / ‖w_u‖₂, 0).

    This is the proximal step of the group lasso: argmin ½ ‖v − w‖² + t Σ √n ‖v_u‖₂ over v.

    Args:
        params: Tensors, which are changed in place.
        threshold: The threshold t ≥ 0, a number or a scalar tensor. A tensor's value is never read on the host, so nothing
            waits for its device.
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.

    Example:
        >>> w = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
        >>> group_soft_threshold_([w], 2.5 / 2**0.5)
        >>> w
        tensor([[1.5000, 2.0000],
                [0.0000, 0.0000]])

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """
    params = tensor_list("group_soft_threshold_: params", params)
    is_number = not isinstance(threshold, Tensor)
    if is_number and not threshold:
        return
    for p, layout in zip(params, units_list("group_soft_threshold_", units, params), strict=True):
        largest_gone = threshold * unit_size(p, layout) ** 0.5
        norms = local_unit_norms(p, layout, above=largest_gone if is_number else 0.0)
        factors = norms.reciprocal().mul_(-largest_gone).add_(1).clamp_(min=0).masked_fill_(norms == 0, 0.0)
        unit_view(p, layout).mul_(factors.to(p.dtype))


class SoftThresholding(ParameterRegularizer):
    """Proximal L1, with exact zeros: θ ← sign(θ) · max(|θ| − ηλ, 0), where η is the learning rate of the parameter group.

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    With plain SGD, this is proximal gradient descent (ISTA) for the lasso, J = L + λ Σ|θ|.
    With momentum μ, it converges to the lasso of strength λ (1 − μ).
    With Adam, whose steps do not scale with the gradient, λ is relative to the size of the steps, not of the gradient.
    Works with sharded parameters.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, or nothing is selected.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SoftThresholding(1e-3)], logger=False)

    Reference:
        I. Daubechies, M. Defrise, C. De Mol, "An Iterative Thresholding Algorithm for Linear Inverse Problems", 2004.
    """

    phase = Phase.SOFT_THRESHOLD
    valid_ranges = {"strength": NON_NEGATIVE}
    needs_learning_rate = True
    rate_alternative = "L1Penalty, or GroupLassoPenalty for whole units"

    def __init__(self, strength: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.strength = strength
        super().__init__(params, name)

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Threshold the parameters of each group, in proportion to its learning rate, and log the fraction of zeros."""
        if self.current["strength"]:
            for group, group_params in self.by_group(params, optimizer):
                self.threshold_(group_params, self._threshold(self.learning_rate(optimizer, group)))
        if self.logging:
            self.log_metrics(**self.zeros(params))

    def _threshold(self, rate: float | Tensor) -> float | Tensor:
        """Return ηλ: a number, or a tensor where reading the learning rate would wait for a device."""
        if isinstance(rate, Tensor) and not is_cpu(rate):
            return rate.to(torch.float32 if rate.is_mps else torch.float64) * self.current["strength"]
        return float(rate) * self.current["strength"]

    def threshold_(self, params: list[Parameter], threshold: float | Tensor) -> None:
        """Take the proximal step."""
        soft_threshold_(params, threshold)

    def zeros(self, params: list[Parameter]) -> dict[str, Tensor]:
        """Return the metric to log: the fraction of entries that are exactly zero."""
        return {"zeros": _zero_fraction(params)}

    def route(self) -> str:
        """Return where the callback acts: after the optimizer step."""
        return "after the step"


class GroupSoftThresholding(SoftThresholding):
    """Proximal group lasso, which zeroes whole units: w_u ← w_u · max(1 − ηλ √n / ‖w_u‖₂, 0) for a unit u of n entries.

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is transposed), or the vector of a token in
    an embedding. η is the learning rate of the parameter group.
    With plain SGD, this is proximal gradient descent for the group lasso, J = L + λ Σ √n ‖w_u‖₂.
    With momentum μ, it converges to the group lasso of strength λ (1 − μ).
    With Adam, whose steps do not scale with the gradient, λ is relative to the size of the steps, not of the gradient.
    Works with sharded parameters (FSDP2), even if a unit is split across ranks.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GroupSoftThresholding(1e-3)], logger=False)

    Reference:
        M. Yuan, Y. Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """

    supports_fsdp1 = False

    def threshold_(self, params: list[Parameter], threshold: float | Tensor) -> None:
        """Take the proximal step."""
        group_soft_threshold_(params, threshold, self.units(params))

    def zeros(self, params: list[Parameter]) -> dict[str, Tensor]:
        """Return the metric to log: the fraction of units that are exactly zero."""
        norms = [wide_unit_norms(p, layout) for p, layout in zip(params, self.units(params), strict=True)]
        return {"zero_units": _zero_fraction(norms)}


def _shrunk(part: Tensor, threshold: Tensor) -> Tensor:
    """Return sign(θ) · max(|θ| − t, 0) in float32 or better, for a threshold whose value is not read."""
    precise = in_accumulation_dtype(part)
    bound = threshold.to(precise)  # a scalar of another dtype would be rounded to that of the tensor
    return precise - precise.clamp(-bound, bound)


def _zero_fraction(tensors: Sequence[Tensor]) -> Tensor:
    """Return the fraction of entries that are exactly zero, over all shards."""
    counts = torch.stack([full_tensor((tensor == 0).sum()) for tensor in tensors])
    return counts.sum() / sum(tensor.numel() for tensor in tensors)
