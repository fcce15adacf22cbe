"""Copies of weights that are compared with later weights: how far a step moves each tensor, and what a penalty adds to it."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from lightning_reg.monitors.layout import Layout, is_list, is_stack, squares_of
from lightning_reg.monitors.sums import joined, list_norms, list_zeros, parts, row_norms, row_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from torch import Tensor

    Norms = Callable[[Any], Tensor]
    """Returns the norm of each row of a part of a batch: of each of several stacked tensors, or of pieces of one tensor."""


class PartNorms(Protocol):
    """Computes norms of what follows from tensors and gradients, part by part."""

    @property
    def constants(self) -> Sequence[Sequence[Tensor]]:
        """Lists of other tensors, each with one for each tensor and of its shape."""

    def of_part(
        self, batch: int, norms: Norms, known: Sequence[Tensor], weights: Tensor, gradients: Tensor, *constants: Tensor
    ) -> Sequence[Tensor]:
        """Return the norms of each row of a part of a batch.

        Args:
            batch: The index of the batch.
            norms: Returns the norm of each row.
            known: The norms of the weights and the gradients.
            weights: The weights θ: one row for each tensor, or rows of one tensor.
            gradients: The gradients g.
            constants: The matching part of each list of constants.
        """


class Copies:
    """Copies of tensors, to compare with later values. They reuse memory, because new memory would cost more than the rest.

    Args:
        tensors: One or more dense tensors of the shapes, dtypes, and devices to copy.
        kinds: Something hashable for each tensor. Those of different kinds are in different batches.
    """

    def __init__(self, tensors: Sequence[Tensor], kinds: Sequence[Hashable] | None = None) -> None:
        self.layout = Layout(tensors, kinds)
        self._kinds = kinds
        self._held = [_empty_like(batch) for batch in self.layout.split(tensors)]
        views = iter([view for held in self._held for view in held.views])
        by_index = {index: next(views) for batch in self.layout.batches for index in batch}
        self.views = [by_index[index] for index in range(len(tensors))]

    def more(self) -> Copies:
        """Return further memory for copies of the same tensors."""
        return Copies(self.views, self._kinds)

    def take(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, more: PartNorms | None = None
    ) -> Tensor:
        """Copy tensors, and return rows with Σ|x|² of each and, if gradients are given, Σ|g|², and further sums of squares.

        Args:
            tensors: The tensors to copy.
            gradients: A tensor of the same shape and dtype for each.
            more: Computes norms of what follows from tensors and gradients, part by part, while these are in the cache.

        Example:
            >>> Copies([torch.zeros(2)]).take([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 2.0])])
            tensor([[25.],
                    [ 5.]])
        """
        others = [*([gradients] if gradients else []), *(more.constants if more else [])]
        batches = zip(self._held, self.layout.split(tensors), *map(self.layout.split, others), strict=True)
        found = []
        for index, (held, batch, *matching) in enumerate(batches):
            of_parts = []
            for norms, *values in self._taken(held, batch, matching):
                known = [norms(one) for one in values[: 2 if gradients else 1]]
                of_parts.append([*known, *(more.of_part(index, norms, known, *values) if more else [])])
            found.append(held.squares(of_parts))
        return self.layout.join(found)

    def _taken(self, held: _Held, batch: tuple[Tensor, ...], others: list[tuple[Tensor, ...]]) -> Iterator[tuple[Any, ...]]:
        """Copy a batch, and yield for each part how to compute norms, the copies, and the matching parts of other tensors."""
        if held.stacked is not None:
            torch.stack(batch, out=held.stacked)
            yield row_norms, held.stacked, *(self.layout.stack(other, index) for index, other in enumerate(others))
        elif held.entries is not None:
            torch._foreach_copy_(held.views, batch)
            yield list_norms, held.views, *others
        else:
            for copy, weights, *more in parts(held.views[0], batch[0], *(other[0] for other in others)):
                yield row_norms, copy.copy_(weights), *more

    def fill(self, batches: Sequence[list[int]], add: Callable[[list[int]], None], *, at_once: bool) -> Tensor:
        """Set the copies to zero, let a function add to ``views``, and return Σ|x|² of each.

        Args:
            batches: For each batch, the indices of the views to add to.
            add: Adds to the views with given indices.
            at_once: Whether to call ``add`` once for all views, in their order, rather than for each batch while it is in the
                cache.
        """
        if at_once:
            torch._foreach_zero_(self.views)
            add(sorted(chain(*batches)))
            return self.layout.join([squares_of(held.views, held.stacked) for held in self._held])
        found = []
        for held, batch in zip(self._held, batches, strict=True):
            torch._foreach_zero_(held.views if held.stacked is None else [held.stacked])
            if batch:
                add(batch)
            found.append(squares_of(held.views, held.stacked))
        return self.layout.join(found)

    def distances(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Σ|x − copy|² of each tensor. The copies may be overwritten."""
        batches = zip(self._held, self.layout.split(tensors), strict=True)
        changed = [(held, [[norms(change)] for norms, _, change, _ in self._changed(held, batch)]) for held, batch in batches]
        return self.layout.join([held.squares(of_parts) for held, of_parts in changed])[0]

    def changes(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return rows with Σ|x|², Σ|x − copy|², and the number of zeros of each tensor. The copies may be overwritten.

        Example:
            >>> copies = Copies([torch.zeros(2)])
            >>> _ = copies.take([torch.tensor([1.0, 2.0])])
            >>> copies.changes([torch.tensor([1.0, 0.0])])
            tensor([[1.],
                    [4.],
                    [1.]])
        """
        found = []
        for held, batch in zip(self._held, self.layout.split(tensors), strict=True):
            of_parts, counts = [], []
            for norms, new, change, zeros in self._changed(held, batch):
                of_parts.append([norms(new), norms(change)])
                counts.append(zeros(new, change))
            squares = held.squares(of_parts)
            found.append(torch.cat([squares, held.sums([joined(counts)]).to(squares)]))
        return self.layout.join(found)

    def _changed(
        self, held: _Held, batch: tuple[Tensor, ...]
    ) -> Iterator[tuple[Norms, Any, Any, Callable[[Any, Any], Tensor]]]:
        """Yield each part of a batch with its difference from the copies, and how to compute norms and count zeros."""
        entries = held.entries
        if held.stacked is not None:
            rows = self.layout.stack(batch)
            yield row_norms, rows, held.stacked.sub_(rows), row_zeros
        elif entries is not None:
            torch._foreach_sub_(held.views, batch)
            yield list_norms, batch, held.views, lambda tensors, _: list_zeros(tensors, entries)
        else:
            change = None  # a buffer, which stays in the cache, other than the copies
            for copy, new in parts(held.views[0], batch[0]):
                if change is None or change.shape != new.shape:
                    change = self.layout.buffer(new, new.shape, "change")
                yield row_norms, new, torch.sub(copy, new, out=change), row_zeros


class _Held(NamedTuple):
    """The copies of a batch. Small ones are stacked in one tensor."""

    views: tuple[Tensor, ...]
    stacked: Tensor | None
    entries: Tensor | None = None
    """The number of entries of each, if they are a list."""

    def squares(self, norms: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return rows of squared norms of each tensor, from the norms of the rows of each part."""
        return self.sums([joined(column).square() for column in zip(*norms, strict=True)])

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Return rows of sums for each tensor, from values for each row of all parts."""
        sums = torch.stack(list(values))
        return sums.sum(1, keepdim=True) if self.stacked is None and self.entries is None else sums


def _empty_like(batch: tuple[Tensor, ...]) -> _Held:
    first = batch[0]
    if is_stack(batch):
        stacked = torch.empty((len(batch), *first.shape), dtype=first.dtype, device=first.device)
        return _Held(stacked.unbind(), stacked)
    entries = torch.tensor([tensor.numel() for tensor in batch], device=first.device) if is_list(batch) else None
    return _Held(tuple(torch.empty_like(tensor) for tensor in batch), None, entries)
