"""Gradient clipping by bounds that are learnt from the norms of earlier steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from lightning_reg._engine.arguments import POSITIVE, Interval, check_integer
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.gradients import existing_gradients
from lightning_reg._tensors.reductions import is_cpu, total_norm_fp32
from lightning_reg._tensors.shards import local_tensors
from lightning_reg.gradients.base import GradientClipping

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def update_norm_history(history: Tensor, norm: Tensor) -> Tensor:
    """Return a history of norms with one more, the oldest being dropped; a norm that is not finite does not enter it.

    Args:
        history: The last norms, oldest first, NaN where there is none yet.
        norm: The norm of this step, a scalar.

    Example:
        >>> update_norm_history(torch.tensor([float("nan"), 1.0]), torch.tensor(2.0))
        tensor([1., 2.])
        >>> update_norm_history(torch.tensor([1.0, 2.0]), torch.tensor(float("inf")))
        tensor([1., 2.])
    """
    return torch.where(norm < math.inf, torch.cat([history[1:], norm.to(history).view(1)]), history)


@torch.no_grad()
def quantile_bound(history: Tensor, quantile: float) -> Tensor:
    """Return a quantile of the norms in a history, linear between two of them; NaN where there are none.

    Args:
        history: Norms, NaN where there is none yet.
        quantile: Which one, in (0, 1).

    Example:
        >>> quantile_bound(torch.tensor([float("nan"), 1.0, 2.0, 3.0]), 0.25)
        tensor(1.5000)
    """
    return torch.nanquantile(history, quantile)


@torch.no_grad()
def z_score_bound(norm: Tensor, statistics: Tensor, z: float) -> Tensor:
    r"""Return the largest norm allowed by the z-score rule: :math:`\mu + \sigma z^2 / s` where :math:`s > z`.

    Here :math:`s = (\|g\| - \mu) / \sigma` is the z-score of the norm.
    The farther out a norm is, the nearer to the mean it is brought.

    Args:
        norm: The norm of this step, a scalar.
        statistics: How many norms there were, their mean μ and their variance σ², as :func:`update_norm_statistics` keeps them.
        z: The largest z-score that is let through, > 0.

    Returns:
        A scalar: infinity where nothing is to be clipped. To σ in the z-score 1e-6 is added, as in the source's code.

    Example:
        >>> z_score_bound(torch.tensor(9.0), torch.tensor([25.0, 1.0, 4.0]), z=2.0)
        tensor(3.0000)
    """
    _, mean, variance = statistics.unbind()
    deviation = variance.sqrt()
    score = (norm - mean) / (deviation + 1e-6)
    return torch.where(score > z, mean + z * deviation * (z / score), math.inf)


@torch.no_grad()
def update_norm_statistics(statistics: Tensor, norm: Tensor, decay: float, warmup: int) -> Tensor:
    """Return the statistics of norms with one more: mean and variance at first, exponential averages after the warm-up.

    Args:
        statistics: How many norms there were, their mean and their variance: a vector of three, of zeros to begin with.
        norm: The norm of this step after clipping, a scalar; one that is not finite changes nothing.
        decay: What an average keeps of its value, in [0, 1].
        warmup: How many norms are averaged evenly, ≥ 1.

    Example:
        >>> update_norm_statistics(torch.tensor([1.0, 2.0, 0.0]), torch.tensor(4.0), decay=0.97, warmup=25)
        tensor([2., 3., 1.])
    """
    norm = norm.to(statistics)
    count, mean, variance = statistics.unbind()
    warm = count >= warmup
    keep = torch.where(warm, decay, count / (count + 1))
    squared = (norm - mean).square() * keep  # times keep: the product of the distances to the old mean and to the new one
    distance = torch.where(warm, squared * keep, squared)  # after the warm-up the source's squared distance to the new mean
    updated = torch.stack([count + 1, torch.lerp(norm, mean, keep), torch.lerp(distance, variance, keep)])
    return torch.where(norm < math.inf, updated, statistics)


class _StatisticalClipping(GradientClipping):
    """Clips to a bound that depends on earlier norms, which it keeps for each optimizer and in the checkpoint."""

    phase = Phase.NORM_CLIPPING
    state_entries = ("memory",)

    @abstractmethod
    def begin(self) -> Tensor:
        """Return the memory before the first step."""

    @abstractmethod
    def bound(self, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory after a step, and the largest norm allowed in it."""

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clip to the bound that the norms so far give, this one included."""
        gradients = existing_gradients(params)
        if not gradients:
            return
        norm, index = total_norm_fp32(gradients), self.optimizer_index(optimizer)
        memories = self.state["memory"]
        memory = memories[index].to(norm.device) if index in memories else self.begin().to(norm)
        memories[index], bound = self.bound(memory, norm)
        factor = _factor(norm, bound)
        if factor is not None:
            torch._foreach_mul_(local_tensors(gradients), factor)
        if self.has_logger:
            self.record_clipping(optimizer, norm, bound)
        if self.logging:
            found = {"norm_before": norm, "norm_after": norm if factor is None else norm * factor, "threshold": bound}
            self.log_metrics(**{self.label(key, optimizer): value for key, value in found.items()})


class QuantileGradientClipping(_StatisticalClipping):
    r"""Clip the norm of the gradients to a quantile of the last norms: :math:`\|g_t\| \le Q_q(\|g_{t-w+1}\|, \dots, \|g_t\|)`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and after every other change of gradients.

    The norms before clipping of the last ``window`` steps, this one included, are kept for each optimizer and in the
    checkpoint. A norm that is not finite does not enter; the gradients of its step become NaN or 0, as in torch. Works for
    sharded parameters (FSDP2). LBFGS counts each evaluation as a step.

    Args:
        quantile: q in (0, 1), or a schedule; the source's 10th percentile is 0.1.
        window: How many norms are kept, ≥ 1. The source keeps all; 1000 follow a training whose norms change.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a quantile outside (0, 1), a window below 1, a selection of nothing, sparse gradients, a fused optimizer
            under float16 loss scaling, the flat parameters of FSDP1, or a checkpoint with another window.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[QuantileGradientClipping(0.1)], logger=False)

    Reference:
        P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: Adaptive Gradient Clipping for Source
        Separation Networks", 2020.
    """

    valid_ranges = {"quantile": Interval(0.0, 1.0, open_low=True, open_high=True)}

    def __init__(self, quantile: Value = 0.1, *, window: int = 1000, params: Params = "all", name: str | None = None) -> None:
        self.quantile = quantile
        self.window = check_integer("QuantileGradientClipping: window", window, 1)
        super().__init__(params, name)

    def begin(self) -> Tensor:
        """Return a history without norms."""
        return torch.full((self.window,), math.nan)

    def bound(self, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the history with this norm, and its quantile."""
        history = update_norm_history(memory, norm)
        return history, quantile_bound(history, self.current["quantile"])

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Take over the norms of the run that is resumed."""
        for history in packed.get("memory", {}).values():
            if len(history) != self.window:
                raise ValueError(
                    f"{self.name}: the checkpoint has a window of {len(history)} norms, expected window={self.window}: resume "
                    f"with window={len(history)}"
                )
        super().unpack_state(packed)


class ZScoreGradientClipping(_StatisticalClipping):
    r"""Clip norms that are outliers: where :math:`s = (\|g\| - \mu) / \sigma > z`, to :math:`\mu + \sigma z^2 / s`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and after every other change of gradients.

    Mean μ and variance σ² of the norms after clipping are those of the first ``warmup`` steps, in which nothing is clipped, and
    exponential averages from then on. They are kept for each optimizer and in the checkpoint. A norm that is not finite does
    not enter; after the warm-up the gradients of its step become NaN or 0, as in torch. LBFGS counts each evaluation as a step.
    Works for sharded parameters (FSDP2).

    Args:
        z: The largest z-score that is let through, > 0, or a schedule; infinity only watches.
        decay: What mean and variance keep of their values in each step, in [0, 1].
        warmup: In how many steps nothing is clipped, ≥ 1.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a z that is not positive, a decay outside [0, 1], a warm-up below 1, a selection of nothing, sparse
            gradients, a fused optimizer under float16 loss scaling, or the flat parameters of FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ZScoreGradientClipping(2.5)], logger=False)

    Reference:
        A. Kumar, L. Owen, N. Roy Chowdhury, F. Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025.
    """

    valid_ranges = {"z": POSITIVE}

    def __init__(
        self, z: Value = 2.5, *, decay: float = 0.97, warmup: int = 25, params: Params = "all", name: str | None = None
    ) -> None:
        self.z = z
        self.decay = Interval(0.0, 1.0).check("ZScoreGradientClipping: decay", decay)
        self.warmup = check_integer("ZScoreGradientClipping: warmup", warmup, 1)
        super().__init__(params, name)

    def begin(self) -> Tensor:
        """Return the statistics of no norms."""
        return torch.zeros(3)

    def bound(self, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the statistics with this norm after clipping, and the largest norm that those so far allow."""
        allowed = torch.where(memory[0] < self.warmup, math.inf, z_score_bound(norm, memory, self.current["z"]))
        clipped = torch.where(norm < math.inf, torch.minimum(norm, allowed), norm)
        return update_norm_statistics(memory, clipped, self.decay, self.warmup), allowed


def _factor(norm: Tensor, bound: Tensor) -> Tensor | None:
    """Return what brings a norm to its bound, or ``None`` where it is known to be within."""
    if is_cpu(norm) and norm.item() <= bound.item():
        return None
    return torch.where(norm <= bound, 1.0, bound / (norm + 1e-6))
