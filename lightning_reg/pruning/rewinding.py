"""Rewinding to the weights of an early step, as the search for a winning lottery ticket does after each pruning."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_reg._engine import _lightning
from lightning_reg._engine.names import canonical_name
from lightning_reg._engine.selection import select_parameters
from lightning_reg._engine.steps import with_inner
from lightning_reg._tensors.shards import local_tensor, shard_like

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning.pytorch import LightningModule
    from torch import Tensor
    from torch.optim import Optimizer


def rewindable(module: LightningModule, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Return the tensors that rewinding restores, by name: trained parameters and the statistics of batch normalization."""
    trained = trained_ids(module, optimizers)
    tensors: dict[str, Tensor] = {name: p for name, p in select_parameters(module, "all").items() if id(p) in trained}
    for prefix, owner in module.named_modules():
        if isinstance(owner, nn.modules.batchnorm._NormBase):
            tensors |= {canonical_name(f"{prefix}.{name}"): buffer for name, buffer in owner.named_buffers(recurse=False)}
    return tensors


def trained_ids(module: LightningModule, optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the ids of a module's parameters that are in an optimizer and not currently frozen."""
    toggled = _lightning.toggled(module)
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    return {id(p) for params in groups for p in params if p.requires_grad or toggled.get(p)}


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, sharded in the same way."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy the values of a snapshot into tensors. Tensors that are not in the snapshot stay unchanged.

    Raises:
        ValueError: If a tensor's shape differs from that in the snapshot.
    """
    for name, tensor in tensors.items():
        value = saved.get(name)
        if value is None:
            continue
        if value.shape != tensor.shape:
            raise ValueError(
                f"cannot rewind {name!r}: the saved tensor has shape {tuple(value.shape)}, expected {tuple(tensor.shape)}"
            )
        sharded = value if isinstance(value, DTensor) else shard_like(value.to(tensor.device), tensor)
        local_tensor(tensor).copy_(local_tensor(sharded))


def initial_states(optimizers: Iterable[Optimizer]) -> dict[int, dict[Any, Any]]:
    """Return copies of the states of optimizers, and of those they wrap, before the first step, by ``id``. Most are empty."""
    return {id(inner): _copy_state(inner.state) for optimizer in optimizers for inner in with_inner(optimizer)}


def reset_optimizers_(optimizers: Iterable[Optimizer], states: Mapping[int, Mapping[Any, Any]]) -> None:
    """Set optimizers back to the states that ``initial_states`` returned."""
    for inner in [inner for optimizer in optimizers for inner in with_inner(optimizer)]:
        inner.state.clear()
        inner.state.update(_copy_state(states.get(id(inner), {})))


def _copy_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy an optimizer's state, but not its keys, which are the parameters."""
    return {p: deepcopy(parameter_state) for p, parameter_state in state.items()}
