"""Which weights to prune: single entries, whole output units, or two of each four, over all tensors or in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like, sum_over_shards
from lightning_reg._tensors.units import Units, unit_norms, unit_size, unit_view
from lightning_reg.pruning.scores import Given, Magnitude, Random, Score, as_shard_of
from lightning_reg.pruning.select import lowest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Scope: TypeAlias = Literal["global", "layer"]
Structure: TypeAlias = Literal["element", "unit", "2:4"]


@torch.no_grad()
def pruning_masks(
    params: Sequence[Tensor],
    sparsity: float,
    *,
    criterion: Literal["magnitude", "random"] | Sequence[Tensor] = "magnitude",
    scope: Scope = "global",
    structure: Structure = "element",
    units: Sequence[Units] | None = None,
    pruned: Sequence[Tensor | None] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    r"""Return masks of what to prune: the entries, units or pairs of lowest score.

    Single entries: exactly :math:`\mathrm{round}(s\,n)` of the n entries of all tensors (scope ``"global"``) or of each, ties
    in order. Units: in each tensor :math:`\mathrm{round}(s\,u)` of its u units, or over all tensors, by the root mean square of
    their entries, as many of the lowest as fit into :math:`\mathrm{round}(s\,n)` entries. Two of each four: along the last
    dimension.

    Args:
        params: Tensors, or shards of such.
        sparsity: The share s of all entries, in [0, 1); what is pruned already counts. For ``"2:4"`` 0 or 0.5.
        criterion: ``"magnitude"``, ``"random"``, or finite scores for each tensor, of which the lowest are pruned.
        scope: ``"global"`` or ``"layer"``.
        structure: ``"element"``, ``"unit"`` or ``"2:4"``.
        units: Where each tensor keeps its units, see :func:`~lightning_reg.functional.units_of`; dimension 0 by default.
        pruned: Masks of what is pruned already and stays so, or ``None``.
        seed: Where random scores come from, ≥ 0.

    Returns:
        For each tensor, ``True`` where it is to be pruned; of a sharded one, for the part that this rank holds.

    Raises:
        ValueError: For scores of the wrong shape or that are not finite, another share than 0 or 0.5 for ``"2:4"``, or a last
            dimension that is not a multiple of 4.

    Example:
        >>> pruning_masks([torch.tensor([[3.0, -1.0], [0.5, 2.0]])], 0.5)
        [tensor([[False,  True],
                [ True, False]])]
    """
    dead = [None] * len(params) if pruned is None else list(pruned)
    where = [Units()] * len(params) if units is None else list(units)
    if criterion == "magnitude":
        scores: list[Score] = [Magnitude(p) for p in params]
    elif criterion == "random":
        scores = [Random(p, (seed + index) % 2**32) for index, p in enumerate(params)]
    else:
        scores = [Given(p, given) for p, given in zip(params, criterion, strict=True)]
    return masks_of_scores(scores, sparsity, scope, structure, where, dead)


def masks_of_scores(
    scores: Sequence[Score],
    sparsity: float,
    scope: Scope,
    structure: Structure,
    units: Sequence[Units],
    pruned: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return masks of what to prune, like :func:`pruning_masks`; never less than is pruned already."""
    if structure == "2:4":
        return [_two_of_four(score, sparsity, dead) for score, dead in zip(scores, pruned, strict=True)]
    if scope == "global":
        return _masks(scores, sparsity, scope, structure, units, pruned)
    each = zip(scores, units, pruned, strict=True)
    return [_masks([score], sparsity, scope, structure, [where], [dead])[0] for score, where, dead in each]


def units_in(tensor: Tensor, units: Units) -> int:
    """Return how many output units a tensor has.

    Example:
        >>> units_in(torch.zeros(3, 4), Units())
        3
    """
    return tensor.numel() // max(unit_size(tensor, units), 1)


def count_true(mask: Tensor | None, tensor: Tensor) -> int:
    """Return how many entries of a tensor a mask means, over all shards."""
    return 0 if mask is None else int(sum_over_shards(mask.count_nonzero(), tensor))


