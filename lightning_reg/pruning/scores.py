"""Scores by which pruning ranks weights. They are computed in chunks, so that no copy of the weights is needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_reg._engine import _lightning
from lightning_reg._engine.ranks import answers_of_all
from lightning_reg._tensors.shards import full_tensor, local_tensor, positions, shard_like, sum_over_shards
from lightning_reg._tensors.units import Units, unit_norms, unit_size, unit_view

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_UINT32 = 0xFFFFFFFF


class Score(ABC):
    """The scores of one tensor. The lowest scores are pruned first.

    Args:
        tensor: The tensor, sharded or not. Chunks are ranges of the flattened part that this rank holds.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.part = local_tensor(tensor.detach())
        self.flat = self.part.reshape(-1)

    @abstractmethod
    def chunk(self, begin: int, end: int) -> Tensor:
        """Return the scores of a range of this rank's part, in float32."""

    @abstractmethod
    def unit_scores(self, units: Units) -> Tensor:
        """Return the score of each output unit of the full tensor, in the shape of ``unit_norms``."""

    def keys(self, begin: int, end: int, buffer: Tensor) -> Tensor:
        """Return the scores of a range as int32 keys in the same order. The result may be the buffer, and may be changed."""
        return order_keys(self.chunk(begin, end))

    def full_tensor(self) -> Tensor:
        """Return the scores of the full tensor, on every rank."""
        scores = self.chunk(0, self.flat.numel()).view(self.part.shape)
        return full_tensor(as_shard_of(scores, self.tensor))


class MagnitudeScores(Score):
    """The magnitude of each entry, and the root mean square of each unit."""

    def chunk(self, begin: int, end: int) -> Tensor:
        """Return |θ|."""
        return self.flat[begin:end].float().abs()

    def keys(self, begin: int, end: int, buffer: Tensor) -> Tensor:
        """Return the bits of |θ|, which are already in order because the sign bit is 0."""
        magnitudes, chunk = buffer[: end - begin], self.flat[begin:end]
        if chunk.dtype == magnitudes.dtype:  # a single pass over the memory
            return torch.abs(chunk, out=magnitudes).view(torch.int32)
        return magnitudes.copy_(chunk).abs_().view(torch.int32)

    def unit_scores(self, units: Units) -> Tensor:
        """Return ‖w_u‖₂ / √|u|, which makes units of different sizes comparable."""
        return full_tensor(unit_norms(self.tensor.detach(), units)).div(math.sqrt(max(unit_size(self.tensor, units), 1)))


class RandomScores(Score):
    """Random numbers that do not depend on how the tensor is sharded.

    A generator would give each shard the same numbers, or draw all numbers on every rank. A hash of the seed and the position
    in the full tensor avoids both.

    Args:
        tensor: The tensor.
        seed: The seed, in [0, 2³²).
    """

    def __init__(self, tensor: Tensor, seed: int) -> None:
        super().__init__(tensor)
        self.seed = seed

    def chunk(self, begin: int, end: int) -> Tensor:
        """Return numbers in [0, 1)."""
        return _hashed_uniform(positions(self.tensor, torch.arange(begin, end, device=self.part.device)), self.seed)

    def unit_scores(self, units: Units) -> Tensor:
        """Return a number in [0, 1) for each unit."""
        norms = unit_norms(torch.empty(self.tensor.shape, device=self.part.device), units)
        return _hashed_uniform(torch.arange(norms.numel(), device=norms.device), self.seed).view(norms.shape)


