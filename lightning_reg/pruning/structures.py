"""Which weights to prune: single entries, whole output units, or two of every four, over all tensors or within each one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_reg._engine.arguments import Interval, check_choice
from lightning_reg._engine.tensor_arguments import optional_list, tensor_list, units_list
from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like, sum_over_shards
from lightning_reg._tensors.units import Units, input_dim, unit_norms, unit_size, unit_view
from lightning_reg.pruning.scores import GivenScores, MagnitudeScores, RandomScores, Score, as_shard_of
from lightning_reg.pruning.select import lowest_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg._engine.tensor_arguments import Tensors

Scope: TypeAlias = Literal["global", "layer"]
Structure: TypeAlias = Literal["element", "unit", "2:4"]

DEFAULT_MIN_KEPT = 0.01
MIN_KEPT = Interval(0.0, 1.0, open_high=True)
_ROUNDING = 1e-9


class Limited(NamedTuple):
    """Masks of the weights to prune, and the tensors that kept weights because of their limits.

    Args:
        masks: A mask for each tensor.
        protected: The indices of the tensors that reached their limits.
    """

    masks: list[Tensor]
    protected: set[int]


@torch.no_grad()
def pruning_masks(
    params: Tensors,
    sparsity: float,
    *,
    criterion: Literal["magnitude", "random"] | Tensors = "magnitude",
    scope: Scope = "global",
    structure: Structure = "element",
    units: Units | Sequence[Units] | None = None,
    pruned: Tensor | Sequence[Tensor | None] | None = None,
    min_kept: float = 0.0,
    seed: int = 0,
) -> list[Tensor]:
    """Return masks of the weights to prune: those with the lowest scores, for a sparsity s of n entries.

    Single entries: exactly round(s·n) entries of all tensors together, or of each tensor, with ties in order. Units: round(s·u)
    of the u units of each tensor. With scope ``"global"``, units of all tensors are compared by the root mean square of their
    entries, and as many are pruned as round(s·n) entries allow. ``"2:4"``: two of every four entries along the inputs. These
    are in dimension 1, or, if the output units are not in dimension 0, in the dimension before them.

    Args:
        params: Tensors, sharded or not.
        sparsity: The fraction s of all entries, in [0, 1), including those already pruned. For ``"2:4"``, 0 or 0.5.
        criterion: ``"magnitude"``, ``"random"``, or a tensor of finite scores for each tensor. The lowest scores are pruned.
        scope: ``"global"`` to prune a fraction of all tensors together, ``"layer"`` to prune the same fraction of each tensor.
        structure: ``"element"``, ``"unit"``, or ``"2:4"``.
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.
        pruned: Masks of the entries that are already pruned and stay pruned, or ``None``.
        min_kept: The fraction of its entries, or units, that each tensor keeps, in [0, 1), and at least one. With scope
            ``"global"``, more of the other tensors is pruned instead, as far as they have enough. With 0, a tensor may lose
            all. Has no effect on ``"2:4"``.
        seed: The seed of random scores, ≥ 0.

    Returns:
        A mask for each tensor, ``True`` where it is to be pruned. The mask of a sharded tensor has the shape of this rank's
        part.

    Raises:
        ValueError: If scores have the wrong shape or are not finite, or ``min_kept`` is out of range. For ``"2:4"``, if the
            sparsity is neither 0 nor 0.5, or a number of inputs is not a multiple of 4.

    Example:
        >>> pruning_masks([torch.tensor([[3.0, -1.0], [0.5, 2.0]])], 0.5)
        [tensor([[False,  True],
                [ True, False]])]
    """
    params = tensor_list("pruning_masks: params", params)
    check_choice("pruning_masks: scope", scope, ("global", "layer"))
    check_choice("pruning_masks: structure", structure, ("element", "unit", "2:4"))
    known = optional_list("pruning_masks: pruned", pruned, Tensor, len(params))
    unit_dims = units_list("pruning_masks", units, params)
    if isinstance(criterion, str):
        check_choice("pruning_masks: criterion", criterion, ("magnitude", "random"), "a tensor of scores for each tensor")
    if criterion == "magnitude":
        scores: list[Score] = [MagnitudeScores(p) for p in params]
    elif criterion == "random":
        scores = [RandomScores(p, (seed + index) % 2**32) for index, p in enumerate(params)]
    else:
        given = tensor_list("pruning_masks: criterion", criterion, len(params))
        scores = [GivenScores(p, score) for p, score in zip(params, given, strict=True)]
    inputs = [input_dim(p, unit) for p, unit in zip(params, unit_dims, strict=True)]
    MIN_KEPT.check("pruning_masks: min_kept", min_kept)
    limits = [p.numel() for p in params] if not min_kept else most_prunable(params, unit_dims, structure, sparsity, min_kept)
    return masks_of_scores(scores, sparsity, scope, structure, unit_dims, inputs, known, limits).masks


def masks_of_scores(
    scores: Sequence[Score],
    sparsity: float,
    scope: Scope,
    structure: Structure,
    units: Sequence[Units],
    inputs: Sequence[int],
    pruned: Sequence[Tensor | None],
    limits: Sequence[int],
) -> Limited:
    """Return masks of the weights to prune, like ``pruning_masks``. Pruned weights stay pruned, regardless of the sparsity.

    No tensor loses more weights, or units, than its limit. For single weights over all tensors, the others make up for it, so
    the total is exact.
    """
    if structure == "2:4":
        grouped = zip(scores, units, inputs, pruned, strict=True)
        return Limited([_two_of_four_mask(score, sparsity, unit, dim, known) for score, unit, dim, known in grouped], set())
    if scope == "global":
        return _masks(scores, sparsity, scope, structure, units, pruned, limits)
    tensors = zip(scores, units, pruned, limits, strict=True)
    results = [_masks([score], sparsity, scope, structure, [unit], [known], [limit]) for score, unit, known, limit in tensors]
    return Limited([masks[0] for masks, _ in results], {i for i, (_, protected) in enumerate(results) if protected})


def prunable(count: int, sparsity: float, min_kept: float) -> int:
    """Return how many of a tensor's weights, or units, may be pruned. At least one stays.

    Args:
        count: The number of weights or units.
        sparsity: The target. It limits the default of ``min_kept``.
        min_kept: The fraction that stays.

    Example:
        >>> prunable(1000, 0.9, 0.01), prunable(1000, 0.999, 0.01), prunable(1000, 0.9, 0.05), prunable(10, 0.9, 0.0)
        (990, 999, 950, 9)
    """
    kept = math.ceil(min_kept * count - _ROUNDING)
    if min_kept == DEFAULT_MIN_KEPT:
        kept = min(kept, math.floor((1.0 - sparsity) * count + _ROUNDING))
    return max(count - max(kept, 1), 0)


def most_prunable(
    tensors: Sequence[Tensor], units: Sequence[Units], structure: Structure, sparsity: float, min_kept: float
) -> list[int]:
    """Return how many weights, or units, of each tensor may be pruned. See ``prunable``."""
    sizes = [count_units(p, u) if structure == "unit" else p.numel() for p, u in zip(tensors, units, strict=True)]
    return [prunable(size, sparsity, min_kept) for size in sizes]


def count_units(tensor: Tensor, units: Units) -> int:
    """Return the number of output units of a tensor.

    Example:
        >>> count_units(torch.zeros(3, 4), Units())
        3
    """
    return tensor.numel() // max(unit_size(tensor, units), 1)


def count_true(mask: Tensor | None, tensor: Tensor) -> int:
    """Return the number of entries that a mask of a tensor selects, over all shards; 0 without a mask."""
    return 0 if mask is None else int(sum_over_shards(mask.count_nonzero(), tensor))


def _masks(
    scores: Sequence[Score],
    sparsity: float,
    scope: Scope,
    structure: Structure,
    units: Sequence[Units],
    pruned: Sequence[Tensor | None],
    limits: Sequence[int],
) -> Limited:
    """Return masks for tensors that are pruned together."""
    if structure == "unit":
        return _unit_masks(scores, sparsity, scope, units, pruned, limits)
    already_pruned = [count_true(known, score.tensor) for score, known in zip(scores, pruned, strict=True)]
    count = round(sparsity * sum(score.tensor.numel() for score in scores))
    return _limited_masks(scores, max(count, sum(already_pruned)), pruned, list(map(max, limits, already_pruned)))


def _limited_masks(scores: Sequence[Score], count: int, pruned: Sequence[Tensor | None], limits: Sequence[int]) -> Limited:
    """Return masks of ``count`` entries, or as many as the limits allow: the lowest scores of all tensors below their limits.

    A tensor above its limit is fixed at its limit, and the others make up for it. Their numbers can only grow, so a fixed
    tensor stays fixed.
    """
    masks: dict[int, Tensor] = {}
    free = list(range(len(scores)))
    while free:
        chosen = lowest_scores([scores[i] for i in free], count, [pruned[i] for i in free])
        above = {i for i, mask in zip(free, chosen, strict=True) if count_true(mask, scores[i].tensor) > limits[i]}
        if not above:
            masks |= zip(free, chosen, strict=True)
            break
        masks |= {i: lowest_scores([scores[i]], limits[i], [pruned[i]])[0] for i in sorted(above)}
        free = [i for i in free if i not in above]
        count = min(count - sum(limits[i] for i in above), sum(scores[i].tensor.numel() for i in free))
    return Limited([masks[i] for i in range(len(scores))], set(range(len(scores))) - set(free))


def _unit_masks(
    scores: Sequence[Score],
    sparsity: float,
    scope: Scope,
    units: Sequence[Units],
    pruned: Sequence[Tensor | None],
    limits: Sequence[int],
) -> Limited:
    """Return masks of whole units: a fraction of the units of a layer, or as many of all units as the sparsity allows."""
    if not scores:
        return Limited([], set())
    tensors = [score.tensor for score in scores]
    unit_scores = [score.unit_scores(unit).float() for score, unit in zip(scores, units, strict=True)]
    known = list(map(_pruned_units, tensors, units, pruned))
    ranked = [s.masked_fill(mask, -torch.inf).cpu().view(-1) for s, mask in zip(unit_scores, known, strict=True)]
    sizes = torch.cat([torch.full((len(r),), t.numel() // max(len(r), 1)) for r, t in zip(ranked, tensors, strict=True)])
    already_pruned = [int(mask.count_nonzero()) for mask in known]
    ranks = [r.argsort(stable=True).argsort() for r in ranked]
    allowed = torch.cat([rank < max(pair) for rank, *pair in zip(ranks, limits, already_pruned, strict=True)])
    budget = round(sparsity * (len(sizes) if scope == "layer" else int(sizes.sum())))
    costs = torch.ones_like(sizes) if scope == "layer" else sizes
    order = torch.cat(ranked).argsort(stable=True)
    wanted = order[costs[order].cumsum(0) <= budget]
    order = order[allowed[order]]
    count = int((costs[order].cumsum(0) <= budget).count_nonzero())
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[: max(count, sum(already_pruned))]] = True
    owner = torch.cat([torch.full((len(r),), index) for index, r in enumerate(ranked)])
    protected = set(owner[wanted[~allowed[wanted]]].tolist())
    parts = torch.split(chosen, [len(r) for r in ranked])
    flags = [part.view(s.shape).to(s.device) for part, s in zip(parts, unit_scores, strict=True)]
    masks = map(_entry_mask, flags, tensors, units)
    return Limited([mask if old is None else mask | old for mask, old in zip(masks, pruned, strict=True)], protected)


def _pruned_units(tensor: Tensor, units: Units, pruned: Tensor | None) -> Tensor:
    """Return which units of the full tensor are entirely pruned, in the shape of ``unit_norms``."""
    kept = torch.ones(local_tensor(tensor).shape, device=tensor.device) if pruned is None else pruned.logical_not().float()
    return full_tensor(unit_norms(as_shard_of(kept, tensor), units)) == 0


def _entry_mask(flags: Tensor, tensor: Tensor, units: Units) -> Tensor:
    """Expand a flag for each unit into a mask of this rank's entries."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool, device=flags.device)
    unit_view(mask, units).logical_or_(flags)
    return local_tensor(shard_like(mask, tensor)).contiguous()


