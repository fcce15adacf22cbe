"""Going back to the weights of an early step: what the search for a winning ticket does after each pruning."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_reg._engine.selection import canonical_name, select_parameters
from lightning_reg._tensors.shards import local_tensor, shard_like

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from torch.optim import Optimizer


def rewindable(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Return what rewinding restores: every parameter that is trained, and the running statistics of batch normalisation."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Tensor] = {
        name: p for name, p in select_parameters(module, "all").items() if id(p) in held and p.requires_grad
    }
    for prefix, owner in module.named_modules():
        if isinstance(owner, nn.modules.batchnorm._NormBase):
            found |= {canonical_name(f"{prefix}.{name}"): buffer for name, buffer in owner.named_buffers(recurse=False)}
    return found


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, sharded as the tensors are."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Give tensors back the values of a snapshot; what was not trained when it was taken is left alone.

    Raises:
        ValueError: If one has another shape.
    """
    for name, tensor in tensors.items():
        before = kept.get(name)
        if before is None:
            continue
        if before.shape != tensor.shape:
            raise ValueError(f"the weights to rewind to have shape {tuple(before.shape)} for {name!r} of {tuple(tensor.shape)}")
        local_tensor(tensor).copy_(
            local_tensor(before if isinstance(before, DTensor) else shard_like(before.to(tensor.device), tensor))
        )


def started(optimizers: Iterable[Optimizer]) -> dict[int, dict[Any, Any]]:
    """Return the state that optimizers begin with, by their ``id``: mostly none."""
    return {id(optimizer): _copied(optimizer.state) for optimizer in optimizers}


def reset_(optimizers: Iterable[Optimizer], states: Mapping[int, Mapping[Any, Any]]) -> None:
    """Give optimizers the state that they began with."""
    for optimizer in optimizers:
        optimizer.state.clear()
        optimizer.state.update(_copied(states.get(id(optimizer), {})))


def _copied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy an optimizer's state, not the parameters that are its keys."""
    return {p: deepcopy(of_parameter) for p, of_parameter in state.items()}
