"""Gradient norm clipping with a bound that follows the norms of earlier steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from lightning_reg._engine.arguments import POSITIVE, Interval, check_integer
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import check_tensor
from lightning_reg._tensors.gradients import existing_gradients, scalable_gradients
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
    """Return a history of norms with a new norm appended and the oldest one dropped. A non-finite norm changes nothing.

    Args:
        history: A vector of the last norms, oldest first. Entries without a norm yet are NaN.
        norm: The norm of this step, a scalar.

    Returns:
        A vector of the same length.

    Example:
        >>> update_norm_history(torch.tensor([float("nan"), 1.0]), torch.tensor(2.0))
        tensor([1., 2.])
        >>> update_norm_history(torch.tensor([1.0, 2.0]), torch.tensor(float("inf")))
        tensor([1., 2.])
    """
    check_tensor("update_norm_history: history", history)
    check_tensor("update_norm_history: norm", norm)
    return torch.where(norm < math.inf, torch.cat([history[1:], norm.to(history).view(1)]), history)


@torch.no_grad()
def quantile_bound(history: Tensor, quantile: float) -> Tensor:
    """Return a quantile of the norms in a history, with linear interpolation.

    Args:
        history: A vector of norms. Entries without a norm yet are NaN.
        quantile: The quantile, in (0, 1).

    Returns:
        A scalar: NaN if the history has no norms.

    Example:
        >>> quantile_bound(torch.tensor([float("nan"), 1.0, 2.0, 3.0]), 0.25)
        tensor(1.5000)
    """
    check_tensor("quantile_bound: history", history)
    return torch.nanquantile(history, quantile)


@torch.no_grad()
def z_score_bound(norm: Tensor, statistics: Tensor, z: float) -> Tensor:
    """Return the largest norm that the z-score rule allows: μ + σ z² / s if s > z, where s = (‖g‖ − μ) / σ is the z-score.

    The farther a norm is above the mean, the closer to the mean it is clipped. The z-score is computed with σ + 10⁻⁶, as in the
    authors' code of ZClip.

    Args:
        norm: The norm of this step, a scalar.
        statistics: The count, mean μ, and variance σ² of earlier norms, as returned by ``update_norm_statistics``.
        z: The largest z-score that is not clipped, > 0.

    Returns:
        A scalar: infinity if there is nothing to clip.

    Example:
        >>> z_score_bound(torch.tensor(9.0), torch.tensor([25.0, 1.0, 4.0]), z=2.0)
        tensor(3.0000)
    """
    check_tensor("z_score_bound: norm", norm)
    check_tensor("z_score_bound: statistics", statistics)
    _, mean, variance = statistics.unbind()
    deviation = variance.sqrt()
    score = (norm - mean) / (deviation + 1e-6)
    return torch.where(score > z, mean + z * deviation * (z / score), math.inf)


@torch.no_grad()
def update_norm_statistics(statistics: Tensor, norm: Tensor, decay: float, warmup: int) -> Tensor:
    """Return the statistics of norms, updated with a new norm: plain averages in the warm-up, exponential averages after it.

    Args:
        statistics: The count, mean, and variance of earlier norms: a vector of three, initially zeros.
        norm: The norm of this step after clipping, a scalar. A non-finite norm changes nothing.
        decay: The weight of the old value in an exponential average, in [0, 1].
        warmup: The number of norms in the plain averages, ≥ 1.

    Returns:
        A vector of three.

    Example:
        >>> update_norm_statistics(torch.tensor([1.0, 2.0, 0.0]), torch.tensor(4.0), decay=0.97, warmup=25)
        tensor([2., 3., 1.])
    """
    check_tensor("update_norm_statistics: statistics", statistics)
    check_tensor("update_norm_statistics: norm", norm)
    norm = norm.to(statistics)
    count, mean, variance = statistics.unbind()
    warm = count >= warmup
    keep = torch.where(warm, decay, count / (count + 1))
    # The distance to the new mean is keep times the distance to the old one. The warm-up uses the product of both (Welford's
    # algorithm), and the exponential average uses the square of the distance to the new mean, as the code of the
    # ZClip authors does.
    welford = (norm - mean).square() * keep
    deviation = torch.where(warm, welford * keep, welford)
    updated = torch.stack([count + 1, torch.lerp(norm, mean, keep), torch.lerp(deviation, variance, keep)])
    return torch.where(norm < math.inf, updated, statistics)


class _StatisticalClipping(GradientClipping):
    """Base class of clipping to a bound that depends on earlier norms, which are kept for each optimizer and in checkpoints."""

    phase = Phase.NORM_CLIPPING
    supports_complex = True
    state_entries = ("memory",)
    fit_attributes = ("_bounds",)

    def __init__(self, params: Params, name: str | None) -> None:
        super().__init__(params, name)
        self._bounds: dict[int, Tensor] = {}  # of the current step, by index of the optimizer

    @abstractmethod
    def initial_memory(self) -> Tensor:
        """Return the memory before the first step."""

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Describe a valid entry: a vector for each optimizer."""
        ndim = self.initial_memory().ndim
        is_memory = (
            isinstance(key, int) and isinstance(value, torch.Tensor) and value.ndim == ndim and value.is_floating_point()
        )
        return "" if is_memory else "a vector of numbers for each optimizer"

    @abstractmethod
    def update_bound(self, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory after a step of this norm, and the largest norm allowed in the step."""

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Update the bound with the norm of this step, and clip to it."""
        gradients = existing_gradients(params)
        if not gradients:
            return
        norm, index = total_norm_fp32(gradients), self.optimizer_index(optimizer)
        if step.evaluation and index in self._bounds:
            bound = self._bounds[index]
        else:
            memories = self.state["memory"]
            memory = memories[index].to(norm.device) if index in memories else self.initial_memory().to(norm)
            memories[index], bound = self.update_bound(memory, norm)
            self._bounds[index] = bound
        factor = _clip_factor(norm, bound)
        if factor is not None:
            torch._foreach_mul_(local_tensors(scalable_gradients(params)), factor)
        if self.has_logger:
            self.record_clipping(optimizer, norm, bound)
        if self.logging:
            metrics = {"norm_before": norm, "norm_after": norm if factor is None else norm * factor, "threshold": bound}
            self.log_metrics(**{self.label(key, optimizer): value for key, value in metrics.items()})


class QuantileGradientClipping(_StatisticalClipping):
    """Clip the norm of the gradients to a quantile of recent norms (AutoClip): ‖g_t‖ ≤ Q_q(‖g_{t−w+1}‖, …, ‖g_t‖).

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and all other gradient processing.

    The history contains the norms before clipping of the last ``window`` steps, including the current one. Each optimizer has
    its own, and checkpoints contain it.
    The history leaves out non-finite norms. The gradients of such a step become NaN or 0, as in torch.
    For sharded parameters (FSDP2), the norm is computed over all shards.
    If an optimizer evaluates the loss several times in a step, the first evaluation sets the bound for all of them.

    Args:
        quantile: The quantile q in (0, 1), or a schedule. The paper uses the 10th percentile, 0.1.
        window: The number of norms to keep, ≥ 1. The paper keeps all of them. With the default of 1000, the bound adapts as
            the norms change during training.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``quantile`` is outside (0, 1), ``window`` is below 1, nothing is selected, gradients are sparse, a fused
            optimizer is used under float16 loss scaling, FSDP1 has flattened the parameters, or a checkpoint has another
            window.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[QuantileGradientClipping(0.1)], logger=False)

    Reference:
        P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks", 2020.
    """

    valid_ranges = {"quantile": Interval(0.0, 1.0, open_low=True, open_high=True)}

    def __init__(self, quantile: Value = 0.1, *, window: int = 1000, params: Params = "all", name: str | None = None) -> None:
        self.quantile = quantile
        self.window = check_integer("QuantileGradientClipping: window", window, 1)
        super().__init__(params, name)

    def initial_memory(self) -> Tensor:
        """Return a history without norms."""
        return torch.full((self.window,), math.nan)

    def update_bound(self, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the history with this norm, and its quantile."""
        history = update_norm_history(memory, norm)
        return history, quantile_bound(history, self.current["quantile"])

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Restore the norms of the resumed run."""
        super().unpack_state(packed)
        for history in packed.get("memory", {}).values():
            if len(history) != self.window:
                raise ValueError(
                    f"{self.name}: the checkpoint has a window of {len(history)} norms, expected window={self.window}: resume "
                    f"with window={len(history)}"
                )


class ZScoreGradientClipping(_StatisticalClipping):
    """Clip outliers of the gradient norm (ZClip): ‖g‖ ← μ + σ z² / s if the z-score s = (‖g‖ − μ) / σ exceeds z.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and all other gradient processing.

    μ and σ² are the mean and variance of the norms after clipping. In the first ``warmup`` steps they are plain averages, and
    nothing is clipped. After that, they are exponential averages. Each optimizer has its own, and checkpoints contain them.
    They leave out non-finite norms. After the warm-up, the gradients of such a step become NaN or 0, as in torch.
    For sharded parameters (FSDP2), the norm is computed over all shards.
    If an optimizer evaluates the loss several times in a step, the first evaluation sets the bound for all of them.
    The defaults are those of the authors' code.

    Args:
        z: The largest z-score that is not clipped, > 0, or a schedule. Infinity clips nothing and only logs.
        decay: The weight of the old value in the exponential averages, in [0, 1].
        warmup: The number of steps before clipping starts, ≥ 1.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``z`` is not positive, ``decay`` is outside [0, 1], ``warmup`` is below 1, nothing is selected, gradients
            are sparse, a fused optimizer is used under float16 loss scaling, or FSDP1 has flattened the parameters.

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

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Describe a valid entry: a count, a mean, and a variance for each optimizer."""
        expected = super().expected_in_state(entry, key, value)
        return expected or ("" if len(value) == len(self.initial_memory()) else "a count, a mean, and a variance")

    def initial_memory(self) -> Tensor:
        """Return the statistics of no norms."""
        return torch.zeros(3)

    def update_bound(self, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the statistics with this norm after clipping, and the largest norm that the earlier statistics allow."""
        allowed = torch.where(memory[0] < self.warmup, math.inf, z_score_bound(norm, memory, self.current["z"]))
        clipped = torch.where(norm < math.inf, torch.minimum(norm, allowed), norm)
        return update_norm_statistics(memory, clipped, self.decay, self.warmup), allowed


def _clip_factor(norm: Tensor, bound: Tensor) -> Tensor | None:
    """Return the factor that scales a norm down to its bound, or ``None`` if it is known to be 1."""
    if is_cpu(norm) and norm.item() <= bound.item():
        return None
    return torch.where(norm <= bound, 1.0, bound / (norm + 1e-6))
