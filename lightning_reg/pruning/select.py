"""An exact selection of the lowest of many scores, without a copy of them: a radix select over chunks and shards.

The order-preserving integer keys of the scores are divided into digits. A histogram of the first digit, summed over chunks,
tensors and ranks, tells the first digit of the threshold; a histogram of the second digit, over the keys that share the first,
tells the second; and so on. Nothing but a chunk and a histogram is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_reg._tensors.shards import sum_over_shards
from lightning_reg.pruning.scores import Given, Score, positions

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 19
_WIDTH = 16  # bits of a digit: two passes over 32 bits
_PRUNED = -(2**31)  # a key below that of every number

Keys = Callable[[], Iterator[tuple[int, "Tensor"]]]
"""Yields chunks of integer keys that may be changed, each with the index of the tensor that it belongs to."""


class _Threshold(NamedTuple):
    """The key of the last entry that is selected, how many keys are smaller, and how many are equal."""

    key: int
    smaller: int
    equal: int


@torch.no_grad()
def smallest_entries(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks of the smallest entries of all tensors together: exactly so many.

    Ties are taken in order: of the tensors, then of the flattened entries of the whole tensor, however it is sharded. Scores
    are compared in float32.

    Args:
        scores: Tensors of finite numbers, or shards of such.
        count: How many entries, from 0 to all of them.

    Returns:
        For each tensor, ``True`` where an entry is among the smallest; of a sharded one, for the part that this rank holds.

    Example:
        >>> smallest_entries([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
    """
    return lowest([Given(tensor, tensor) for tensor in scores], count, [None] * len(scores))


def lowest(scores: Sequence[Score], count: int, pruned: Sequence[Tensor | None]) -> list[Tensor]:
    """Return masks of the lowest scores: exactly so many, what is pruned already first, ties in order.

    Args:
        scores: The scores of each tensor.
        count: How many entries, no fewer than are pruned already.
        pruned: For each tensor, ``True`` where it is pruned already, or ``None``.

    Returns:
        For each tensor, a mask of the part that this rank holds.
    """
    masks = [torch.empty(score.part.shape, dtype=torch.bool, device=score.part.device) for score in scores]
    if not count or not scores:
        return [mask.fill_(False) for mask in masks]
    of_entries = _keys_of_entries(scores, pruned)
    threshold = _find([score.tensor for score in scores], of_entries, 32, count, signed=True)
    ties = count - threshold.smaller
    limit = threshold.key + (ties == threshold.equal)  # with all of the ties, or none of them for now
    at = [0] * len(masks)
    for index, keys in of_entries():
        torch.lt(keys, limit, out=masks[index].view(-1)[at[index] : at[index] + len(keys)])
        at[index] += len(keys)
    if ties < threshold.equal:
        _take_ties_(masks, scores, pruned, threshold.key, ties)
    return masks


def _keys_of_entries(scores: Sequence[Score], pruned: Sequence[Tensor | None]) -> Keys:
    # one buffer for all chunks: memory that is given back and asked for again costs more than the work itself
    buffers = {device: torch.empty(_CHUNK, device=device) for device in {score.part.device for score in scores}}

    def keys() -> Iterator[tuple[int, Tensor]]:
        for index, (score, dead) in enumerate(zip(scores, pruned, strict=True)):
            for begin in range(0, score.flat.numel(), _CHUNK):
                end = min(begin + _CHUNK, score.flat.numel())
                found = score.keys(begin, end, buffers[score.part.device])
                yield index, found if dead is None else found.masked_fill_(dead.view(-1)[begin:end], _PRUNED)

    return keys


def _take_ties_(
    masks: Sequence[Tensor], scores: Sequence[Score], pruned: Sequence[Tensor | None], key: int, count: int
) -> None:
    """Mark the first of the entries that share a key."""
    for mask, score, dead in zip(masks, scores, pruned, strict=True):
        if not count:
            return
        chunks = [keys == key for _, keys in _keys_of_entries([score], [dead])()]
        tied = torch.cat(chunks) if chunks else mask.view(-1)
        total = int(sum_over_shards(tied.count_nonzero(), score.tensor))
        if total > count:
            entries = tied.nonzero().view(-1)
            places = positions(score.tensor, entries)
            last = _find([score.tensor], partial(_once, places), 48, count).key
            tied[entries] = places <= last
        mask.view(-1).logical_or_(tied)
        count -= min(count, total)


def _once(keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield 0, keys.clone()


def _find(tensors: Sequence[Tensor], keys: Keys, bits: int, count: int, *, signed: bool = False) -> _Threshold:
    """Return the ``count``-th smallest of integer keys of some bits, over all chunks and shards; ``count`` ≥ 1."""
    prefix, smaller, equal, shift = 0, 0, 0, bits
    while shift:
        width = min(_WIDTH, shift)
        shift -= width
        lead = -(1 << width >> 1) if signed and shift + width == bits else prefix << width
        whose = None if shift + width == bits else prefix
        histogram = _histogram(tensors, keys, shift, width, lead, whose)
        reached = histogram.cumsum(0)
        digit = int(torch.searchsorted(reached, count - smaller))
        prefix, equal = lead + digit, int(histogram[digit])
        smaller += int(reached[digit]) - equal
    return _Threshold(prefix, smaller, equal)


def _histogram(tensors: Sequence[Tensor], keys: Keys, shift: int, width: int, lead: int, prefix: int | None) -> Tensor:
    """Count by their next digit, over all chunks and shards, the keys that begin with a prefix, or all of them."""
    counts = {
        _sharding(tensor): (torch.zeros(1 << width, dtype=torch.int64, device=tensor.device), tensor) for tensor in tensors
    }
    for index, chunk in keys():
        some = chunk if prefix is None else chunk[chunk.bitwise_right_shift(shift + width) == prefix]  # a few of them
        digits = some.bitwise_right_shift_(shift).sub_(lead)
        counts[_sharding(tensors[index])][0].add_(torch.bincount(digits, minlength=1 << width))
    summed = [sum_over_shards(count, tensor).cpu() for count, tensor in counts.values()]
    return torch.stack(summed).sum(0)


def _sharding(tensor: Tensor) -> tuple[object, ...]:
    """Return what tells tensors apart whose counts are summed over different ranks, or on different devices."""
    placements = getattr(tensor, "placements", ())
    return (tensor.device, getattr(tensor, "device_mesh", None), tuple(placement.is_shard() for placement in placements))
