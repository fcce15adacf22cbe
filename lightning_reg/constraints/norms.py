"""Constraints on the norm of every output unit."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.arguments import NON_NEGATIVE, POSITIVE, PROBABILITY
from lightning_reg._tensors.shards import full_tensor
from lightning_reg._tensors.units import Units, local_unit_norms, unit_norms, unit_size, unit_view
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
def project_unit_norms_(
    params: Sequence[Tensor], low: float, high: float, rate: float = 1.0, units: Sequence[Units] | None = None
) -> None:
    r"""Scale each output unit to the nearest norm in an interval: :math:`\arg\min_{l \le \|w_u\| \le h} \|w_u - \theta_u\|`.

    :math:`\theta_u \leftarrow \theta_u\,((1 - r) + r\,\mathrm{clip}(\|\theta_u\|, l, h) / \|\theta_u\|)`. A unit within the
    interval, up to the rounding of its dtype, stays as it is to the last bit; so does one of zeros, which has no direction.

    Args:
        params: Tensors, changed in place.
        low: The smallest norm l, ≥ 0.
        high: The largest norm h ≥ l.
        rate: How far a unit moves, r in [0, 1]: 1 for all the way.
        units: Where each tensor keeps its output units, as :func:`units_of` tells; dimension 0 by default.

    Example:
        >>> theta = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> project_unit_norms_([theta], low=0.0, high=1.0)
        >>> theta
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    for p, of in zip(params, units or [Units()] * len(params), strict=True):
        norms = local_unit_norms(p, of)
        ratio = norms.clamp(low, high).div_(norms)
        moved = ratio if rate == 1 else ratio.mul_(rate).add_(1 - rate)
        unit_view(p, of).mul_(moved.masked_fill_(_stays(norms, low, high, p, of), 1.0))


class _NormConstraint(Constraint):
    """Keeps the norm of every output unit in an interval."""

    supports_fsdp1 = False

    @abstractmethod
    def interval(self) -> tuple[float, float]:
        """Return the smallest and the largest norm."""

    @property
    def _rate(self) -> float:
        return 1.0

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Project the units, and keep the fraction that this changes."""
        low, high = self.interval()
        if self.logging:
            self.log_metrics(
                **{self.label("constrained", optimizer): _infeasible_fraction(params, low, high, self.units(params))}
            )
        project_unit_norms_(params, low, high, self._rate, self.units(params))

    def reproject(self, params: list[Parameter]) -> None:
        """Project the units, unless they are on their way by a rate."""
        if self._rate == 1:
            project_unit_norms_(params, *self.interval(), units=self.units(params))


class MaxNorm(_NormConstraint):
    r"""Keep the norm of every output unit at or below a bound: :math:`\|w_u\|_2 \le c`.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler or a guard skips.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 in a transposed one), the vector of a token, an
    entry of a bias. One within the bound stays as it is to the last bit. Works for sharded parameters, also where a unit lies
    on several ranks.

    Args:
        max_norm: The largest norm c > 0, or a schedule; infinity does nothing. The source takes 3 to 4.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a bound that is not positive, a selection of nothing, or the flat parameters of FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MaxNorm(3.0)], logger=False)

    Reference:
        N. Srebro, A. Shraibman, "Rank, Trace-Norm and Max-Norm", 2005; with dropout: N. Srivastava et al., "Dropout: A Simple
        Way to Prevent Neural Networks from Overfitting", 2014.
    """

    valid_ranges = {"max_norm": POSITIVE}

    def __init__(self, max_norm: Value, *, params: Params = "weights", name: str | None = None) -> None:
        self.max_norm = max_norm
        super().__init__(params, name)

    def interval(self) -> tuple[float, float]:
        """Return from zero to the bound."""
        return 0.0, self.current["max_norm"]


class UnitNorm(_NormConstraint):
    r"""Keep the norm of every output unit at one: :math:`w_u \leftarrow w_u / \|w_u\|_2`.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler or a guard skips.

    Units are those of :class:`MaxNorm`; one of zeros has no direction and stays. The weights that training starts from are not
    touched before the first step. Works for sharded parameters.

    Args:
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a selection of nothing, or the flat parameters of FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[UnitNorm(params="prototypes.weight")], logger=False)

    Reference:
        A. Coates, A. Y. Ng, "Learning Feature Representations with K-Means", 2012.
    """

    def __init__(self, *, params: Params = "weights", name: str | None = None) -> None:
        super().__init__(params, name)

    def interval(self) -> tuple[float, float]:
        """Return one and one."""
        return 1.0, 1.0


class MinMaxNorm(_NormConstraint):
    r"""Keep the norm of every output unit in an interval: :math:`l \le \|w_u\|_2 \le h`.

    Runs in: right after each optimizer step (``register_step_post_hook``), not after one that a loss scaler or a guard skips.

    A unit outside is moved by ``rate`` of its way to the interval, so that below 1 the constraint is approached over steps.
    Units are those of :class:`MaxNorm`; one of zeros has no direction and stays. Works for sharded parameters.

    Args:
        min_norm: The smallest norm l ≥ 0, or a schedule.
        max_norm: The largest norm h ≥ l, or a schedule; infinity for none.
        rate: How far an infeasible unit moves in a step, in [0, 1], or a schedule; 0 does nothing.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or empty interval, a rate outside [0, 1], a selection of nothing, or the flat parameters of
            FSDP1.

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
        """Return the two norms."""
        return self.current["min_norm"], self.current["max_norm"]

    @property
    def _rate(self) -> float:
        return self.current["rate"]


def _stays(norms: Tensor, low: float, high: float, p: Tensor, of: Units) -> Tensor:
    """Return which units are where they should be, as far as rounding can tell, or are 0, from where no way leads."""
    slack = torch.finfo(p.dtype).eps / 2 + (4 + math.sqrt(unit_size(p, of))) * torch.finfo(norms.dtype).eps
    stays = norms <= high * (1 + slack)
    return stays.logical_and_(norms >= low * (1 - slack)).logical_or_(norms == 0) if low > 0 else stays


def _infeasible_fraction(params: Sequence[Tensor], low: float, high: float, units: Sequence[Units]) -> Tensor:
    """Return the share of units, over all shards, that a projection will change."""
    norms = [full_tensor(unit_norms(p, of)) for p, of in zip(params, units, strict=True)]
    stay = [_stays(norm, low, high, p, of) for norm, p, of in zip(norms, params, units, strict=True)]
    return torch.stack([(~units_stay).sum() for units_stay in stay]).sum() / max(sum(norm.numel() for norm in norms), 1)
