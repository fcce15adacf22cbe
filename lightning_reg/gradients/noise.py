"""Gradient noise that fades over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.arguments import NON_NEGATIVE, check_seed
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import optional_list, tensor_list
from lightning_reg._tensors.layers import padding_rows
from lightning_reg._tensors.random import generator_for
from lightning_reg._tensors.shards import local_tensor, shard_like
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def add_gradient_noise_(
    params: Tensors,
    std: float,
    generator: torch.Generator | None = None,
    padding: int | Sequence[int | None] | None = None,
) -> None:
    """Add independent Gaussian noise to each entry of the gradients: g ← g + N(0, σ²).

    Args:
        params: Tensors whose ``.grad`` is changed in place. Those without one are skipped.
        std: The standard deviation σ ≥ 0.
        generator: The random generator, on the device of the tensors and in the same state on every rank; torch's global
            generator by default.
        padding: For each tensor, the row that gets no noise, such as the ``padding_idx`` of an embedding, or ``None``.

    Raises:
        ValueError: If a gradient is sparse.

    Example:
        >>> theta = torch.zeros(10_000, requires_grad=True)
        >>> theta.grad = torch.zeros(10_000)
        >>> add_gradient_noise_([theta], std=0.1, generator=torch.Generator().manual_seed(0))
        >>> round(theta.grad.std().item(), 2)
        0.1
    """
    params = tensor_list("add_gradient_noise_: params", params)
    for p, row in zip(params, optional_list("add_gradient_noise_: padding", padding, int, len(params)), strict=True):
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("gradient noise needs a dense gradient, got a sparse one: create the embedding with sparse=False")
        if p.grad is not None:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32, device=p.device)
            if row is not None:
                noise[row] = 0.0
            local_tensor(p.grad).add_(local_tensor(shard_like(noise, p.grad)), alpha=std)


class GradientNoise(GradientProcessing):
    """Add Gaussian noise that fades over time: g ← g + N(0, σ² / (1 + t)^γ) in step t.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before clipping.

    t is the number of optimizer steps so far. In manual optimization, it is the number of batches.
    The noise depends only on ``seed``, ``name``, and the step. It is the same on every rank, for sharded parameters (FSDP2),
    after a resume, and in all evaluations of an LBFGS step. Global random generators stay untouched.
    Every entry gets noise, except for the ``padding_idx`` row of an embedding, which never gets a gradient.

    Args:
        std: The initial standard deviation σ ≥ 0, or a schedule. The paper tries σ² = 0.01, 0.3, and 1.
        decay: The exponent γ ≥ 0, which sets how fast the variance fades. 0 keeps it constant. The paper uses 0.55.
        seed: The seed of the noise, an integer in [0, 2³¹).
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``std`` or ``decay`` is negative or NaN, ``seed`` is out of range, nothing is selected, gradients are
            sparse, a fused optimizer is used under float16 loss scaling, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNoise(0.1)], logger=False)

    Reference:
        A. Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015.
    """

    phase = Phase.NOISE
    valid_ranges = {"std": NON_NEGATIVE}
    fit_attributes = ("_padding",)

    def __init__(
        self, std: Value, *, decay: float = 0.55, seed: int = 0, params: Params = "all", name: str | None = None
    ) -> None:
        self.std = std
        self.decay = NON_NEGATIVE.check("GradientNoise: decay", decay)
        self.seed = check_seed("GradientNoise: seed", seed)
        super().__init__(params, name)
        self._padding: dict[int, int] = {}  # the padding row of each embedding, by the id of its weight

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and the padding rows among them."""
        super().attach(trainer, pl_module)
        self._padding = padding_rows(pl_module)

    def tensors_changed(self, names: Sequence[str]) -> None:
        """Look up the padding rows anew."""
        super().tensors_changed(names)
        assert self._trainer is not None, "the fit has started"
        self._padding = padding_rows(self._trainer.lightning_module)

    def detach(self) -> None:
        """Release the tensors."""
        super().detach()
        self._padding.clear()

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Add the noise of this step."""
        std = self.current["std"] / (1 + step.number) ** (self.decay / 2)
        if std:
            generator = generator_for(params[0].device, self.seed, self.name, *step.key)
            with self.logging_norms(params, optimizer):
                add_gradient_noise_(params, std, generator, [self._padding.get(id(p)) for p in params])
        if self.logging:
            self.log_metrics(**{self.label("std_now", optimizer): std})
