"""Fixed samples of a dataset, in small batches from the user's own collate function."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_reg.monitors.isolation import SEED

if TYPE_CHECKING:
    from collections.abc import Callable

BATCHES = 20
"""The minimum number of batches in a sample, over all ranks, if it has that many samples: enough for an interval."""


class Sample(Protocol):
    """A fixed sample of a dataset."""

    source: Any
    """The object that holds the samples, with any random generators of its own."""

    def batches(self) -> Iterator[tuple[Any, int]]:
        """Yield this rank's batches, each with its size."""


@dataclass
class Drawn:
    """Samples that were drawn at random from the dataset of a loader.

    Args:
        source: The loader.
        indices: The indices of each batch. If the dataset holds whole batches, the index of each one.
    """

    source: DataLoader[Any]
    indices: list[Any]

    def batches(self) -> Iterator[tuple[Any, int]]:
        """Yield the batches, each with its size."""
        loader = self.source
        holds_batches = loader.batch_sampler is None
        how = {"sampler": self.indices, "batch_size": None} if holds_batches else {"batch_sampler": self.indices}
        own: DataLoader[Any] = DataLoader(
            loader.dataset,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(SEED),
            **how,
        )
        for batch, chosen in zip(own, self.indices, strict=True):
            yield batch, batch_size(batch) if holds_batches else len(chosen)


@dataclass
class Given:
    """The first batches of a loader from the user.

    Args:
        source: The loader.
        samples: The number of samples to take. At least ``BATCHES`` batches are taken, and at most all.
        rank: The index of this process.
        ranks: The number of processes, which take turns.
    """

    source: DataLoader[Any]
    samples: int
    rank: int = 0
    ranks: int = 1

    def batches(self) -> Iterator[tuple[Any, int]]:
        """Yield the batches, each with its size. Every rank gets the same number."""
        batches, taken = iter(self.source), 0
        for done in itertools.count(self.ranks, self.ranks):
            turn = list(itertools.islice(batches, self.ranks))
            if len(turn) < self.ranks:
                return
            yield turn[self.rank], batch_size(turn[self.rank])
            taken += sum(map(batch_size, turn))
            if taken >= self.samples and done >= BATCHES:
                return


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor, or of the batch itself.

    Example:
        >>> batch_size({"image": torch.zeros(8, 3), "label": torch.zeros(8)}), batch_size(["a", "b"])
        (8, 2)
    """
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim)
    first = next(tensors, None)
    if first is not None:
        return len(first)
    return len(batch) if isinstance(batch, Sequence) and not isinstance(batch, str) and batch else 1


def split(share: Sequence[Any], size: int, ranks: int = 1) -> list[list[Any]]:
    """Split one rank's share of a sample into batches.

    Args:
        share: The samples.
        size: The largest size of a batch.
        ranks: The number of ranks, each with a share of the same length.

    Returns:
        At least ``BATCHES`` batches over all ranks, or as many as there are samples.

    Example:
        >>> [len(batch) for batch in split(range(45), size=32)][:3], len(split(range(45), size=32))
        ([2, 2, 2], 23)
    """
    size = max(1, min(size, len(share) * ranks // BATCHES))
    return [list(share[start : start + size]) for start in range(0, len(share), size)]


def draw(population: Sequence[Any], count: int, seed: int = SEED) -> list[Any]:
    """Draw from a population without replacement, with a separate generator. Draw all of it if it is smaller.

    Example:
        >>> sorted(draw(range(4), 10)), len(draw(range(100), 10))
        ([0, 1, 2, 3], 10)
    """
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(seed))
    return [population[i] for i in order[:count].tolist()]


class DrawError(ValueError):
    """Says why no sample can be drawn from a loader."""


def check_drawable(loader: Any) -> DataLoader[Any]:
    """Return a loader if samples can be drawn from its dataset.

    Raises:
        DrawError: If they cannot.
    """
    if isinstance(loader, (Mapping, Sequence)) and len(loader) == 1:
        (only,) = loader.values() if isinstance(loader, Mapping) else loader
        return check_drawable(only)
    if isinstance(loader, (Mapping, list, tuple)):
        raise DrawError(f"there are {len(loader)} loaders")
    if not isinstance(loader, DataLoader):
        raise DrawError(f"the loader is not a torch.utils.data.DataLoader but {_kind(loader)}")
    if isinstance(loader.dataset, IterableDataset):
        raise DrawError(f"{type(loader.dataset).__name__} is an IterableDataset, which does not give single samples by index")
    return loader


def _kind(loader: Any) -> str:
    """Describe the class of a loader. Lightning's combined loaders hold several."""
    name = type(loader).__name__
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


