"""Gradient clipping relative to the weights: the norm of each unit's gradient is compared with the norm of the unit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lightning_reg._engine.arguments import POSITIVE
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list, units_list
from lightning_reg._tensors.chunks import CHUNK_ENTRIES
from lightning_reg._tensors.reductions import is_cpu, tensor_norms
from lightning_reg._tensors.shards import is_sharded, local_tensor, min_over_shards
from lightning_reg._tensors.units import Units, in_wide_range, local_unit_norms, narrow_local_unit_norms, unit_view
from lightning_reg.gradients.base import GradientClipping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def clip_unit_gradients_(
    params: Tensors, clip_factor: float, eps: float = 1e-3, units: Units | Sequence[Units] | None = None
) -> Tensor:
    """Scale each unit's gradient down to a multiple of the unit's norm: g_u ← g_u · min(1, λ max(‖w_u‖, ε) / ‖g_u‖).

    A tensor with fewer than two dimensions is one unit.

    Args:
        params: Tensors whose ``.grad`` is scaled in place. Those without one are skipped.
        clip_factor: The largest ratio λ > 0 of the norm of a unit's gradient to that of its weights.
        eps: A lower bound ε > 0 for the norm of a unit, so that units that start at zero can learn.
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.

    Returns:
        A scalar, the smallest factor on this rank: 1 if nothing was clipped, 0 or NaN if a gradient was not finite.

    Raises:
        ValueError: If a gradient is sparse.

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
    params = tensor_list("clip_unit_gradients_: params", params)
    return _smallest_factor(_clip_units_(params, clip_factor, eps, units_list("clip_unit_gradients_", units, params)), params)


class AdaptiveGradientClipping(GradientClipping):
    """Adaptive gradient clipping (AGC), by the norm of each unit: ‖g_u‖ ≤ λ · max(‖w_u‖, ε).

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before norm clipping.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is transposed), or the vector of a token in
    an embedding. A bias, or any other tensor with fewer than two dimensions, is one unit.
    The paper leaves the last linear layer unclipped: ``params=["all", "!head.*"]``.
    If the gradient of a unit is not finite, its entries become NaN or 0. The other units are clipped as usual. On devices
    other than the CPU, the same happens if the sum of squares overflows, which in float32 takes a norm above 1.8 · 10¹⁹.
    Works with sharded parameters (FSDP2), even if a unit is split across ranks.

    Args:
        clip_factor: The largest ratio λ > 0 of the norm of a unit's gradient to that of its weights, or a schedule. Infinity
            leaves finite gradients alone and only logs. The paper uses 0.01 for batches of 4096, and larger values for smaller
            batches.
        eps: A lower bound ε > 0 for the norm of a unit. Without it, weights that start at zero never learn.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``clip_factor`` or ``eps`` is not positive, nothing is selected, gradients are sparse, a fused optimizer
            is used under float16 loss scaling, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AdaptiveGradientClipping(0.01, params=["all", "!head.*"])], logger=False)

    Reference:
        A. Brock, S. De, S. L. Smith, K. Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021.
    """

    reads_weights = True
    phase = Phase.VALUE_CLIPPING
    valid_ranges = {"clip_factor": POSITIVE}

    def __init__(
        self, clip_factor: Value = 0.01, *, eps: float = 1e-3, params: Params = "all", name: str | None = None
    ) -> None:
        self.clip_factor = clip_factor
        self.eps = POSITIVE.check("AdaptiveGradientClipping: eps", eps)
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clip, and count the steps in which a unit was clipped."""
        with self.logging_norms(params, optimizer):
            factors = _clip_units_(params, self.current["clip_factor"], self.eps, self.units(params))
        if self.has_logger and any(p.grad is not None for p in params):
            smallest = min_over_shards(_smallest_factor(factors, params).nan_to_num(0.0), params)
            self.running.mean(self.label("clipped_steps", optimizer), smallest < 1)
            self.running.sum(self.label("nonfinite_steps", optimizer), smallest == 0)


_Item: TypeAlias = tuple[Tensor, Tensor, Units]
"""A parameter, its gradient, and where both have their output units."""


def _batches(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """Yield batches that fit a processor cache: small tensors together, to save calls, and large tensors alone.

    Reading a batch for its norms leaves it in the cache, where its gradients are then scaled. On devices other than the CPU,
    calls cost more than a second read, so all tensors are one batch.
    """
    batch: list[_Item] = []
    entries = 0
    for item in items:
        if batch and is_cpu(item[0]) and entries + item[0].numel() > CHUNK_ENTRIES:
            yield batch
            batch, entries = [], 0
        batch.append(item)
        entries += item[0].numel()
    if batch:
        yield batch


def _clip_units_(params: Sequence[Tensor], clip_factor: float, eps: float, layouts: Sequence[Units]) -> list[Tensor]:
    """Scale the gradients, and return the factors of all units."""
    all_factors: list[Tensor] = []
    items = [(p, p.grad, layout) for p, layout in zip(params, layouts, strict=True) if p.grad is not None and p.numel()]
    if any(gradient.is_sparse for _, gradient, _ in items):
        raise ValueError("adaptive clipping needs a dense gradient, got a sparse one: create the embedding with sparse=False")
    for batch in _batches(items):
        units = [layout for *_, layout in batch]
        factors = _norms([p for p, *_ in batch], units)
        norms = _norms([gradient for _, gradient, _ in batch], units)
        if _overflow([*factors, *norms]):
            factors = [_wide_norms(p, layout).double() for p, _, layout in batch]
            norms = [_wide_norms(gradient, layout).double() for _, gradient, layout in batch]
        torch._foreach_clamp_min_(factors, eps)
        torch._foreach_mul_(factors, clip_factor)
        torch._foreach_div_(factors, tuple(norms))
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_([_view(gradient, layout) for _, gradient, layout in batch], tuple(factors))
        all_factors += factors
    return all_factors


def _smallest_factor(factors: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the smallest of 1 and all factors, on the device of the parameters."""
    one = torch.ones((), device=params[0].device if params else "cpu")
    return torch.stack([one, *(factor.amin().to(one) for factor in factors if factor.numel())]).amin()


def _norms(tensors: Sequence[Tensor], layouts: Sequence[Units]) -> list[Tensor]:
    """Return the norms of the units of each tensor. If they underflow, no factor is below 1."""
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    whole = iter(tensor_norms(vectors, 2) if vectors else [])  # in one call
    pairs = zip(tensors, layouts, strict=True)
    return [narrow_local_unit_norms(tensor, layout) if tensor.ndim > 1 else next(whole) for tensor, layout in pairs]


def _overflow(norms: Sequence[Tensor]) -> bool:
    """Return whether norms are infinite or NaN on the CPU, where they can be read without waiting."""
    return is_cpu(norms[0]) and not torch.stack([norm.max() for norm in norms if norm.numel()]).max().item() < math.inf


def _wide_norms(tensor: Tensor, layout: Units) -> Tensor:
    """Return the norms of the units, without overflow in their squares."""
    if tensor.ndim > 1:
        return local_unit_norms(tensor, layout, above=math.inf)
    norm = tensor_norms([tensor], 2)[0]
    return norm if is_sharded([tensor]) else in_wide_range(norm, tensor.view(-1), [0], above=math.inf).view(())


def _view(tensor: Tensor, layout: Units) -> Tensor:
    return unit_view(tensor, layout) if tensor.ndim > 1 else local_tensor(tensor)
