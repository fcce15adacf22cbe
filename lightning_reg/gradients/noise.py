"""Gradients with noise that fades."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.arguments import NON_NEGATIVE, check_seed
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.random import generator_for
from lightning_reg._tensors.shards import local_tensor, shard_like
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def add_gradient_noise_(params: Sequence[Tensor], std: float, generator: torch.Generator | None = None) -> None:
    r"""Add noise to every entry of every gradient: :math:`g_i \leftarrow g_i + \sigma\,n_i` with :math:`n_i \sim N(0, 1)`.

    Args:
        params: Tensors whose ``.grad`` is changed in place; those without one are left out.
        std: σ ≥ 0.
        generator: Where the random numbers come from, on the tensors' device, in the same state on every rank; torch's own by
            default.

    Raises:
        ValueError: For a sparse gradient.

    Example:
        >>> theta = torch.zeros(10_000, requires_grad=True)
        >>> theta.grad = torch.zeros(10_000)
        >>> add_gradient_noise_([theta], std=0.1, generator=torch.Generator().manual_seed(0))
        >>> round(theta.grad.std().item(), 2)
        0.1
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("gradient noise needs a dense gradient, got a sparse one: make the embedding with sparse=False")
        if p.grad is not None:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32, device=p.device)
            local_tensor(p.grad).add_(local_tensor(shard_like(noise, p.grad)), alpha=std)


class GradientNoise(GradientProcessing):
    r"""Add noise that fades to the gradients: :math:`g \leftarrow g + N(0, \sigma^2 / (1 + t)^\gamma)`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before clipping.

    Here t counts the optimizer steps done, or the batches in manual optimization. The random numbers depend on ``seed``,
    ``name`` and the step alone: they are the same on every replica, with sharded parameters and after a resume, and training
    draws what it would draw without them. Every entry gets noise, the row of an embedding's ``padding_idx`` too: leave such a
    parameter out.

    Args:
        std: σ ≥ 0, or a schedule; the source tries σ² of 0.01, 0.3 and 1.
        decay: γ ≥ 0, how fast the variance fades; 0 for not at all.
        seed: Where its random numbers begin, ≥ 0.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative σ, γ or seed, a selection of nothing, sparse gradients, a fused optimizer under float16 loss
            scaling, or the flat parameters of FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNoise(0.1)], logger=False)

    Reference:
        A. Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015.
    """

    phase = Phase.NOISE
    valid_ranges = {"std": NON_NEGATIVE}

    def __init__(
        self, std: Value, *, decay: float = 0.55, seed: int = 0, params: Params = "all", name: str | None = None
    ) -> None:
        self.std = std
        self.decay = NON_NEGATIVE.check("GradientNoise: decay", decay)
        self.seed = check_seed("GradientNoise: seed", seed)
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Add the noise of this step."""
        std = self.current["std"] / (1 + step.number) ** (self.decay / 2)
        if std:
            generator = generator_for(params[0].device, self.seed, self.name, *step)
            with self.logging_norms(params, optimizer):
                add_gradient_noise_(params, std, generator)
        if self.logging:
            self.log_metrics(**{self.label("std_now", optimizer): std})
