"""How strong penalties are: the norm of the gradient of each, relative to that of the data's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from lightning_reg._engine.steps import by_sign
from lightning_reg._tensors.reductions import is_cpu
from lightning_reg._tensors.shards import is_sharded, local_tensor, sum_each_over_shards
from lightning_reg.monitors.measures import Copies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg.penalties.base import Penalty


class Shares:
    """Measures how strong penalties are, without changing the gradients.

    Args:
        params: The parameters of an optimizer, including all that a penalty acts on.
        memory: Memory of the size of this rank's parts of the parameters. It is overwritten.
    """

    def __init__(self, params: Sequence[Parameter], memory: Copies) -> None:
        self.params, self.memory = params, memory
        self._positions = {id(p): position for position, p in enumerate(params)}
        self._picked: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[tuple[int, ...], list[list[int]]] = {}

    def measure(self, penalties: Sequence[Penalty], optimizer: Optimizer, squares: Tensor) -> dict[str, Tensor]:
        """Return for each penalty the norm of its gradient, relative to that of the data's gradient.

        Args:
            penalties: The penalties of a fit.
            optimizer: The optimizer that is about to step. Its gradients contain the penalties that are part of the loss.
            squares: Σ|g|² of this rank's part of each gradient.
        """
        found: dict[str, tuple[list[Parameter], Tensor]] = {}
        has_terms = False  # whether the memory holds the terms that the loss has added to the gradients
        for penalty in sorted(penalties, key=lambda penalty: penalty.adds_to_loss):
            penalized = penalty.parameters_of(optimizer) if penalty.scale else []
            if not penalized:
                continue
            memory = Copies(self.memory.views) if has_terms else self.memory
            found[penalty.name] = penalized, self._fill(memory, penalty, penalized, optimizer)
            if has_terms:
                torch._foreach_add_(self.memory.views, memory.views)
            has_terms |= penalty.adds_to_loss
        data = self.memory.distances([_gradient(p) for p in self.params]) if has_terms else squares
        data = sum_each_over_shards(data, self.params)
        return {name: self._norm(own) / self._pick(data, ps).sum().sqrt() for name, (ps, own) in found.items()}

    def _norm(self, squares: Tensor) -> Tensor:
        return sum_each_over_shards(squares, self.params).sum().sqrt()

    def _pick(self, values: Tensor, params: Sequence[Parameter]) -> Tensor:
        """Return the values of some parameters."""
        key = tuple(map(id, params))
        if key not in self._picked:
            self._picked[key] = torch.tensor([self._positions[one] for one in key], device=values.device)
        return values[self._picked[key]]

    def _fill(self, memory: Copies, penalty: Penalty, params: Sequence[Parameter], optimizer: Optimizer) -> Tensor:
        """Write this rank's part of the gradient of a penalty to memory, and return Σ|g|² of each parameter."""
        at_once = not (is_cpu(memory.views[0]) and penalty.is_sum_over_tensors())

        def add(indices: Sequence[int]) -> None:
            _add_gradient(penalty, optimizer, [self.params[i] for i in indices], [memory.views[i] for i in indices])

        return memory.fill(self._batches_of(params), add, at_once=at_once)

    def _batches_of(self, params: Sequence[Parameter]) -> list[list[int]]:
        """Return the positions of some parameters in each batch of the memory."""
        key = tuple(map(id, params))
        if key not in self._parts:
            chosen = {self._positions[one] for one in key}
            self._parts[key] = [[index for index in batch if index in chosen] for batch in self.memory.layout.batches]
        return self._parts[key]


def _add_gradient(penalty: Penalty, optimizer: Optimizer, params: Sequence[Parameter], parts: Sequence[Tensor]) -> None:
    """Add this rank's part of the gradient of a penalty to tensors, without changing ``.grad``."""
    kept = [p.grad for p in params]
    given = [_like(p, part) for p, part in zip(params, parts, strict=True)] if is_sharded(params) else parts
    try:
        for p, gradient in zip(params, given, strict=True):
            p.grad = gradient
        for sign, signed in by_sign(optimizer, params).items():
            if signed:
                penalty.add_gradient_(signed, sign * penalty.scale)
        for p, gradient in zip(params, given, strict=True):
            if p.grad is not None and p.grad is not gradient:  # the penalty has put another tensor in its place
                gradient.copy_(p.grad)
    finally:
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
