"""Exact selection of the lowest of many scores: a radix select over chunks and shards.

Sorting would need a copy of all scores on one rank. Instead, the scores become integer keys in the same order, and the keys are
divided into digits. A histogram of the first digit, summed over chunks, tensors, and ranks, gives the first digit of the
threshold. A histogram of the second digit over the keys with this first digit gives the second digit, and so on. At any time,
memory holds only one chunk and one histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.shards import divides, positions, sum_over_shards
from lightning_reg.pruning.scores import GivenScores, Score

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_reg._engine.tensor_arguments import Tensors

_CHUNK, _DEVICE_CHUNK = 1 << 19, 1 << 23  # entries, on the CPU and on other devices, where calls cost more
_WIDTH = 16  # bits of a digit: two passes over keys of 32 bits
_POSITION_BITS = 48  # enough for 2.8e14 entries in a tensor
_LOWEST_KEY = -(2**31)  # below the key of every score

Keys = Callable[[], Iterator[tuple[int, "Tensor"]]]
"""Yields the index of a tensor and a chunk of its integer keys, which the caller may change."""


class _Threshold(NamedTuple):
    """The largest key to select, with the number of smaller keys and the number of equal keys."""

    key: int
    smaller: int
    equal: int


@torch.no_grad()
def smallest_entries(scores: Tensors, count: int) -> list[Tensor]:
    """Return masks of exactly ``count`` entries: the smallest of all tensors together.

    Among equal scores, the first entries are selected: in the order of the tensors, then of the flattened full tensor,
    regardless of how it is sharded. Scores are compared in float32.

    Args:
        scores: Tensors of finite numbers, sharded or not.
        count: The number of entries to select, from 0 to the number of all entries.

    Returns:
        A mask for each tensor, ``True`` for the selected entries. The mask of a sharded tensor has the shape of this rank's
        part.

    Raises:
        ValueError: If scores are infinite or NaN.

    Example:
        >>> smallest_entries([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
    """
    scores = tensor_list("smallest_entries: scores", scores)
    return lowest_scores([GivenScores(tensor, tensor) for tensor in scores], count, [None] * len(scores))


def lowest_scores(scores: Sequence[Score], count: int, pruned: Sequence[Tensor | None]) -> list[Tensor]:
    """Return masks of exactly ``count`` entries: those already pruned, and then the lowest scores, with ties in order.

    Args:
        scores: The scores of each tensor.
        count: The number of entries to select, at least as many as are already pruned.
        pruned: A mask for each tensor, ``True`` where it is already pruned, or ``None``.

    Returns:
        A mask for each tensor, of the shape of this rank's part.
    """
    masks = [torch.empty(score.part.shape, dtype=torch.bool, device=score.part.device) for score in scores]
    if not count or not scores:
        return [mask.fill_(False) for mask in masks]
    keys = _entry_keys(scores, pruned)
    threshold = _find_threshold([score.tensor for score in scores], keys, 32, count, signed=True)
    ties = count - threshold.smaller
    limit = threshold.key + (ties == threshold.equal)  # select all ties, or none of them for now
    filled = [0] * len(masks)
    for index, chunk in keys():
        torch.lt(chunk, limit, out=masks[index].view(-1)[filled[index] : filled[index] + len(chunk)])
        filled[index] += len(chunk)
    if ties < threshold.equal:
        _select_ties_(masks, scores, pruned, threshold.key, ties)
    return masks


def _entry_keys(scores: Sequence[Score], pruned: Sequence[Tensor | None]) -> Keys:
    """Return the keys of all entries in chunks; those of pruned entries are the lowest."""
    # One buffer serves all chunks, because allocating memory for each chunk takes longer than the work itself.
    buffers = {device: torch.empty(_chunk(device), device=device) for device in {score.part.device for score in scores}}

    def keys() -> Iterator[tuple[int, Tensor]]:
        for index, (score, mask) in enumerate(zip(scores, pruned, strict=True)):
            buffer = buffers[score.part.device]
            for begin in range(0, score.flat.numel(), len(buffer)):
                end = min(begin + len(buffer), score.flat.numel())
                chunk = score.keys(begin, end, buffer)
                yield index, chunk if mask is None else chunk.masked_fill_(mask.view(-1)[begin:end], _LOWEST_KEY)

    return keys


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _select_ties_(
    masks: Sequence[Tensor], scores: Sequence[Score], pruned: Sequence[Tensor | None], key: int, count: int
) -> None:
    """Select the first ``count`` entries with a key, in addition to those that the masks select."""
    for mask, score, known in zip(masks, scores, pruned, strict=True):
        if not count:
            return
        chunks = [keys == key for _, keys in _entry_keys([score], [known])()]
        tied = torch.cat(chunks) if chunks else mask.view(-1)
        total = int(sum_over_shards(tied.count_nonzero(), score.tensor))
        if total > count:
            entries = tied.nonzero().view(-1)
            indices = positions(score.tensor, entries)
            last = _find_threshold([score.tensor], partial(_single_chunk, indices), _POSITION_BITS, count).key
            tied[entries] = indices <= last
        mask.view(-1).logical_or_(tied)
        count -= min(count, total)


def _single_chunk(keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield 0, keys.clone()


def _find_threshold(tensors: Sequence[Tensor], keys: Keys, bits: int, count: int, *, signed: bool = False) -> _Threshold:
    """Find the ``count``-th smallest key over all chunks and shards, from the first digit to the last.

    Args:
        tensors: The tensors that the keys belong to, which determine the sharding.
        keys: The integer keys.
        bits: The number of bits of a key.
        count: Which key to find, at least 1.
        signed: Whether keys may be negative. Otherwise, all are ≥ 0.
    """
    prefix, smaller, equal, shift = 0, 0, 0, bits
    while shift:
        width = min(_WIDTH, shift)
        shift -= width
        is_first = shift + width == bits
        lowest = -(1 << width >> 1) if signed and is_first else prefix << width  # the lowest prefix that this digit can give
        histogram = _histogram(tensors, keys, shift, width, lowest, None if is_first else prefix)
        cumulative = histogram.cumsum(0)
        digit = int(torch.searchsorted(cumulative, count - smaller))
        prefix, equal = lowest + digit, int(histogram[digit])
        smaller += int(cumulative[digit]) - equal
    return _Threshold(prefix, smaller, equal)


def _histogram(tensors: Sequence[Tensor], keys: Keys, shift: int, width: int, lowest: int, prefix: int | None) -> Tensor:
    """Count the keys with a prefix, or all keys, by their next digit over all chunks and shards."""
    counts = {
        _sharding(tensor): (torch.zeros(1 << width, dtype=torch.int64, device=tensor.device), tensor) for tensor in tensors
    }
    for index, chunk in keys():
        matching = chunk if prefix is None else chunk[chunk.bitwise_right_shift(shift + width) == prefix]
        digits = matching.bitwise_right_shift_(shift).sub_(lowest)
        counts[_sharding(tensors[index])][0].add_(torch.bincount(digits, minlength=1 << width))
    summed = [sum_over_shards(count, tensor).cpu() for count, tensor in counts.values()]
    return torch.stack(summed).sum(0)


def _sharding(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that differs between tensors whose counts are on different devices or summed over different ranks."""
    placements = getattr(tensor, "placements", ())
    return (tensor.device, getattr(tensor, "device_mesh", None), tuple(map(divides, placements)))
