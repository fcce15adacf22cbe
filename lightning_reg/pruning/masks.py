"""What is done with masks: weights, gradients and optimizer state are set to 0 where they say so, stored in bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import LBFGS

from lightning_reg._tensors.shards import local_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer


@torch.no_grad()
def mask_(params: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set entries to 0, whatever they were: NaN and infinity too.

    Args:
        params: Tensors, changed in place.
        masks: For each, ``True`` where it becomes 0; for a sharded one, of the part that this rank holds.

    Example:
        >>> theta = torch.tensor([1.0, torch.nan, 3.0])
        >>> mask_([theta], [torch.tensor([False, True, False])])
        >>> theta
        tensor([1., 0., 3.])
    """
    for p, mask in zip(params, masks, strict=True):
        local_tensor(p).masked_fill_(mask, 0.0)


@torch.no_grad()
def mask_gradients_(params: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set entries of gradients to 0, so that no momentum collects where a weight is pruned.

    Args:
        params: Tensors whose ``.grad`` is changed in place; those without one are left out.
        masks: For each, ``True`` where its gradient becomes 0; for a sharded one, of the part that this rank holds.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> theta.grad = torch.tensor([1.0, 2.0])
        >>> mask_gradients_([theta], [torch.tensor([True, False])])
        >>> theta.grad
        tensor([0., 2.])
    """
    for p, mask in zip(params, masks, strict=True):
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            p.grad._values().masked_fill_(mask[tuple(p.grad._indices())], 0.0)
        else:
            local_tensor(p.grad).masked_fill_(mask, 0.0)


@torch.no_grad()
def clear_state_(optimizer: Optimizer, params: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Forget what an optimizer remembers of entries: momentum, averages of gradients and of their squares.

    An optimizer whose state does not divide among parameters (LBFGS) forgets everything.

    Args:
        optimizer: The optimizer; what it does not hold is left out.
        params: Tensors.
        masks: For each, ``True`` where its state becomes 0; for a sharded one, of the part that this rank holds.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> sgd = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
        >>> theta.sum().backward()
        >>> sgd.step()
        >>> clear_state_(sgd, [theta], [torch.tensor([True, False])])
        >>> sgd.state[theta]["momentum_buffer"]
        tensor([0., 1.])
    """
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
    for p, mask in zip(params, masks, strict=True):
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.ndim and value.shape == p.shape:
                local_tensor(value).masked_fill_(mask, 0.0)


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask as bytes, one bit for each entry.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        packed |= padded[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a mask of some shape from bytes.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(torch.Size(shape)).bool()
