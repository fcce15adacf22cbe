"""Gradient clipping by the size of the weights: each output unit's gradient against the unit itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lightning_reg._engine.arguments import POSITIVE
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.chunks import CHUNK_ENTRIES
from lightning_reg._tensors.reductions import tensor_norms
from lightning_reg._tensors.shards import local_tensor, min_over_shards
from lightning_reg._tensors.units import Units, local_unit_norms, unit_view
from lightning_reg.gradients.base import GradientClipping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def clip_unit_gradients_(
    params: Sequence[Tensor], clip_factor: float, eps: float = 1e-3, units: Sequence[Units] | None = None
) -> Tensor:
    r"""Scale each output unit's gradient so that its norm is at most a share of the unit's own.

    :math:`G_u \leftarrow G_u \min(1, \lambda \max(\|W_u\|, \epsilon) / \|G_u\|)`. A tensor of fewer than two dimensions is one
    unit.

    Args:
        params: Tensors whose ``.grad`` is scaled in place; those without one are left out.
        clip_factor: λ, the largest share, > 0.
        eps: The norm that a unit is at least taken to have, so that one which starts at zero can learn, > 0.
        units: Where each tensor keeps its output units, as :func:`units_of` tells; dimension 0 by default.

    Returns:
        The smallest factor on this rank, a scalar: 1 where nothing was clipped, 0 or NaN where a gradient was not finite.

    Raises:
        ValueError: For a sparse gradient.

    Example:
        >>> theta = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
        >>> theta.grad = torch.tensor([[0.3, 0.4], [0.3, 0.4]])
        >>> clip_unit_gradients_([theta], clip_factor=0.05, eps=1.0)
        tensor(0.1000)
        >>> theta.grad
        tensor([[0.1500, 0.2000],
                [0.0300, 0.0400]])

    Reference:
        A. Brock, S. De, S. L. Smith, K. Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021.
    """
    return _smallest(_clip_units_(params, clip_factor, eps, units or [Units()] * len(params)), params)


class AdaptiveGradientClipping(GradientClipping):
    r"""Clip each output unit's gradient by the size of the unit: :math:`\|G_u\| \le \lambda \max(\|W_u\|, \epsilon)`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before clipping by norm.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 in a transposed one), the vector of a token; a
    bias, or any other tensor of fewer than two dimensions, is one unit. The source leaves the last linear layer out, as in
    ``params=["all", "!head.*"]``. Works for sharded parameters, also where a unit lies on several ranks. A unit whose gradient
    is not finite becomes NaN; the others are clipped as always.

    Args:
        clip_factor: λ > 0, or a schedule; infinity only watches finite
            gradients. The source takes 0.01 for batches of 4096, more for smaller.
        eps: The norm ε > 0 that a unit is at least taken to have: without it, weights that start at zero never learn.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For λ or ε that is not positive, a selection of nothing, sparse gradients, a fused optimizer under float16
            loss scaling, or the flat parameters of FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AdaptiveGradientClipping(0.01, params=["all", "!head.*"])], logger=False)

    Reference:
        A. Brock, S. De, S. L. Smith, K. Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021.
    """

    phase = Phase.VALUE_CLIPPING
    valid_ranges = {"clip_factor": POSITIVE}

    def __init__(
        self, clip_factor: Value = 0.01, *, eps: float = 1e-3, params: Params = "all", name: str | None = None
    ) -> None:
        self.clip_factor = clip_factor
        self.eps = POSITIVE.check("AdaptiveGradientClipping: eps", eps)
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clip, and keep how often there was something to clip."""
        with self.logging_norms(params, optimizer):
            factors = _clip_units_(params, self.current["clip_factor"], self.eps, self.units(params))
        if self.has_logger and any(p.grad is not None for p in params):
            smallest = min_over_shards(_smallest(factors, params).nan_to_num(0.0), params)
            self.running.mean(self.label("clipped_steps", optimizer), smallest < 1)
            self.running.sum(self.label("nonfinite_steps", optimizer), smallest == 0)


_Held: TypeAlias = tuple[Tensor, Tensor, Units]
"""A parameter, its gradient, and where both keep their units."""


def _batches(held: Sequence[_Held]) -> Iterator[list[_Held]]:
    """Yield many small tensors together, which saves calls, and large ones alone: in a cache still when they are scaled."""
    batch: list[_Held] = []
    entries = 0
    for item in held:
        if batch and entries + item[0].numel() > CHUNK_ENTRIES:
            yield batch
            batch, entries = [], 0
        batch.append(item)
        entries += item[0].numel()
    if batch:
        yield batch


def _clip_units_(params: Sequence[Tensor], clip_factor: float, eps: float, where: Sequence[Units]) -> list[Tensor]:
    """Scale the gradients, and return the factors of all units."""
    found: list[Tensor] = []
    held = [(p, p.grad, of) for p, of in zip(params, where, strict=True) if p.grad is not None and p.numel()]
    if any(gradient.is_sparse for _, gradient, _ in held):
        raise ValueError("adaptive clipping needs a dense gradient, got a sparse one: make the embedding with sparse=False")
    for some in _batches(held):
        factors = [_norms(p, of) for p, _, of in some]
        torch._foreach_clamp_min_(factors, eps)
        torch._foreach_mul_(factors, clip_factor)
        torch._foreach_div_(factors, tuple(_norms(gradient, of) for _, gradient, of in some))
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_([_view(gradient, of) for _, gradient, of in some], tuple(factors))
        found += factors
    return found


def _smallest(factors: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the smallest of 1 and all factors, on the device of the parameters."""
    one = torch.ones((), device=params[0].device if params else "cpu")
    return torch.stack([one, *(factor.amin().to(one) for factor in factors if factor.numel())]).amin()


def _norms(tensor: Tensor, of: Units) -> Tensor:
    return local_unit_norms(tensor, of) if tensor.ndim > 1 else tensor_norms([tensor], 2)[0]


def _view(tensor: Tensor, of: Units) -> Tensor:
    return unit_view(tensor, of) if tensor.ndim > 1 else local_tensor(tensor)