class Population:
    """All samples that a loader can return.

    Args:
        loader: The loader.
        batches: The number of batches in an epoch, to which the trainer may limit it.

    Raises:
        DrawError: If the dataset has no length, or the sampler can be read only once.

    Attributes:
        members: The indices that the dataset accepts.
        is_shared: Whether the population is the same on every rank, so that each rank must take a share of one sample.
    """

    def __init__(self, loader: DataLoader[Any], batches: float = float("inf")) -> None:
        batch_sampler = loader.batch_sampler
        sampler = _innermost(loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None))
        self.is_shared = True
        if isinstance(sampler, SubsetRandomSampler):
            self.members: Sequence[Any] = list(sampler.indices)
        elif isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler)) and _is_plain(batch_sampler):
            self.members = range(_length(loader.dataset))
            if isinstance(sampler, SequentialSampler) and batches != float("inf"):
                self.members = self.members[: int(batches) * (loader.batch_size or 1)]
        else:
            self.is_shared = False
            self.members = _visited(loader.sampler if batch_sampler is None else batch_sampler, loader.dataset)


def _is_plain(batch_sampler: Any) -> bool:
    """Return whether a batch sampler takes everything from its sampler."""
    return batch_sampler is None or type(batch_sampler).__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))


def _innermost(sampler: Any) -> Any:
    """Return the sampler inside one that divides it among ranks."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        raise DrawError(f"the dataset {type(dataset).__name__} has no length") from None


def _visited(sampler: Any, dataset: Any) -> list[Any]:
    """Return the indices that a sampler yields in an epoch, without advancing the sampler itself."""
    try:
        own = copy.deepcopy(sampler, {id(dataset): dataset})
    except Exception:  # it holds something that cannot be copied; its attributes are restored
        if any(isinstance(one, Iterator) for one in (sampler, getattr(sampler, "sampler", None))):
            raise DrawError("its sampler is an iterator, which can be read only once") from None
        own = sampler
    asked: list[Any] = []
    try:
        most = len(own)
    except (TypeError, NotImplementedError):
        most = _length(dataset)
    for wanted in itertools.islice(iter(own), most):
        asked += wanted if isinstance(wanted, (list, tuple)) else [wanted]
    return list(dict.fromkeys(asked))


def sample_of(
    loader: Any,
    samples: int,
    batches: float = float("inf"),
    *,
    rank: int = 0,
    ranks: int = 1,
    least: Callable[[int], int] = int,
) -> Drawn:
    """Draw a fixed sample from the dataset of a loader.

    Args:
        loader: The loader.
        samples: The number of samples. All are taken if there are fewer.
        batches: The number of batches in an epoch.
        rank: The index of this process.
        ranks: The number of processes, which take equal shares.
        least: Returns the minimum of a number over all processes.

    Raises:
        DrawError: If that is not possible, with the reason.
    """
    loader = check_drawable(loader)
    population = Population(loader, batches)
    members, is_shared = population.members, population.is_shared
    if not len(members):
        raise DrawError("it has no samples")
    holds_batches = loader.batch_sampler is None
    if holds_batches:
        samples = max(BATCHES, samples // batch_size(loader.collate_fn(loader.dataset[members[0]])))
    if is_shared:
        drawn = draw(members, samples)
        share = [drawn[i % len(drawn)] for i in range(rank, max(len(drawn) // ranks, 1) * ranks, ranks)]
    else:
        share = draw(members, least(min(max(samples // ranks, 1), len(members))))
    return Drawn(loader, share if holds_batches else split(share, _size(loader), ranks))


def _size(loader: DataLoader[Any]) -> int:
    """Return the batch size of a loader. A custom batch sampler may not reveal it."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else BATCHES
