"""What pruning ranks weights by: scores that are computed chunk by chunk, so that no copy of the weights is needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_reg._tensors.shards import full_tensor, local_tensor, shard_like, sum_over_shards
from lightning_reg._tensors.units import Units, unit_norms, unit_size, unit_view

if TYPE_CHECKING:
    from torch import Tensor

_UINT32 = 0xFFFFFFFF


class Score(ABC):
    """The scores of one tensor, of which the lowest are pruned first.

    Args:
        tensor: The tensor that is scored, sharded or not; chunks are ranges of the flattened part that this rank holds.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.part = local_tensor(tensor.detach())
        self.flat = self.part.reshape(-1)

    @abstractmethod
    def chunk(self, begin: int, end: int) -> Tensor:
        """Return the scores of a range of this rank's part, in float32."""

    @abstractmethod
    def of_units(self, units: Units) -> Tensor:
        """Return a score for each output unit of the full tensor, in the shape of ``unit_norms``."""

    def keys(self, begin: int, end: int, buffer: Tensor) -> Tensor:
        """Return the scores of a range as integers of the same order, which the caller may change, perhaps in a buffer."""
        return order_keys(self.chunk(begin, end))

    def full_tensor(self) -> Tensor:
        """Return all scores of the whole tensor, on every rank."""
        scores = self.chunk(0, self.flat.numel()).view(self.part.shape)
        return full_tensor(as_shard_of(scores, self.tensor))


class Magnitude(Score):
    """The magnitudes of the entries, and the root mean squares of the units."""

    def chunk(self, begin: int, end: int) -> Tensor:
        """Return |θ|."""
        return self.flat[begin:end].float().abs()

    def keys(self, begin: int, end: int, buffer: Tensor) -> Tensor:
        """Return the bits of |θ|, which are in order already."""
        magnitudes, chunk = buffer[: end - begin], self.flat[begin:end]
        if chunk.dtype == magnitudes.dtype:  # in one go
            return torch.abs(chunk, out=magnitudes).view(torch.int32)
        return magnitudes.copy_(chunk).abs_().view(torch.int32)

    def of_units(self, units: Units) -> Tensor:
        """Return ‖w_u‖₂ / √|u|, so that units of different sizes compare."""
        return full_tensor(unit_norms(self.tensor.detach(), units)).div(math.sqrt(max(unit_size(self.tensor, units), 1)))


class Random(Score):
    """Numbers that depend on a seed and on the place in the whole tensor alone: the same however it is sharded.

    Args:
        tensor: The tensor that is scored.
        seed: Where the numbers come from, in [0, 2^32).
    """

    def __init__(self, tensor: Tensor, seed: int) -> None:
        super().__init__(tensor)
        self.seed = seed

    def chunk(self, begin: int, end: int) -> Tensor:
        """Return numbers in [0, 1)."""
        return _hashed(positions(self.tensor, torch.arange(begin, end, device=self.part.device)), self.seed)

    def of_units(self, units: Units) -> Tensor:
        """Return a number for each unit."""
        norms = unit_norms(torch.empty(self.tensor.shape, device=self.part.device), units)
        return _hashed(torch.arange(norms.numel(), device=norms.device), self.seed).view(norms.shape)


class Given(Score):
    """Scores that somebody else has computed.

    Args:
        tensor: The tensor that is scored.
        scores: Finite scores of its shape, sharded as it is or not at all.

    Raises:
        ValueError: For another shape, or scores that are not finite.
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
        wrong = int(sum_over_shards(self.scores.isfinite().logical_not_().sum(), tensor))  # alike on every rank
        if wrong:
            raise ValueError(f"{wrong} scores that are not finite, expected finite ones")

    def chunk(self, begin: int, end: int) -> Tensor:
        """Return the scores."""
        return self.scores[begin:end]

    def of_units(self, units: Units) -> Tensor:
        """Return the mean score of each unit."""
        scores = self.full_tensor()
        kept = unit_norms(torch.empty(scores.shape, device="meta"), units).shape
        view = unit_view(scores, units)
        dims = [dim for dim in range(view.ndim) if kept[dim] != view.shape[dim]]
        return view.mean(dims, keepdim=True) if dims else view


def order_keys(scores: Tensor) -> Tensor:
    """Return integers in the same order as float32 numbers; -0.0 equals 0.0.

    Example:
        >>> order_keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).argsort(stable=True)
        tensor([0, 1, 2, 3])
    """
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the more negative, the larger the bits without the sign


def positions(tensor: Tensor, entries: Tensor) -> Tensor:
    """Return where entries of this rank's flattened part lie in the whole flattened tensor.

    Example:
        >>> positions(torch.zeros(2, 3), torch.arange(2, 5))
        tensor([2, 3, 4])
    """
    if not isinstance(tensor, DTensor):
        return entries
    part = local_tensor(tensor)
    rest, found = entries, torch.zeros_like(entries)
    stride = 1
    for dim in reversed(range(tensor.ndim)):
        rest, place = rest // part.shape[dim], rest % part.shape[dim]
        found += _held(tensor, dim)[place] * stride
        stride *= tensor.shape[dim]
    return found


def as_shard_of(part: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's part of something that is sharded as a tensor is, as such."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _held(tensor: DTensor, dim: int) -> Tensor:
    """Return which indices of a dimension this rank holds."""
    every = torch.arange(tensor.shape[dim], device=tensor.to_local().device)
    mesh = tensor.device_mesh
    replicated = DTensor.from_local(every, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [Shard(0) if placement.is_shard(dim) else Replicate() for placement in tensor.placements]
    return replicated.redistribute(placements=placements).to_local()


def _hashed(numbers: Tensor, seed: int) -> Tensor:
    """Return uniform numbers in [0, 1) that look random, a function of whole numbers (two rounds of MurmurHash3's mixer)."""
    mixed = (numbers * 0x9E3779B1 + seed) & _UINT32
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _UINT32
        mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _UINT32
        mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).float() / 2**24
