"""Constraints on the norms of output units."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.arguments import NON_NEGATIVE, POSITIVE, PROBABILITY
from lightning_reg._engine.tensor_arguments import tensor_list, units_list
from lightning_reg._tensors.reductions import accumulation_dtype
from lightning_reg._tensors.shards import full_tensor
from lightning_reg._tensors.units import Units, local_unit_norms, unit_size, unit_view, wide_unit_norms
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
def project_unit_norms_(
    params: Tensors, low: float, high: float, rate: float = 1.0, units: Units | Sequence[Units] | None = None
) -> None:
    """Scale each output unit u so that l ≤ ‖w_u‖ ≤ h: w_u ← w_u · ((1 − r) + r · max(l, min(h, ‖w_u‖)) / ‖w_u‖).

    For r = 1, this is the projection argmin ‖v − w_u‖ over all v with l ≤ ‖v‖ ≤ h. A unit whose norm is in the interval, up to
    the rounding of its dtype, stays bitwise unchanged. So does a unit of zeros, which has no direction. Norms do not overflow
    or underflow in float32.

    Args:
        params: Tensors, which are changed in place.
        low: The smallest norm l ≥ 0.
        high: The largest norm h ≥ l.
        rate: The fraction r of the way that a unit moves, in [0, 1].
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.

    Example:
        >>> theta = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> project_unit_norms_([theta], low=0.0, high=1.0)
        >>> theta
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    params = tensor_list("project_unit_norms_: params", params)
    for p, layout in zip(params, units_list("project_unit_norms_", units, params), strict=True):
        norms = local_unit_norms(p, layout, above=0.0 if low else high)
        ratios = norms.clamp(low, high).div_(norms)
        factors = ratios if rate == 1 else ratios.mul_(rate).add_(1 - rate)
        unit_view(p, layout).mul_(factors.masked_fill_(_is_unchanged(norms, low, high, p, layout), 1.0))


