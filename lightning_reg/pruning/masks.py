"""Masks: set weights, gradients, and optimizer state to 0 where a mask is ``True``, and store masks as bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS

from lightning_reg._engine.selection import lookup
from lightning_reg._engine.steps import with_inner
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.shards import full_tensor, local_tensor, sum_over_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lightning_reg._engine.tensor_arguments import Tensors


@torch.no_grad()
def mask_(params: Tensors, masks: Tensors) -> None:
    """Set masked entries to 0, even if they are NaN or infinite: θᵢ ← 0 where mᵢ.

    Args:
        params: Tensors to change in place, sharded or not.
        masks: A mask for each tensor, ``True`` where an entry becomes 0. The mask of a sharded tensor has the shape of this
            rank's part.

    Example:
        >>> theta = torch.tensor([1.0, torch.nan, 3.0])
        >>> mask_([theta], [torch.tensor([False, True, False])])
        >>> theta
        tensor([1., 0., 3.])
    """
    params = tensor_list("mask_: params", params)
    masks = tensor_list("mask_: masks", masks, len(params))
    for p, mask in zip(params, masks, strict=True):
        local_tensor(p).masked_fill_(mask, 0.0)


@torch.no_grad()
def mask_gradients_(params: Tensors, masks: Tensors) -> None:
    """Set masked entries of the gradients to 0, so that pruned weights build up no momentum: gᵢ ← 0 where mᵢ.

    Args:
        params: Tensors whose ``.grad`` is changed in place. Tensors without a gradient are skipped; sparse gradients work too.
        masks: A mask for each tensor, ``True`` where its gradient becomes 0. The mask of a sharded tensor has the shape of this
            rank's part.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> theta.grad = torch.tensor([1.0, 2.0])
        >>> mask_gradients_([theta], [torch.tensor([True, False])])
        >>> theta.grad
        tensor([0., 2.])
    """
    params = tensor_list("mask_gradients_: params", params)
    masks = tensor_list("mask_gradients_: masks", masks, len(params))
    for p, mask in zip(params, masks, strict=True):
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            p.grad._values().masked_fill_(mask[tuple(p.grad._indices())], 0.0)
        else:
            local_tensor(p.grad).masked_fill_(mask, 0.0)


@torch.no_grad()
def clear_state_(optimizer: Optimizer, params: Tensors, masks: Tensors) -> None:
    """Clear an optimizer's state for masked entries: momentum, and averages of gradients and of squared gradients.

    The state of LBFGS does not divide into entries, so all of it is cleared.

    Args:
        optimizer: The optimizer. If it wraps others, as ``ZeroRedundancyOptimizer`` does, their state is cleared too. Tensors
            that are not in the optimizer are skipped.
        params: Tensors.
        masks: A mask for each tensor, ``True`` where its state becomes 0. The mask of a sharded tensor has the shape of this
            rank's part.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> sgd = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
        >>> theta.sum().backward()
        >>> sgd.step()
        >>> clear_state_(sgd, [theta], [torch.tensor([True, False])])
        >>> sgd.state[theta]["momentum_buffer"]
        tensor([0., 1.])
    """
    params = tensor_list("clear_state_: params", params)
    masks = tensor_list("clear_state_: masks", masks, len(params))
    for inner in with_inner(optimizer):
        if isinstance(inner, LBFGS):
            inner.state.clear()
        for p, mask in zip(params, masks, strict=True):
            for value in inner.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.ndim and value.shape == p.shape:
                    local_tensor(value).masked_fill_(mask, 0.0)


@torch.no_grad()
def mask_copy_(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set masked entries to 0 in a copy of a module, such as an average of its weights.

    Args:
        module: A module with parameters of the same names, on any device, sharded or not.
        masks: Masks by parameter name, sharded like the parameters of the original.
    """
    for name, p in lookup(module, list(masks)).items():
        if not is_lazy(p):
            mask = masks[name] if isinstance(p, DTensor) else full_tensor(masks[name])
            mask_([p], [local_tensor(mask).to(p.device)])


@torch.no_grad()
def masks_of_zeros(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return masks of the entries that are 0: mᵢ = (θᵢ = 0).

    Args:
        tensors: Tensors by name, sharded or not.

    Returns:
        A mask of this rank's part for each tensor that has zeros, and the names of the tensors that are all zeros. These get
        no mask, because they may be initialized with zeros, as in LoRA, and a mask would keep them there.

    Example:
        >>> masks_of_zeros({"a": torch.tensor([0.0, 1.0]), "b": torch.zeros(2), "c": torch.ones(2)})
        ({'a': tensor([ True, False])}, ['b'])
    """
    masks = {name: local_tensor(p.detach()) == 0 for name, p in tensors.items() if not is_lazy(p)}
    counts = {name: int(sum_over_shards(mask.count_nonzero(), tensors[name])) for name, mask in masks.items()}
    empty = [name for name, count in counts.items() if 0 < count == tensors[name].numel()]
    return {name: mask for name, mask in masks.items() if counts[name] and name not in empty}, empty


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bytes, one bit for each entry.

    Args:
        mask: A boolean tensor of any shape.

    Returns:
        A flat tensor of bytes. The first entry is the lowest bit of the first byte.

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
    """Unpack a mask from bytes.

    Args:
        packed: What ``pack_bits`` returned.
        shape: The shape of the mask.

    Returns:
        A boolean tensor of this shape.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(torch.Size(shape)).bool()
