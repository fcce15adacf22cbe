"""Weights that a module computes from other parameters: parametrizations, and torch's older hooks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_reg._engine.names import canonical_name
from lightning_reg._tensors.shards import local_tensor, shard_like

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn


class Computed(NamedTuple):
    """A tensor that a module computes from other parameters, its originals.

    Args:
        name: The qualified name of the tensor.
        owner: The module.
        attribute: The name of the tensor in the module.
        value: Computes the tensor without side effects.
        is_masked: Whether it is its only original times a mask of zeros and ones (``torch.nn.utils.prune``). Acting on a
            masked original is acting on the tensor.
    """

    name: str
    owner: nn.Module
    attribute: str
    value: Callable[[], Tensor]
    is_masked: bool = False

    def mask(self) -> Tensor:
        """Return the current mask of a masked tensor."""
        mask: Tensor = getattr(self.owner, f"{self.attribute}_mask")
        return mask


def computed_tensors(module: nn.Module) -> dict[int, Computed]:
    """Return the computed tensors of a module, by the ``id`` of each parameter that they are computed from.

    Example:
        >>> from torch import nn
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> {name: computed_tensors(layer)[id(p)].name for name, p in layer.named_parameters() if name != "bias"}
        {'parametrizations.weight.original0': 'weight', 'parametrizations.weight.original1': 'weight'}
    """
    found: dict[int, Computed] = {}
    for prefix, owner in module.named_modules():
        for attribute, value, originals, is_masked in (*_parametrized(owner), *_hooked(owner)):
            name = canonical_name(f"{prefix}.{attribute}" if prefix else attribute)
            found |= {id(p): Computed(name, owner, attribute, value, is_masked) for p in originals}
    return found


@torch.no_grad()
def mask_original_(p: Tensor, computed: Computed) -> None:
    """Set the entries of an original that its mask hides to 0, as ``torch.nn.utils.prune.remove`` does."""
    local_tensor(p).mul_(local_tensor(shard_like(computed.mask(), p)))


_Found = tuple[str, "Callable[[], Tensor]", "list[nn.Parameter]", bool]


def _parametrized(owner: nn.Module) -> Iterator[_Found]:
    """Yield the tensors of a module that ``torch.nn.utils.parametrize`` computes."""
    if is_parametrized(owner):
        for attribute, parametrizations in owner.parametrizations.items():  # type: ignore[operator,union-attr]
            yield attribute, _in_eval_mode(parametrizations), list(parametrizations.parameters()), False


def _hooked(owner: nn.Module) -> Iterator[_Found]:
    """Yield the tensors of a module that hooks compute before each forward pass."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            originals = [getattr(owner, f"{hook.name}_{part}") for part in "gv"]
            yield hook.name, partial(hook.compute_weight, owner), originals, False
        elif isinstance(hook, SpectralNorm):
            original = getattr(owner, f"{hook.name}_orig")
            yield hook.name, partial(hook.compute_weight, owner, do_power_iteration=False), [original], False
        elif isinstance(hook, BasePruningMethod):
            original, mask = (getattr(owner, f"{hook._tensor_name}_{part}") for part in ("orig", "mask"))
            is_exact = bool(((mask == 0) | (mask == 1)).all())
            yield hook._tensor_name, partial(_masked, original, mask), [original], is_exact


def _masked(original: Tensor, mask: Tensor) -> Tensor:
    return original * shard_like(mask.to(original.dtype), original)


def _in_eval_mode(parametrizations: nn.Module) -> Callable[[], Tensor]:
    """Return a function that computes a tensor without the side effects of training mode, as in ``spectral_norm``."""

    def value() -> Tensor:
        training = [m for m in parametrizations.modules() if m.training]
        try:
            parametrizations.eval()
            computed: Tensor = parametrizations()
        finally:
            for m in training:
                m.training = True
        return computed

    return value