class GivenScores(Score):
    """Scores that the caller has computed.

    Args:
        tensor: The tensor.
        scores: Finite scores of the same shape, sharded or not.

    Raises:
        ValueError: If the scores have another shape or are not finite.
    """

    def __init__(self, tensor: Tensor, scores: Tensor) -> None:
        super().__init__(tensor)
        if scores.shape != tensor.shape:
            raise ValueError(f"scores of shape {tuple(scores.shape)}, expected {tuple(tensor.shape)}")
        if isinstance(scores, DTensor) and isinstance(tensor, DTensor) and scores.placements != tensor.placements:
            scores = scores.redistribute(placements=tensor.placements)
        if not isinstance(scores, DTensor):
            scores = shard_like(scores, tensor)
        self.scores = local_tensor(scores.detach()).to(self.part.device, torch.float32).reshape(-1)
        nonfinite = int(sum_over_shards(self.scores.isfinite().logical_not_().sum(), tensor))  # every rank raises, or none
        if nonfinite:
            raise ValueError(f"{nonfinite} scores that are infinite or NaN, expected finite scores")

    def chunk(self, begin: int, end: int) -> Tensor:
        """Return the scores."""
        return self.scores[begin:end]

    def unit_scores(self, units: Units) -> Tensor:
        """Return the mean score of each unit."""
        scores = self.full_tensor()
        reduced_shape = unit_norms(torch.empty(scores.shape, device="meta"), units).shape
        view = unit_view(scores, units)
        dims = [dim for dim in range(view.ndim) if reduced_shape[dim] != view.shape[dim]]
        return view.mean(dims, keepdim=True) if dims else view


def scores_over_ranks(trainer: Trainer, tensor: Tensor, scores: Any) -> Tensor:
    """Return a criterion's scores in float32, averaged over all ranks unless they are sharded.

    The ranks compare what their criteria returned before they reduce anything, so if one is wrong, every rank raises an error.

    Args:
        trainer: The trainer, each of whose ranks must call this.
        tensor: The tensor that has the scores, sharded or not.
        scores: What the criterion returned.

    Raises:
        TypeError: If the scores are not a tensor on some rank.
        ValueError: If they have another shape on some rank, or are sharded on some ranks only.
    """
    kinds = answers_of_all(trainer, (isinstance(scores, Tensor), isinstance(scores, DTensor), _wrong_scores(tensor, scores)))
    wrong = {rank: text for rank, (_, _, text) in enumerate(kinds) if text}
    if wrong:
        rank = trainer.global_rank if trainer.global_rank in wrong else min(wrong)
        error = ValueError if kinds[rank][0] else TypeError
        raise error(wrong[rank] if rank == trainer.global_rank else f"{wrong[rank]}, on rank {rank}")
    if len({is_sharded for _, is_sharded, _ in kinds}) > 1:
        raise ValueError("sharded scores on some ranks only")
    if isinstance(scores, DTensor):
        return scores if isinstance(tensor, DTensor) else full_tensor(scores)
    copied = scores.detach().to(torch.float32, copy=True)  # they may be the weights themselves, or of half precision
    return _lightning.mean_over_ranks(trainer, copied)


def _wrong_scores(tensor: Tensor, scores: Any) -> str:
    """Return what is wrong with the type or shape of scores, or an empty string."""
    if not isinstance(scores, Tensor):
        return f"{scores!r:.80} of type {type(scores).__name__}"
    if scores.shape == tensor.shape:
        return ""
    hint = ""
    if isinstance(tensor, DTensor) and scores.shape == local_tensor(tensor).shape:
        hint = " (this rank's part: compute scores from the sharded parameter, not from p.to_local())"
    return f"scores of shape {tuple(scores.shape)}, expected {tuple(tensor.shape)}{hint}"


def order_keys(scores: Tensor) -> Tensor:
    """Return int32 keys in the same order as float32 numbers, with −0.0 equal to 0.0.

    The bits of positive floats are in order. Those of negative floats are in reverse order, so all but the sign are flipped.

    Args:
        scores: float32 numbers of any shape.

    Returns:
        A tensor of the same shape.

    Example:
        >>> order_keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).argsort(stable=True)
        tensor([0, 1, 2, 3])
    """
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def as_shard_of(part: Tensor, tensor: Tensor) -> Tensor:
    """Wrap this rank's part of a tensor that is sharded like another one. If that one is not sharded, return it unchanged."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _hashed_uniform(numbers: Tensor, seed: int) -> Tensor:
    """Hash integers and a seed to uniform numbers in [0, 1), by two rounds of the finalizer of MurmurHash3."""
    mixed = (numbers * 0x9E3779B1 + seed) & _UINT32
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _UINT32
        mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _UINT32
        mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).float() / 2**24