def divides_into_fours(tensor: Tensor, units: Units, inputs: int) -> bool:
    """Return whether the inputs of a layer, or of each group of its channels, can be divided into groups of four.

    Example:
        >>> divides_into_fours(torch.zeros(3, 8), Units(), 1), divides_into_fours(torch.zeros(3, 8), Units(1), 0)
        (True, False)
    """
    return tensor.ndim > inputs and tensor.shape[inputs] % (4 * (units.groups if inputs == 0 else 1)) == 0


def _two_of_four_mask(score: Score, sparsity: float, units: Units, inputs: int, pruned: Tensor | None) -> Tensor:
    """Return a mask of the two lowest of every four entries along the inputs, with ties in order."""
    tensor = score.tensor
    if sparsity not in (0.0, 0.5):
        raise ValueError(f"structure='2:4' prunes two of every four weights: sparsity must be 0 or 0.5, got {sparsity!r}")
    if not divides_into_fours(tensor, units, inputs):
        raise ValueError(
            f"structure='2:4' needs a number of inputs that is a multiple of 4, got shape {tuple(tensor.shape)} with inputs in "
            f"dimension {inputs}"
        )
    if not sparsity:
        return torch.zeros_like(score.part, dtype=torch.bool) if pruned is None else pruned
    scores = score.full_tensor()
    if pruned is not None:
        scores = scores.masked_fill(full_tensor(as_shard_of(pruned, tensor)), -torch.inf)
    order = _fours(scores, inputs).argsort(dim=-1, stable=True)
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(-1, order[..., :2], True)
    mask = local_tensor(shard_like(chosen.flatten(-2).movedim(-1, inputs), tensor)).contiguous()
    return mask if pruned is None else mask | pruned  # there may be three or four of four


def _fours(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor with every four entries along a dimension in a last dimension of size 4."""
    moved = tensor.movedim(dim, -1)
    return moved.reshape(*moved.shape[:-1], moved.shape[-1] // 4, 4)