def _masks(
    scores: Sequence[Score],
    sparsity: float,
    scope: Scope,
    structure: Structure,
    units: Sequence[Units],
    pruned: Sequence[Tensor | None],
) -> list[Tensor]:
    if structure == "unit":
        return _unit_masks(scores, sparsity, scope, units, pruned)
    known = sum(count_true(dead, score.tensor) for score, dead in zip(scores, pruned, strict=True))
    count = round(sparsity * sum(score.tensor.numel() for score in scores))
    return lowest(scores, max(count, known), pruned)


def _unit_masks(
    scores: Sequence[Score], sparsity: float, scope: Scope, units: Sequence[Units], pruned: Sequence[Tensor | None]
) -> list[Tensor]:
    """Mark whole units: so many of the one tensor of a layer, or of all tensors as many as fit into the share."""
    if not scores:
        return []
    ranked = [score.of_units(where).float() for score, where in zip(scores, units, strict=True)]
    gone = [_dead_units(score.tensor, where, dead) for score, where, dead in zip(scores, units, pruned, strict=True)]
    lowest_first = [units.masked_fill(dead, -torch.inf).cpu().view(-1) for units, dead in zip(ranked, gone, strict=True)]
    order = torch.cat(lowest_first).argsort(stable=True)
    if scope == "layer":
        count = round(sparsity * len(order))
    else:
        sizes = [torch.full((r.numel(),), s.tensor.numel() // max(r.numel(), 1)) for r, s in zip(ranked, scores, strict=True)]
        room = round(sparsity * sum(score.tensor.numel() for score in scores))
        count = int((torch.cat(sizes)[order].cumsum(0) <= room).count_nonzero())
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: max(count, sum(int(dead.count_nonzero()) for dead in gone))]] = True
    parts = torch.split(chosen, [of_tensor.numel() for of_tensor in ranked])
    flags = [part.view(of_tensor.shape).to(of_tensor.device) for part, of_tensor in zip(parts, ranked, strict=True)]
    return [_spread(flag, score.tensor, where) for flag, score, where in zip(flags, scores, units, strict=True)]


def _dead_units(tensor: Tensor, units: Units, pruned: Tensor | None) -> Tensor:
    """Return which units of the whole tensor have a pruned entry, as scores of units are shaped."""
    mask = torch.zeros(local_tensor(tensor).shape, device=tensor.device) if pruned is None else pruned.float()
    return full_tensor(unit_norms(as_shard_of(mask, tensor), units)) > 0


def _spread(flags: Tensor, tensor: Tensor, units: Units) -> Tensor:
    """Return this rank's part of a mask of units, an entry for each weight."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool, device=flags.device)
    unit_view(mask, units).logical_or_(flags)
    return local_tensor(shard_like(mask, tensor)).contiguous()


def _two_of_four(score: Score, sparsity: float, pruned: Tensor | None) -> Tensor:
    """Mark the two lowest of each four along the last dimension, ties in order."""
    shape = score.tensor.shape
    if sparsity not in (0.0, 0.5):
        raise ValueError(
            f"structure='2:4' prunes two of each four weights: sparsity must be 0.5, or 0 before, got {sparsity!r}"
        )
    if not shape or shape[-1] % 4:
        raise ValueError(f"structure='2:4' needs a last dimension that is a multiple of 4, got shape {tuple(shape)}")
    if not sparsity:
        return torch.zeros_like(score.part, dtype=torch.bool) if pruned is None else pruned
    scores = score.full_tensor()
    if pruned is not None:
        gone = full_tensor(as_shard_of(pruned, score.tensor))
        if int(gone.reshape(-1, 4).sum(dim=-1).amax()) > 2:
            raise ValueError("structure='2:4' keeps two of each four weights, got masks that prune more of some")
        scores = scores.masked_fill(gone, -torch.inf)
    order = scores.reshape(-1, 4).argsort(dim=-1, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, order[:, :2], True)
    return local_tensor(shard_like(mask.view(shape), score.tensor)).contiguous()
