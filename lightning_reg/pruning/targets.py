"""Checks that pruning can reach its sparsity, as early as possible."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy

from lightning_reg.pruning.structures import DEFAULT_MIN_KEPT, divides_into_fours, prunable
from lightning_reg.schedules import Cosine, Cubic, Exponential, Linear, Schedule, SequentialSchedule, Steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lightning_reg._tensors.units import Units
    from lightning_reg.pruning.structures import Scope, Structure
    from lightning_reg.schedules import Value

_ROUNDING = 1e-9


def known_targets(value: Value) -> list[float]:
    """Return the sparsities that are known before the fit, in the order of the schedule; none for a function.

    Example:
        >>> known_targets(Cubic(0.0, 0.9)), known_targets(0.5), known_targets(lambda progress: progress / 2)
        ([0.0, 0.9], [0.5], [])
    """
    if isinstance(value, Linear | Cosine | Cubic | Exponential | Steps):
        return list(value.extremes)
    if isinstance(value, SequentialSchedule):
        return [target for part in value.schedules for target in known_targets(part)]
    return [] if callable(value) else [float(value)]


def check_schedule(what: str, value: Value, structure: Structure) -> None:
    """Check that a schedule never decreases and has only values that the structure can reach.

    Args:
        what: The names of the callback and the argument, for the error message.
        value: The sparsity or its schedule.
        structure: The structure to prune.

    Raises:
        ValueError: If the schedule decreases, or has values other than 0 and 0.5 for ``"2:4"``.
    """
    targets = known_targets(value)
    check_rising(f"{what}={value!r}", targets)
    if structure == "2:4" and (_is_gradual(value) or any(target not in (0.0, 0.5) for target in targets)):
        raise ValueError(
            f"{what}: structure='2:4' prunes two of every four weights, so sparsity must be 0.5, or step from 0 to 0.5 as in "
            f"Steps([0.0, 0.5], at=['3ep']), got {value!r}"
        )


def _is_gradual(value: Value) -> bool:
    """Return whether a schedule has values other than the known ones."""
    if isinstance(value, SequentialSchedule):
        return any(map(_is_gradual, value.schedules))
    return isinstance(value, Schedule) and not isinstance(value, Steps) and len(set(known_targets(value))) > 1


def check_rising(what: str, targets: Sequence[float]) -> None:
    """Check that sparsities never decrease, since pruned weights do not come back.

    Args:
        what: The name of these values, for the error message.
        targets: The sparsities in the order in which they are reached.

    Raises:
        ValueError: If they decrease.
    """
    for earlier, later in pairwise(targets):
        if later < earlier - _ROUNDING:
            raise ValueError(
                f"{what} decreases from {earlier:g} to {later:g}, but pruned weights do not come back: use a schedule that "
                "never decreases"
            )


def check_layers(
    what: str,
    target: float,
    tensors: Mapping[str, Tensor],
    scope: Scope,
    structure: Structure,
    units: Sequence[Units],
    inputs: Sequence[int],
    min_kept: float,
) -> None:
    """Check that a sparsity can be reached, as far as that is known before the fit.

    Args:
        what: The name of the callback, for the error message.
        target: The highest sparsity.
        tensors: The selected parameters by name. Frozen, lazy, and empty ones are not checked.
        scope: ``"global"`` or ``"layer"``.
        structure: The structure to prune.
        units: Where each tensor has its output units.
        inputs: The dimension of each tensor's inputs.
        min_kept: The fraction of its weights that each tensor keeps.

    Raises:
        ValueError: If it cannot be reached. For ``"2:4"``, if a layer cannot be divided into groups of four.
    """
    layers = {
        name: (p, unit, dim)
        for (name, p), unit, dim in zip(tensors.items(), units, inputs, strict=True)
        if p.requires_grad and not is_lazy(p) and p.numel()
    }
    if structure == "2:4":
        _check_groups_of_four(what, layers)
    if target and min_kept != DEFAULT_MIN_KEPT and min_kept > 1.0 - target + _ROUNDING:
        raise ValueError(
            f"{what}: sparsity={target:g} leaves {1.0 - target:.4g} of the weights, fewer than min_kept={min_kept:g} keeps: "
            "lower one of the two"
        )
    if scope == "global" and structure == "element" and layers and len(layers) == len(tensors):
        check_reachable(what, target, min_kept, [p.numel() for p, _, _ in layers.values()])


def check_reachable(what: str, target: float, min_kept: float, sizes: Sequence[int]) -> None:
    """Check that tensors that keep some of their weights have enough others to prune.

    Args:
        what: The name of the callback, for the error message.
        target: The sparsity.
        min_kept: The fraction of its weights that each tensor keeps.
        sizes: The numbers of weights of all tensors.

    Raises:
        ValueError: If they do not.
    """
    most = sum(prunable(size, target, min_kept) for size in sizes)
    if round(target * sum(sizes)) > most:
        raise ValueError(
            f"{what}: sparsity={target:g} cannot be reached, because each tensor keeps at least one weight and the fraction "
            f"min_kept={min_kept:g}, which leaves {most:,} of {sum(sizes):,} weights to prune: lower one of the two"
        )


def _check_groups_of_four(what: str, layers: Mapping[str, tuple[Tensor, Units, int]]) -> None:
    names = [name for name, layer in layers.items() if not divides_into_fours(*layer)]
    if names:
        shapes = ", ".join(f"{name} of shape {tuple(layers[name][0].shape)}" for name in names)
        raise ValueError(
            f"{what}: structure='2:4' needs a number of inputs that is a multiple of 4, got {shapes}: exclude such layers, as "
            f"in {_excluding(names)}"
        )


def _excluding(names: Sequence[str]) -> str:
    return f"params={['weights', *('!' + name for name in names)]}"
