"""What ``ParameterMonitor`` measures in a step of one optimizer, and the memory that it keeps from step to step."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from lightning_reg._tensors.shards import local_tensors, sharding, sum_each_over_shards
from lightning_reg.monitors.copies import Copies
from lightning_reg.monitors.relative import Before, Shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg.penalties.base import Penalty

KEYS = ("weight_norm", "grad_norm", "update_ratio", "zeros")
"""What is measured of each parameter or group."""


class Watched:
    """Parameters of an optimizer that are measured before and after its steps.

    Args:
        params: One or more parameters.
        groups: The names of the groups of each parameter. Each group is measured as one vector.
        prefix: What the keys of metrics begin with.
    """

    def __init__(self, params: Sequence[Parameter], groups: Sequence[Sequence[str]], prefix: str) -> None:
        self._params = list(params)
        self._ids = set(map(id, params))
        self._groups = _Groups(params, groups)
        self.keys = [f"{prefix}{name}/{key}" for name in self._groups.names for key in KEYS]
        self._copies = _copies(params)
        self._shares = self._all = Shares(self._params, self._copies)  # of the parameters, and of all that penalties act on

    def fits(self, params: Sequence[Parameter]) -> bool:
        """Return whether the same parameters still have the shapes that they had."""
        return self._copies.layout.fits(local_tensors(params))

    def before_step(self, penalties: Sequence[Penalty], optimizer: Optimizer, in_loss: Sequence[Penalty]) -> Before:
        """Measure the gradients and the penalties, some of which are part of the loss, and copy the weights."""
        penalized = {penalty: penalty.parameters_of(optimizer) for penalty in penalties}
        others = list({id(p): p for p in chain(*penalized.values()) if id(p) not in self._ids}.values())
        if not others:
            return self._shares.measure(penalized, optimizer, in_loss)
        params = [*self._params, *others]
        if list(map(id, self._all.params)) != list(map(id, params)) or not self._all.copies.layout.fits(local_tensors(params)):
            self._all = Shares(params, _copies(params))
        weights, gradients, relative_norms = self._all.measure(penalized, optimizer, in_loss)
        self._copies.take(local_tensors(self._params))
        count = len(self._params)
        return Before(weights[:count], gradients[:count], relative_norms)

    def after_step(self, before: Before) -> Tensor:
        """Return the values of ``keys`` after a step."""
        weights, updates, zeros = self._copies.changes(local_tensors(self._params))
        sums = torch.stack([weights, before.gradients, updates, before.weights, zeros])
        return self._groups.values(sum_each_over_shards(sums, self._params))


def _copies(params: Sequence[Parameter]) -> Copies:
    """Return memory for this rank's parts, stacked by sharding, so that all ranks sum what they all hold in the same order."""
    return Copies(local_tensors(params), list(map(sharding, params)))


class _Groups:
    """Sums over the parameters of groups."""

    def __init__(self, params: Sequence[Parameter], groups: Sequence[Sequence[str]]) -> None:
        pairs = [(index, name) for index, names in enumerate(groups) for name in names]
        self.names = list(dict.fromkeys(name for _, name in pairs))
        position = {name: index for index, name in enumerate(self.names)}
        device = params[0].device
        self._members = torch.tensor([index for index, _ in pairs], device=device)
        self._positions = torch.tensor([position[name] for _, name in pairs], device=device)
        entries = torch.tensor([[float(p.numel()) for p in params]], device=device)
        self._entries = self._sums(entries)[0].clamp(min=1)

    def _sums(self, values: Tensor) -> Tensor:
        """Return the sums of rows of values over the parameters of each group."""
        picked = values[:, self._members]
        return values.new_zeros(len(values), len(self.names)).index_add_(1, self._positions, picked)

    def values(self, sums: Tensor) -> Tensor:
        """Return what is measured of each group, one group after the other."""
        weights, gradients, updates, before, zeros = self._sums(sums)
        ratio = torch.where(updates == 0, updates, (updates / before).sqrt())
        return torch.stack([weights.sqrt(), gradients.sqrt(), ratio, zeros / self._entries], 1).flatten()
