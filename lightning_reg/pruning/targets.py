"""Which shares pruning can be asked for: what is wrong with one is said as early as it can be known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_reg.pruning.structures import units_in
from lightning_reg.schedules import Cosine, Cubic, Exponential, Linear, Schedule, Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from lightning_reg._engine.plan import Plan
    from lightning_reg._tensors.units import Units
    from lightning_reg.pruning.structures import Scope, Structure
    from lightning_reg.schedules import Value

_ROUNDING = 1e-9


def known_targets(value: Value) -> list[float]:
    """Return the shares that are known before the fit, in their order where there is one; none for a function."""
    if isinstance(value, Linear | Cosine | Cubic | Exponential | Steps):
        return list(value.extremes)
    return [] if callable(value) else [float(value)]


def check_schedule(what: str, value: Value, structure: Structure) -> None:
    """Refuse a schedule that falls, and one that 2:4 cannot follow.

    Raises:
        ValueError: With what came, and what would do.
    """
    targets = known_targets(value)
    check_rising(f"{what}: sparsity={value!r}", targets)
    between = isinstance(value, Schedule) and not isinstance(value, Steps) and len(set(targets)) > 1
    if structure == "2:4" and (between or any(target not in (0.0, 0.5) for target in targets)):
        raise ValueError(
            f"{what}: structure='2:4' prunes two of each four weights, so sparsity must be 0.5, or 0 before as in "
            f"Steps([0.0, 0.5], at=['3ep']), got {value!r}"
        )


def check_rising(what: str, targets: list[float]) -> None:
    """Refuse shares that fall, since a pruned weight does not come back.

    Raises:
        ValueError: With the two shares.
    """
    for earlier, later in pairwise(targets):
        if later < earlier - _ROUNDING:
            raise ValueError(f"{what} falls from {earlier:g} to {later:g}, but pruned weights do not come back: let it rise")


def planned_targets(value: Callable[[float], float], plan: Plan, every_n_epochs: int) -> dict[float, float]:
    """Return the share that each pruning of a fit is to reach, by the batches before it; none where that is not known."""
    if not plan.per_epoch or math.isinf(plan.per_epoch) or math.isinf(plan.total):
        return {}
    epochs = range(every_n_epochs, int(plan.total / plan.per_epoch) + 1, every_n_epochs)
    return {epoch * plan.per_epoch: value(plan.progress(epoch * plan.per_epoch)) for epoch in epochs}


def check_rewinding(what: str, step: int | None, planned: Mapping[float, float], plan: Plan) -> None:
    """Refuse to rewind to a step that comes after the first pruning.

    Raises:
        ValueError: With when that is.
    """
    first = next((batches for batches, target in planned.items() if target), None)
    if first is not None and step and plan.steps(step) > first:
        raise ValueError(
            f"{what}: rewind_to_step={step} lies after the first pruning, which comes after {first:g} batches: prune later, or "
            "rewind to an earlier step"
        )


def schedule_warnings(planned: dict[float, float], final: float, every_n_epochs: int, plan: Plan) -> Iterator[str]:
    """Say what of a plan cannot be meant: a share that no pruning reaches, and pruning that never comes.

    Args:
        planned: The share that each pruning is to reach, by the batches before it.
        final: The share that the schedule ends with.
        every_n_epochs: How often it prunes.
        plan: How long the fit lasts.
    """
    reached = next(reversed(planned.values()), final)
    if reached < final:
        yield (
            f"reaches {reached:.2%} only, not the {final:.2%} with which its schedule ends: it prunes last after "
            f"{max(planned):g} of {plan.total:g} batches; let the schedule end earlier (until=…), or the fit with an epoch in "
            "which it prunes"
        )
    if plan.total < every_n_epochs * plan.per_epoch < math.inf:
        yield (
            f"never prunes: every_n_epochs={every_n_epochs}, but the fit ends before the epoch {every_n_epochs} does: prune "
            "more often, or train longer"
        )


def check_layers(
    what: str, target: float, tensors: Mapping[str, Tensor], scope: Scope, structure: Structure, units: Mapping[str, Units]
) -> None:
    """Refuse a share that would leave nothing of a layer, where that is known beforehand.

    Raises:
        ValueError: With the names of the layers; for 2:4 with those that have no groups of four.
    """
    odd = [name for name, p in tensors.items() if not p.ndim or p.shape[-1] % 4]
    if structure == "2:4" and odd:
        shapes = ", ".join(f"{name} of shape {tuple(tensors[name].shape)}" for name in odd)
        raise ValueError(f"{what}: structure='2:4' needs a last dimension that is a multiple of 4, got {shapes}: leave it out")
    if structure == "2:4" or scope == "global":
        return
    parts = {name: units_in(p, units[name]) if structure == "unit" else p.numel() for name, p in tensors.items()}
    check_not_emptied(what, target, {name: (round(target * count), count) for name, count in parts.items()}, structure)


def check_not_emptied(what: str, target: float, counts: Mapping[str, tuple[int, int]], structure: Structure) -> None:
    """Refuse to prune the whole of a layer.

    Args:
        what: How the message names the callback.
        target: The share that is asked for.
        counts: How many of how many are to be pruned, by name.
        structure: What is counted.

    Raises:
        ValueError: With the names.
    """
    emptied = [name for name, (pruned, total) in counts.items() if total and pruned >= total]
    if emptied:
        left = "unit" if structure == "unit" else "weight"
        raise ValueError(
            f"{what}: sparsity={target:g} would leave no {left} of {', '.join(emptied)}: ask for less, or leave such layers "
            f"out, as in params={['weights', *('!' + name for name in emptied)]}"
        )
