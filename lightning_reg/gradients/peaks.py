"""Gradient processing that drops the largest entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import check_integer
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.reductions import is_cpu
from lightning_reg._tensors.shards import gather_shards, is_sharded, local_tensor, positions
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors

_LAST = 2**62  # after every position


@torch.no_grad()
def drop_peak_gradients_(params: Tensors, k: int = 1) -> None:
    """Set the k entries of largest magnitude in the gradient of each tensor to 0.

    Args:
        params: Tensors, sharded or not, whose ``.grad`` is changed in place. Those without one are skipped.
        k: The number of entries to drop in each tensor, ≥ 0. The number is exact even with ties: the first entries of the
            flattened tensor are dropped. NaN counts as the largest.

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
        if p.grad is not None and min(k, p.grad.numel()) > 0:
            _drop_peaks_(p.grad, min(k, p.grad.numel()))


class PeakGradientDropping(GradientProcessing):
    """Drop the peaks of the gradients: g_i ← 0 for the k entries of largest magnitude |g_i| in each tensor.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before centralization, noise, and
    clipping.

    No single entry can dominate the step. This is sometimes called gradient clipping, but it removes the peaks rather than
    limiting them.
    A tensor with k entries or fewer never learns. A warning names such tensors when the fit starts.
    Works with sharded parameters (FSDP2): the k largest entries are those of the whole tensor, across all ranks.

    Args:
        k: The number of entries to drop in each tensor, ≥ 0. 0 does nothing.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``k`` is not an integer ≥ 0, nothing is selected, gradients are sparse, a fused optimizer is used under
            float16 loss scaling, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PeakGradientDropping(k=1, params="weights")], logger=False)
    """

    phase = Phase.PEAK_DROPPING

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


def _drop_peaks_(gradient: Tensor, count: int) -> None:
    """Set entries of a gradient to 0, by operations that are deterministic."""
    entries = None if is_sharded([gradient]) else _clear_peaks(gradient, count)
    if entries is None:
        local_tensor(gradient).masked_fill_(_peaks(gradient, count), 0.0)
        return
    flat = gradient.reshape(-1).index_fill_(0, entries, 0.0)
    if flat.data_ptr() != gradient.data_ptr():  # a copy, since the memory is not contiguous
        gradient.copy_(flat.view(gradient.shape))


def _clear_peaks(tensor: Tensor, count: int) -> Tensor | None:
    """Return the indices of the peaks of a tensor without shards, or ``None`` if some of them may equal an entry that stays.

    ``topk`` returns an arbitrary choice among equal entries.
    """
    magnitudes = tensor.abs().flatten()
    if count == 1:
        return magnitudes.argmax().view(1)
    if not is_cpu(tensor):
        return None  # reading the entries would wait for the device
    largest, entries = magnitudes.topk(min(count + 1, len(magnitudes)))
    is_tied = count < len(magnitudes) and largest[count - 1].item() == largest[count].item() != 0.0
    return None if is_tied else entries[:count]


def _peaks(tensor: Tensor, count: int) -> Tensor:
    """Return a mask of this rank's part: the peaks of all shards together, the first of equal ones."""
    part = local_tensor(tensor)
    magnitudes = part.abs().flatten().nan_to_num_(nan=math.inf, posinf=math.inf)
    size = len(magnitudes)
    largest, entries = magnitudes.topk(min(count, size))
    over_shards = gather_shards(_padded(largest, count, -1.0), tensor).topk(count).values
    threshold = over_shards[-1]
    ties = count - (over_shards > threshold).sum()  # how many entries to drop among those that equal the threshold
    tied = torch.nonzero_static(magnitudes == threshold, size=min(count, size)).view(-1)  # −1 where there are fewer
    indices = torch.where(tied < 0, _LAST, positions(tensor, tied.clamp(min=0)))
    last = gather_shards(_padded(indices, count, _LAST), tensor).sort().values.index_select(0, (ties - 1).view(1))
    dropped = torch.cat([entries.where(largest > threshold, size), tied.where(indices <= last, size)])
    mask = torch.zeros(size + 1, dtype=torch.bool, device=part.device).index_fill_(0, dropped, True)  # the last one is a dummy
    return mask[:size].view(part.shape)


def _padded(values: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=fill)
