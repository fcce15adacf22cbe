"""Gradient processing that takes the largest entries away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import check_integer
from lightning_reg._engine.technique import Phase
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params


@torch.no_grad()
def drop_peak_gradients_(params: Sequence[Tensor], k: int = 1) -> None:
    r"""Set the k entries of largest magnitude in each tensor's gradient to 0.

    Args:
        params: Tensors whose ``.grad`` is changed in place; those without one are left out.
        k: How many entries of each tensor, ≥ 0; exactly that many, however many are tied.

    Raises:
        ValueError: For a sparse gradient.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([-3.0, 0.5, 2.0])
        >>> drop_peak_gradients_([theta], k=1)
        >>> theta.grad
        tensor([0.0000, 0.5000, 2.0000])
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("peak dropping needs a dense gradient, got a sparse one: make the embedding with sparse=False")
        if p.grad is not None and k > 0:
            peaks = p.grad.abs().flatten().topk(min(k, p.grad.numel())).indices
            p.grad.put_(peaks, torch.zeros_like(peaks, dtype=p.grad.dtype))


class PeakGradientDropping(GradientProcessing):
    r"""Set the k largest entries of each parameter's gradient to 0: where :math:`|g_i|` peaks, :math:`g_i \leftarrow 0`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before every clipping.

    The rule of the article that this project grew from, under the name "gradient clipping": no entry may dominate the step.
    A tensor of k entries or fewer would never learn; a warning names such tensors when the fit starts.

    Args:
        k: How many entries of each tensor, ≥ 0; 0 does nothing.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative k, a selection of nothing, sharded parameters, sparse gradients, or a fused optimizer under
            float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PeakGradientDropping(k=1, params="weights")], logger=False)
    """

    phase = Phase.PEAK_DROPPING
    needs_full_tensors = True

    def __init__(self, k: int = 1, *, params: Params = "all", name: str | None = None) -> None:
        self.k = check_integer("PeakGradientDropping: k", k, 0)
        super().__init__(params, name)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and name those that would never learn."""
        super().attach(trainer, pl_module)
        starved = [name for name, p in self.tensors.items() if p.requires_grad and not is_lazy(p) and 0 < p.numel() <= self.k]
        if starved:
            rank_zero_warn(
                f"{self.name} drops all {self.k} or fewer entries of {', '.join(starved)}, which will not learn: leave such "
                f"parameters out, as in params={['all', *('!' + name for name in starved)]}"
            )

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Drop the peaks."""
        with self.logging_norms(params, optimizer):
            drop_peak_gradients_(params, self.k)
