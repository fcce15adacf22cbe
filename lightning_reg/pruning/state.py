"""What pruning remembers: within a fit, from one fit to the next, and in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like, sum_over_shards
from lightning_reg.pruning.masks import pack_bits, unpack_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lightning_reg.pruning.structures import Structure


@dataclass
class PruningState:
    """The masks, sharded as the parameters are, and what else a resumed run needs to go on alike.

    Args:
        masks: ``True`` where a weight is pruned, by the parameter's name.
        start: What is rewound to, by name.
        trained: The parameters whose optimizer has stepped.
        steps: How often an optimizer has stepped.
        target: The share that was asked for last.
        total: Of how many weights it was.
        reached: How many of them are pruned.
        structure: What was pruned: single weights, units or two of each four.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    steps: int = 0
    target: float = 0.0
    total: int = 0
    reached: int = 0
    structure: Structure = "element"

    def packed(self) -> dict[str, Any]:
        """Return it for a checkpoint, masks in bits and everything whole: every rank must call it."""
        return {
            **vars(self),
            "masks": {name: (pack_bits(full_tensor(mask)).cpu(), list(mask.shape)) for name, mask in self.masks.items()},
            "start": {name: full_tensor(before).cpu() for name, before in self.start.items()},
            "trained": sorted(self.trained),
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> PruningState:
        """Lay what a checkpoint holds beside parameters: on their devices, and sharded as they are.

        Raises:
            ValueError: If the masks are of other names or shapes.
        """
        masks = {}
        for name, (bits, shape) in packed["masks"].items():
            p = tensors.get(name)
            if p is None or is_lazy(p) or list(p.shape) != list(shape):
                found = "is not selected here" if p is None else f"has shape {tuple(p.shape)} here"
                raise ValueError(
                    f"{what}: the checkpoint has a mask of shape {tuple(shape)} for {name!r}, which {found}: it is of another "
                    "model or selection; use the same, or give the callback another name to begin anew"
                )
            masks[name] = shard_like(unpack_bits(bits.to(p.device), shape), p)
        return cls(**{**packed, "masks": masks, "trained": set(packed["trained"])})

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether parameters are those that the masks are of: they have their zeros."""
        alive = 0
        for name, mask in self.masks.items():
            p = tensors.get(name)
            if p is None or is_lazy(p) or p.shape != mask.shape or isinstance(p, DTensor) != isinstance(mask, DTensor):
                return False
            part = local_tensor(p.detach())
            dead = local_tensor(mask).to(part.device)
            if int(sum_over_shards(part[dead].count_nonzero(), p)):
                return False
            alive += int(sum_over_shards(part[~dead].count_nonzero(), p))
        return alive > 0  # a model of zeros has anybody's

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return this rank's parts of the masks, by the parameter's ``id``."""
        held = {name: mask for name, mask in self.masks.items() if name in tensors}
        return {id(tensors[name]): local_tensor(mask).to(tensors[name].device) for name, mask in held.items()}
