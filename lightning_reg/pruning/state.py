"""The state of pruning, kept during a fit, from one fit to the next, and in checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import described_value
from lightning_reg._engine.state_checks import check_keys
from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like, sum_over_shards
from lightning_reg.pruning.masks import pack_bits, unpack_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_reg.pruning.structures import Structure


@dataclass
class Pruned:
    """The last pruning of parameters that are pruned together.

    Args:
        target: The requested sparsity.
        names: The names of the parameters.
        total: The number of their weights.
        reached: The number of pruned weights.
    """

    target: float = 0.0
    names: set[str] = field(default_factory=set)
    total: int = 0
    reached: int = 0


def check_packed(packed: Any) -> None:
    """Raise an error unless a value is what :meth:`PruningState.packed` returns, as far as can be told without a model.

    Raises:
        ValueError: If it is not.
    """
    check_keys("state", packed, [part.name for part in fields(PruningState)] if packed else ())
    for part, is_right in _PARTS.items() if packed else ():
        if not is_right(packed[part]):
            raise ValueError(
                f"state[{part!r}] is {described_value(packed[part])}, which does not belong in the state of pruning"
            )


def _is_mask(value: Any) -> bool:
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], Tensor)):
        return False
    bits, shape = value
    is_shape = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    return is_shape and bits.dtype == torch.uint8 and list(bits.shape) == [-(-math.prod(shape) // 8)]


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {part.name for part in fields(Pruned)}


_PARTS: dict[str, Callable[[Any], bool]] = {
    "masks": lambda value: isinstance(value, dict) and all(map(_is_mask, value.values())),
    "start": lambda value: isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values()),
    "trained": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "steps": lambda value: isinstance(value, int),
    "done": lambda value: isinstance(value, int),
    "groups": lambda value: isinstance(value, dict) and all(map(_is_group, value.values())),
    "is_fresh": lambda value: isinstance(value, bool),
    "structure": lambda value: isinstance(value, str),
}
"""What each part of the packed state is."""


@dataclass
class PruningState:
    """The masks, and everything else that a resumed run needs to continue exactly.

    Args:
        masks: Masks by parameter name, ``True`` where a weight is pruned, sharded like the parameters.
        start: The tensors to rewind to, by name.
        trained: The names of the parameters whose optimizer has stepped.
        steps: The number of optimizer steps so far, over all optimizers.
        done: ``trainer.global_step`` when pruning was last due after a step, or when the fit started.
        groups: The last pruning of each group of parameters, by the key of its sparsity.
        is_fresh: Whether rewinding has reset the optimizers, and none has stepped since.
        structure: What was pruned: single weights, units, or two of every four weights.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    steps: int = 0
    done: int = 0
    groups: dict[str, Pruned] = field(default_factory=dict)
    is_fresh: bool = False
    structure: Structure = "element"

    @property
    def total(self) -> int:
        """The number of weights that the last prunings counted."""
        return sum(group.total for group in self.groups.values())

    @property
    def reached(self) -> int:
        """The number of pruned weights."""
        return sum(group.reached for group in self.groups.values())

    def packed(self) -> dict[str, Any]:
        """Return the state for a checkpoint: masks as bits, and full tensors. Every rank must call it."""
        return {
            **vars(self),
            "masks": {name: (pack_bits(full_tensor(mask)).cpu(), list(mask.shape)) for name, mask in self.masks.items()},
            "start": {name: full_tensor(value).cpu() for name, value in self.start.items()},
            "trained": sorted(self.trained),
            "groups": {key: {**vars(group), "names": sorted(group.names)} for key, group in self.groups.items()},
        }

    @classmethod
    def unpacked(
        cls, packed: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str, structure: Structure
    ) -> PruningState:
        """Return the state of a checkpoint, with masks on the devices of the parameters and sharded like them.

        Args:
            packed: What ``packed`` returned.
            tensors: The selected parameters by name.
            what: The name of the callback, for error messages.
            structure: The structure to prune.

        Raises:
            ValueError: If the masks have another structure, or do not have the names and shapes of the parameters.
        """
        masks = {}
        for name, (bits, shape) in packed["masks"].items():
            p = tensors.get(name)
            if p is None or is_lazy(p) or list(p.shape) != list(shape):
                difference = "is not selected here" if p is None else f"has shape {tuple(p.shape)} here"
                raise ValueError(
                    f"{what}: the checkpoint has a mask of shape {tuple(shape)} for {name!r}, which {difference}: resume with "
                    "the same model and params, or give the callback another name to start with new masks"
                )
            masks[name] = shard_like(unpack_bits(bits.to(p.device), shape), p)
        if masks and packed["structure"] != structure:
            raise ValueError(
                f"{what}: the checkpoint's masks have structure={packed['structure']!r}, got structure={structure!r}: resume "
                "with the same structure, or give the callback another name to start with new masks"
            )
        groups = {key: Pruned(**{**group, "names": set(group["names"])}) for key, group in packed["groups"].items()}
        return cls(**{**packed, "masks": masks, "trained": set(packed["trained"]), "groups": groups})

    def matches(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether parameters are 0 where the masks prune them, so they appear to be the ones that were pruned.

        A model whose other weights are all zeros would match any masks, so it matches none.
        """
        nonzero = 0
        for name, mask in self.masks.items():
            p = tensors.get(name)
            if p is None or is_lazy(p) or p.shape != mask.shape or isinstance(p, DTensor) != isinstance(mask, DTensor):
                return False
            part = local_tensor(p.detach())
            pruned = local_tensor(mask).to(part.device)
            if int(sum_over_shards(part[pruned].count_nonzero(), p)):
                return False
            nonzero += int(sum_over_shards(part[~pruned].count_nonzero(), p))
        return nonzero > 0

    def forget(self, name: str) -> None:
        """Start without a mask for a parameter that was added or replaced."""
        self.masks.pop(name, None)
        self.trained.discard(name)
        for group in self.groups.values():
            group.names.discard(name)

    def local_masks(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return this rank's parts of the masks, keyed by the ``id`` of the parameter."""
        masks = [(tensors[name], mask) for name, mask in self.masks.items() if name in tensors]
        return {id(p): local_tensor(mask).to(p.device) for p, mask in masks}
