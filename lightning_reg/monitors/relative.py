"""How strong penalties are: the norm of the gradient of each, relative to that of the data's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from lightning_reg._engine.steps import by_sign
from lightning_reg._tensors.gradients import are_dense, summed_entries
from lightning_reg._tensors.reductions import is_cpu
from lightning_reg._tensors.shards import is_sharded, local_tensor, local_tensors, sharding, sum_each_over_shards
from lightning_reg.monitors.elementwise import Elementwise
from lightning_reg.monitors.layout import Layout
from lightning_reg.penalties.elementwise import is_elementwise

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg.monitors.copies import Copies
    from lightning_reg.penalties.base import Penalty
    from lightning_reg.penalties.elementwise import ElementwisePenalty


class Before(NamedTuple):
    """What is known before the optimizer steps.

    Args:
        weights: Σ|θ|² of this rank's part of each parameter.
        gradients: Σ|g|² of this rank's part of each gradient.
        relative_norms: For each penalty, the norm of its gradient, relative to that of the data's gradient.
    """

    weights: Tensor
    gradients: Tensor
    relative_norms: dict[str, Tensor]


class Shares:
    """Measures parameters, their gradients, and how strong penalties are, without changing anything.

    Elementwise penalties are measured while the parameters are copied, and are in the cache. Others write their gradients to
    the memory of the copies before that.

    Args:
        params: The parameters of an optimizer, including all that a penalty acts on.
        copies: Memory for this rank's parts of the parameters.
    """

    def __init__(self, params: Sequence[Parameter], copies: Copies) -> None:
        self.params, self.copies = params, copies
        self._is_on_cpu = all(map(is_cpu, copies.views))
        self._positions = {id(p): position for position, p in enumerate(params)}
        self._picked: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[tuple[int, ...], list[list[int]]] = {}

    def measure(self, penalties: Mapping[Penalty, list[Parameter]], optimizer: Optimizer, in_loss: Sequence[Penalty]) -> Before:
        """Measure, and copy the parameters.

        Args:
            penalties: The penalties of a fit, with the parameters of the optimizer that each acts on.
            optimizer: The optimizer that is about to step.
            in_loss: The penalties that are part of the loss, and so of the gradients.
        """
        penalized = {one: params for one, params in penalties.items() if one.scale and params}
        gradients, tensors = self._dense_gradients(), local_tensors(self.params)
        elementwise = self._elementwise(penalized, in_loss) if gradients is not None else []
        others = {one: params for one, params in penalized.items() if one not in elementwise}
        found, data = self._measure_whole(others, gradients, optimizer, in_loss)
        if gradients is None:
            weights, squares = self.copies.take(tensors)[0], _squares_of_gradients(self.params)
        elif not elementwise:
            weights, squares = self.copies.take(tensors, gradients)
        else:
            signed = [by_sign(optimizer, penalized[one]) for one in elementwise]
            sums = Elementwise(elementwise, signed, self._positions, self.copies, in_loss)
            weights, squares, *own, rest = self.copies.take(tensors, gradients, sums)
            found |= {one: one.scale**2 * squares for one, squares in zip(elementwise, own, strict=True)}
            data = rest if data is None else data
        return Before(weights, squares, self._relative_norms(penalized, found, squares if data is None else data))

    def _relative_norms(
        self, penalized: Mapping[Penalty, Sequence[Parameter]], found: Mapping[Penalty, Tensor], data: Tensor
    ) -> dict[str, Tensor]:
        """Return ‖λ∇R‖ / ‖g‖ over what each penalty acts on, from the squares of each tensor."""
        if not penalized:
            return {}
        sums = sum_each_over_shards(torch.stack([data, *(found[one].to(data) for one in penalized)]), self.params)
        totals = sums[1:].sum(1) / torch.stack([self._pick(sums[0], params).sum() for params in penalized.values()])
        return dict(zip([one.name for one in penalized], totals.sqrt(), strict=True))

    def _elementwise(self, penalties: Iterable[Penalty], in_loss: Sequence[Penalty]) -> list[ElementwisePenalty]:
        """Return the penalties to measure while the parameters are copied.

        What the loss contains is subtracted together, to find the gradient of the data.
        """
        if not self._is_on_cpu:  # which alone gains from a cache
            return []
        found = [one for one in penalties if is_elementwise(one)]
        together = all(is_elementwise(one) for one in penalties if one in in_loss)
        return [one for one in found if together or one not in in_loss]

    def _dense_gradients(self) -> list[Tensor] | None:
        """Return this rank's part of each gradient, or ``None`` unless all are dense and like the parameters."""
        gradients = [p.grad for p in self.params]
        if not are_dense(gradients) or not self.copies.layout.fits(parts := local_tensors(gradients)):
            return None
        return parts

    def _measure_whole(
        self,
        penalized: Mapping[Penalty, Sequence[Parameter]],
        gradients: Sequence[Tensor] | None,
        optimizer: Optimizer,
        in_loss: Sequence[Penalty],
    ) -> tuple[dict[Penalty, Tensor], Tensor | None]:
        """Return Σ|λ∇R|² for each penalty, and Σ|g|² of the data's gradient if the loss contains some of them."""
        found: dict[Penalty, Tensor] = {}
        has_terms = False  # whether the memory holds the terms that the loss has added to the gradients
        for penalty in sorted(penalized, key=in_loss.__contains__):
            copies = self.copies.more() if has_terms else self.copies
            found[penalty] = self._fill(copies, penalty, penalized[penalty], optimizer)
            if has_terms:
                torch._foreach_add_(self.copies.views, copies.views)
            has_terms |= penalty in in_loss
        if not has_terms:
            return found, None
        return found, self.copies.distances([_gradient(p) for p in self.params] if gradients is None else gradients)

    def _pick(self, values: Tensor, params: Sequence[Parameter]) -> Tensor:
        """Return the values of some parameters."""
        key = tuple(map(id, params))
        if key not in self._picked:
            self._picked[key] = torch.tensor([self._positions[one] for one in key], device=values.device)
        return values[self._picked[key]]

    def _fill(self, copies: Copies, penalty: Penalty, params: Sequence[Parameter], optimizer: Optimizer) -> Tensor:
        """Write this rank's part of the gradient of a penalty to memory, and return Σ|g|² of each parameter."""
        is_divisible = self._is_on_cpu and penalty.is_sum_over_tensors()
        at_once = not is_divisible or is_sharded(params)  # the batches of ranks differ, and must not order their collectives

        def add(indices: Sequence[int]) -> None:
            _add_gradient(penalty, optimizer, [self.params[i] for i in indices], [copies.views[i] for i in indices])

        return copies.fill(self._batches_of(params), add, at_once=at_once)

    def _batches_of(self, params: Sequence[Parameter]) -> list[list[int]]:
        """Return the positions of some parameters in each batch of the memory."""
        key = tuple(map(id, params))
        if key not in self._parts:
            chosen = {self._positions[one] for one in key}
            self._parts[key] = [[index for index in batch if index in chosen] for batch in self.copies.layout.batches]
        return self._parts[key]


