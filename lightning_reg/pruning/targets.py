"""Checks of the sparsity that pruning will reach, as early as it is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy

from lightning_reg.pruning.structures import DEFAULT_MIN_KEPT, divides_into_fours, prunable
from lightning_reg.schedules import Cosine, Cubic, Exponential, Linear, Schedule, SequentialSchedule, Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lightning_reg._engine.clock import Clock, Moment
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
    """Check that a schedule never decreases, and that it has only values that the structure can reach.

    Args:
        what: The name of the callback, for the error message.
        value: The sparsity or its schedule.
        structure: The structure to prune.

    Raises:
        ValueError: If the schedule falls, or has values other than 0 and 0.5 for ``"2:4"``.
    """
    targets = known_targets(value)
    check_rising(f"{what}: sparsity={value!r}", targets)
    if structure == "2:4" and (_is_gradual(value) or any(target not in (0.0, 0.5) for target in targets)):
        raise ValueError(
            f"{what}: structure='2:4' prunes two of every four weights, so sparsity must be 0.5, or step from 0 to 0.5 as in "
            f"Steps([0.0, 0.5], at=['3ep']), got {value!r}"
        )


def _is_gradual(value: Value) -> bool:
    """Return whether a schedule has more values than those that are known."""
    if isinstance(value, SequentialSchedule):
        return any(map(_is_gradual, value.schedules))
    return isinstance(value, Schedule) and not isinstance(value, Steps) and len(set(known_targets(value))) > 1


def check_rising(what: str, targets: Sequence[float]) -> None:
    """Check that sparsities never decrease, since pruned weights do not come back.

    Args:
        what: What has these values, for the error message.
        targets: The sparsities in the order in which they are reached.

    Raises:
        ValueError: If they decrease.
    """
    for earlier, later in pairwise(targets):
        if later < earlier - _ROUNDING:
            raise ValueError(
                f"{what} falls from {earlier:g} to {later:g}, but pruned weights do not come back: use a schedule that "
                "never decreases"
            )


def planned_targets(schedule: Callable[[Moment], float], clock: Clock, every_n_epochs: int) -> dict[float, float]:
    """Return the sparsity of each pruning that a fit still has.

    Args:
        schedule: The sparsity as a function of the moment.
        clock: The clock of the fit.
        every_n_epochs: Pruning happens at the end of each n-th epoch.

    Returns:
        Sparsities, keyed by the number of batches before the pruning; empty if the length of the fit is unknown.
    """
    plan = clock.plan
    if not plan.per_epoch or math.isinf(plan.total):
        return {}
    done = int(plan.start.epochs) // every_n_epochs
    epochs = range((done + 1) * every_n_epochs, int(plan.end.epochs + _ROUNDING) + 1, every_n_epochs)
    points = [plan.point(f"{epoch}ep") for epoch in epochs]
    return {point.batches: schedule(clock.moment(point)) for point in points}


def check_rewinding(what: str, step: int | None, planned: Mapping[float, float], clock: Clock) -> None:
    """Check that the step to rewind to is not after the first pruning.

    Args:
        what: The name of the callback, for the error message.
        step: The step to rewind to, or ``None`` for no check.
        planned: What ``planned_targets`` returned.
        clock: The clock of the fit.

    Raises:
        ValueError: If it is.
    """
    first = next((batches for batches, target in planned.items() if target), None)
    if first is not None and step and clock.plan.point(f"{step}st").batches > first:
        raise ValueError(late_rewinding_message(what, step, f"{first:g} batches"))


def late_rewinding_message(what: str, step: int, first: str) -> str:
    """Return the error message for a step to rewind to that is after the first pruning."""
    return (
        f"{what}: rewind_to_step={step} is after the first pruning, which happens after {first}: prune later, or rewind to an "
        "earlier step"
    )


def schedule_warnings(planned: Mapping[float, float], final: float, every_n_epochs: int, clock: Clock) -> Iterator[str]:
    """Yield warnings about prunings that the fit is too short for.

    Args:
        planned: What ``planned_targets`` returned.
        final: The sparsity at the end of the schedule.
        every_n_epochs: Pruning happens at the end of each n-th epoch.
        clock: The clock of the fit.
    """
    last = max(planned, default=None)
    if last is not None and planned[last] < final:
        yield (
            f"reaches a sparsity of only {planned[last]:.2%}, not the final {final:.2%} of its schedule: the last pruning is "
            f"after {last:g} of {clock.plan.total:g} batches; end the schedule earlier (until=…), or end the fit with an epoch "
            "in which it prunes"
        )
    if math.isfinite(clock.plan.total) and clock.plan.end.epochs < every_n_epochs - _ROUNDING:
        yield (
            f"never prunes: every_n_epochs={every_n_epochs}, but the fit ends before the end of epoch {every_n_epochs}; prune "
            "more often, or train longer"
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
        ValueError: If they have not.
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
