"""Gradient processing that drops the largest entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import check_integer
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors


@torch.no_grad()
def drop_peak_gradients_(params: Tensors, k: int = 1) -> None:
    """Set the k entries of largest magnitude in the gradient of each tensor to 0.

    Args:
        params: Tensors whose ``.grad`` is changed in place. Those without one are skipped.
        k: The number of entries to drop in each tensor, ≥ 0. It is exact even if magnitudes are tied.

    Raises:
        ValueError: If a gradient is sparse.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([-3.0, 0.5, 2.0])
        >>> drop_peak_gradients_([theta], k=1)
        >>> theta.grad
        tensor([0.0000, 0.5000, 2.0000])
    """
    params = tensor_list("drop_peak_gradients_: params", params)
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("peak dropping needs a dense gradient, got a sparse one: create the embedding with sparse=False")
        if p.grad is not None and k > 0:
            peaks = p.grad.abs().flatten().topk(min(k, p.grad.numel())).indices
            p.grad.put_(peaks, torch.zeros_like(peaks, dtype=p.grad.dtype))


class PeakGradientDropping(GradientProcessing):
    """Drop the peaks of the gradients: g_i ← 0 for the k entries of largest magnitude |g_i| in each tensor.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before centralization, noise, and
    clipping.

    No single entry can dominate the step. This is sometimes called gradient clipping, but it removes the peaks instead of
    limiting them.
    A tensor with k entries or fewer never learns. A warning names such tensors when the fit starts.
    Does not work with sharded parameters, because the largest entries may be on other ranks.

    Args:
        k: The number of entries to drop in each tensor, ≥ 0. 0 does nothing.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. By default it is made from the class and the selection.

    Raises:
        ValueError: If ``k`` is not an integer ≥ 0, nothing is selected, parameters are sharded, gradients are sparse, or a
            fused optimizer is used under float16 loss scaling.

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
        """Look up the parameters, and warn about those that would never learn."""
        super().attach(trainer, pl_module)
        starved = [name for name, p in self.tensors.items() if p.requires_grad and not is_lazy(p) and 0 < p.numel() <= self.k]
        if starved:
            rank_zero_warn(
                f"{self.name} with k={self.k} drops every entry of {', '.join(starved)}, which will not learn: exclude such "
                f"parameters, as in params={['all', *('!' + name for name in starved)]}"
            )

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Drop the peaks."""
        with self.logging_norms(params, optimizer):
            drop_peak_gradients_(params, self.k)