def _squares_of_gradients(params: Sequence[Parameter]) -> Tensor:
    """Return Σ|g|² of this rank's part of each gradient; 0 of one that is missing."""
    found = {index: local_tensor(summed_entries(p.grad)) for index, p in enumerate(params) if p.grad is not None}
    squares = torch.zeros(len(params), device=params[0].device)
    if found:
        gradients = list(found.values())
        values = Layout(gradients, [sharding(params[index]) for index in found]).squares(gradients)
        squares = squares.to(values).index_copy(0, torch.tensor(list(found), device=values.device), values)
    return squares


def _add_gradient(penalty: Penalty, optimizer: Optimizer, params: Sequence[Parameter], parts: Sequence[Tensor]) -> None:
    """Add this rank's part of the gradient of a penalty to tensors, without changing ``.grad``."""
    kept = [p.grad for p in params]
    dtypes = {p: dtype for p in params if (dtype := getattr(p, "grad_dtype", p.dtype)) is not p.dtype}
    given = [_like(p, part) for p, part in zip(params, parts, strict=True)] if is_sharded(params) else parts
    try:
        for p in dtypes:
            p.grad, p.grad_dtype = None, None
        for p, gradient in zip(params, given, strict=True):
            p.grad = gradient
        for sign, signed in by_sign(optimizer, params).items():
            if signed:
                penalty.add_gradient_(signed, sign * penalty.scale)
        for p, gradient in zip(params, given, strict=True):
            if p.grad is not None and p.grad is not gradient:  # the penalty has put another tensor in its place
                gradient.copy_(p.grad)
    finally:
        for p, dtype in dtypes.items():
            p.grad, p.grad_dtype = None, dtype
        for p, original in zip(params, kept, strict=True):
            p.grad = original


def _like(p: Parameter, part: Tensor) -> Tensor:
    """Return a tensor that is sharded like a parameter, from this rank's part."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False)


def _gradient(p: Parameter) -> Tensor:
    """Return this rank's part of a gradient as a dense tensor of the parameter's dtype."""
    if p.grad is None:
        return torch.zeros_like(local_tensor(p.detach()))
    return local_tensor(p.grad.to_dense() if p.grad.is_sparse else p.grad).detach().to(p.dtype)
