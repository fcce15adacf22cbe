"""Norms of the gradients of elementwise penalties, computed for one part of the weights after the other."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.nn import Parameter

    from lightning_reg.monitors.copies import Copies, Norms
    from lightning_reg.monitors.layout import Layout
    from lightning_reg.penalties.base import Penalty
    from lightning_reg.penalties.elementwise import ElementwisePenalty


class _Acting(NamedTuple):
    """A penalty and what it acts on.

    Args:
        penalty: The penalty.
        rows: For each batch, the rows that it acts on, by the sign of its gradient; ``None`` for all rows.
        constant: The index of its constants, if it has any.
        is_in_loss: Whether it is part of the loss.
    """

    penalty: ElementwisePenalty
    rows: list[dict[float, Tensor | None]]
    constant: int | None
    is_in_loss: bool


class Elementwise:
    """Computes for each penalty ‖∇R‖, and at last ‖g‖ of the gradients without the penalties that are part of the loss.

    Args:
        penalties: The penalties.
        params: What each penalty acts on, by the sign of its gradient.
        positions: The position of each parameter, by its ``id``.
        copies: The memory of the parameters.
        in_loss: The penalties that are part of the loss.
    """

    def __init__(
        self,
        penalties: Sequence[ElementwisePenalty],
        params: Sequence[Mapping[float, Sequence[Parameter]]],
        positions: Mapping[int, int],
        copies: Copies,
        in_loss: Sequence[Penalty],
    ) -> None:
        self._layout = copies.layout
        self._acting: list[_Acting] = []
        self.constants: list[list[Tensor]] = []
        for penalty, signed in zip(penalties, params, strict=True):
            indices = {sign: [positions[id(p)] for p in ps] for sign, ps in signed.items()}
            constants = penalty.entry_constants([p for ps in signed.values() for p in ps])
            index = len(self.constants) if constants else None
            self._acting.append(_Acting(penalty, _rows(indices, self._layout), index, penalty in in_loss))
            if constants:
                self.constants.append(_everywhere(dict(zip(chain(*indices.values()), constants, strict=True)), copies.views))

    def of_part(
        self, batch: int, norms: Norms, known: Sequence[Tensor], weights: Tensor, gradients: Tensor, *constants: Tensor
    ) -> list[Tensor]:
        """Return the norms of each row of a part of a batch."""
        found, data = [], gradients
        for penalty, rows_of, index, is_in_loss in self._acting:
            own = torch.zeros_like(known[0])
            operands = [weights] if index is None else [weights, constants[index]]
            for sign, rows in rows_of[batch].items():
                chosen, *constant = operands if rows is None else [operand[rows] for operand in operands]
                term = penalty.entry_gradients(chosen, self._buffer(chosen, "penalty"), *constant)
                if rows is None:
                    own = known[0] if term is weights else norms(term)
                else:
                    own[rows] = norms(term)
                if is_in_loss:
                    data = self._subtract(data, sign * penalty.scale, term, rows, is_first=data is gradients)
            found.append(own)
        return [*found, known[1] if data is gradients else norms(data)]

    def _subtract(self, data: Tensor, factor: float, term: Tensor, rows: Tensor | None, *, is_first: bool) -> Tensor:
        """Return g − λ∇R in a buffer."""
        buffer = self._buffer(data, "data")
        if rows is None:
            return torch.sub(data, term, alpha=factor, out=buffer)
        return (buffer.copy_(data) if is_first else buffer).index_add_(0, rows, term, alpha=-factor)

    def _buffer(self, like: Tensor, purpose: str) -> Tensor:
        return self._layout.buffer(like, like.shape, purpose)


def _everywhere(constants: Mapping[int, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return constants for all tensors, with zeros that take no memory for those that have none.

    Tensors of one dtype, which may be stacked, get constants of one dtype.
    """
    dtypes: dict[torch.dtype, torch.dtype] = {}
    for index, constant in constants.items():
        dtype = like[index].dtype
        dtypes[dtype] = torch.promote_types(constant.dtype, dtypes.get(dtype, constant.dtype))
    zeros = {dtype: torch.zeros((), dtype=dtypes.get(dtype)) for dtype in set(map(attrgetter("dtype"), like))}
    return [
        constants[index].to(dtypes[tensor.dtype]) if index in constants else zeros[tensor.dtype].expand(tensor.shape)
        for index, tensor in enumerate(like)
    ]


def _rows(indices: Mapping[float, Sequence[int]], layout: Layout) -> list[dict[float, Tensor | None]]:
    """Return for each batch the rows of tensors with given indices, or ``None`` if these are all of its rows."""
    found: list[dict[float, Tensor | None]] = [{} for _ in layout.batches]
    for sign, chosen in indices.items():
        wanted = set(chosen)
        for batch, signed in zip(layout.batches, found, strict=True):
            rows = [row for row, index in enumerate(batch) if index in wanted]
            if rows:
                signed[sign] = None if len(rows) == len(batch) else torch.tensor(rows)
    return found