class _NormConstraint(Constraint):
    """Base class of constraints that keep the norm of each output unit in an interval."""

    supports_fsdp1 = False

    @abstractmethod
    def interval(self) -> tuple[float, float]:
        """Return the smallest and the largest norm."""

    @property
    def _rate(self) -> float:
        return 1.0

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Project the units, and log the fraction that changed."""
        low, high = self.interval()
        if self.logging:
            self.log_metrics(
                **{self.label("constrained", optimizer): _infeasible_fraction(params, low, high, self.units(params))}
            )
        project_unit_norms_(params, low, high, self._rate, self.units(params))

    def reproject(self, params: list[Parameter]) -> None:
        """Project the units. With a rate below 1, only steps move them."""
        if self._rate == 1:
            project_unit_norms_(params, *self.interval(), units=self.units(params))


class MaxNorm(_NormConstraint):
    """Bound the norm of each output unit: w_u ← w_u · min(1, c / ‖w_u‖₂).

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is transposed), the vector of a token in an
    embedding, or an entry of a bias.
    Units within the bound stay bitwise unchanged. Nothing changes before the first step.
    Works with sharded parameters (FSDP2), even if a unit is split across ranks.

    Args:
        max_norm: The largest norm c > 0, or a schedule. Infinity does nothing. Srivastava et al. use 3 to 4.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``max_norm`` is not positive, nothing is selected, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MaxNorm(3.0)], logger=False)

    Reference:
        N. Srebro, A. Shraibman, "Rank, Trace-Norm and Max-Norm", 2005. With dropout: N. Srivastava et al., "Dropout: A Simple
        Way to Prevent Neural Networks from Overfitting", 2014.
    """

    valid_ranges = {"max_norm": POSITIVE}

    def __init__(self, max_norm: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.max_norm = max_norm
        super().__init__(params, name)

    def interval(self) -> tuple[float, float]:
        """Return 0 and the bound."""
        return 0.0, self.current["max_norm"]


class UnitNorm(_NormConstraint):
    """Keep the norm of each output unit at 1: w_u ← w_u / ‖w_u‖₂.

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is transposed), the vector of a token in an
    embedding, or an entry of a bias.
    A unit of zeros has no direction, so it does not change. Nothing changes before the first step.
    Works with sharded parameters (FSDP2), even if a unit is split across ranks.

    Args:
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If nothing is selected, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[UnitNorm(params="prototypes.weight")], logger=False)

    Reference:
        A. Coates, A. Y. Ng, "Learning Feature Representations with K-Means", 2012.
    """

    def __init__(self, *, params: Params = "weights", name: str | None = None) -> None:
        super().__init__(params, name)

    def interval(self) -> tuple[float, float]:
        """Return 1 and 1."""
        return 1.0, 1.0


class MinMaxNorm(_NormConstraint):
    """Keep the norm of each output unit in an interval: l ≤ ‖w_u‖₂ ≤ h.

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips.

    A unit outside the interval moves the fraction ``rate`` of the way in each step: w_u ← w_u · ((1 − r) + r · n / ‖w_u‖₂),
    where n is the nearest norm in the interval. With a rate below 1, units approach the interval over several steps.
    A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is transposed), the vector of a token in an
    embedding, or an entry of a bias.
    A unit of zeros has no direction, so it does not change. Nothing changes before the first step.
    Works with sharded parameters (FSDP2), even if a unit is split across ranks.

    Args:
        min_norm: The smallest norm l ≥ 0, or a schedule.
        max_norm: The largest norm h ≥ l, or a schedule. Infinity means no upper bound.
        rate: The fraction r of the way that a unit moves in each step, in [0, 1], or a schedule. 1, the default, enforces the
            constraint in each step. 0 does nothing.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``min_norm`` is negative or exceeds ``max_norm``, ``rate`` is outside [0, 1], nothing is selected, or
            FSDP1 has flattened the parameters. During training, if the schedules cross.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MinMaxNorm(0.5, 2.0)], logger=False)
    """

    valid_ranges = {"min_norm": NON_NEGATIVE, "max_norm": POSITIVE, "rate": PROBABILITY}

    def __init__(
        self, min_norm: Value, max_norm: Value, *, rate: Value = 1.0, params: Params = "weights", name: str | None = None
    ) -> None:
        self.min_norm = min_norm
        self.max_norm = max_norm
        self.rate = rate
        super().__init__(params, name)
        self._check_interval()

    def values_changed(self) -> None:
        """Check that the scheduled interval is not empty."""
        self._check_interval()

    def _check_interval(self) -> None:
        low, high = self.interval()
        if low > high:
            raise ValueError(f"{self.name}: min_norm must be at most max_norm, got min_norm={low:g} and max_norm={high:g}")

    def interval(self) -> tuple[float, float]:
        """Return the smallest and the largest norm."""
        return self.current["min_norm"], self.current["max_norm"]

    @property
    def _rate(self) -> float:
        return self.current["rate"]


def _is_unchanged(norms: Tensor, low: float, high: float, p: Tensor, layout: Units) -> Tensor:
    """Return which units a projection must not change: those in the interval up to rounding, and those of zeros."""
    # how far rounding can move a norm beyond its bound: half an epsilon of the entries, and the error of summing their squares
    precise = torch.finfo(accumulation_dtype(p.dtype)).eps
    slack = torch.finfo(p.dtype).eps / 2 + (4 + math.sqrt(unit_size(p, layout))) * precise
    unchanged = norms <= high * (1 + slack)
    return unchanged.logical_and_(norms >= low * (1 - slack)).logical_or_(norms == 0) if low > 0 else unchanged


def _infeasible_fraction(params: Sequence[Tensor], low: float, high: float, layouts: Sequence[Units]) -> Tensor:
    """Return the fraction of units, over all shards, that a projection will change."""
    norms = [
        full_tensor(wide_unit_norms(p, layout, above=0.0 if low else high)) for p, layout in zip(params, layouts, strict=True)
    ]
    unchanged = [_is_unchanged(norm, low, high, p, layout) for norm, p, layout in zip(norms, params, layouts, strict=True)]
    return torch.stack([(~mask).sum() for mask in unchanged]).sum() / max(sum(norm.numel() for norm in norms), 1)
