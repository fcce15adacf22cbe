"""The sparsity of a module: how many of its weights are exactly zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from lightning_reg._engine.selection import effective_tensors
from lightning_reg._tensors.shards import local_tensor, sum_over_shards

if TYPE_CHECKING:
    from torch import nn

    from lightning_reg._engine.selection import Params


class ZeroCount(NamedTuple):
    """The number of zeros among a number of weights.

    Args:
        zeros: The number of weights that are exactly zero.
        total: The number of all weights.
    """

    zeros: int
    total: int

    @property
    def fraction(self) -> float:
        """The fraction of zeros; 0 if there are no weights."""
        return self.zeros / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.fraction:7.2%}  {self.zeros:,} of {self.total:,}"


class Sparsity(NamedTuple):
    """The zeros of a module's parameters; ``print`` shows them as a table.

    Args:
        parameters: The count of each parameter, by name.
        total: The count of all parameters together.
    """

    parameters: dict[str, ZeroCount]
    total: ZeroCount

    @property
    def fraction(self) -> float:
        """The fraction of zeros among all weights."""
        return self.total.fraction

    def __str__(self) -> str:
        width = max(map(len, [*self.parameters, "total"]))
        return "\n".join(f"{name:<{width}}  {count}" for name, count in [*self.parameters.items(), ("total", self.total)])


def sparsity(module: nn.Module, params: Params = "weights") -> Sparsity:
    """Count the exact zeros among a module's parameters: #{i : θᵢ = 0} / n.

    Works on any module, whether or not this package pruned it. For a weight that is computed from other parameters, as by
    ``torch.nn.utils.prune`` or ``weight_norm``, the effective values count. If parameters are sharded, every rank must call
    it.

    Args:
        module: The module.
        params: The parameters to count, as for ``lightning_reg.select_parameters``. A tied parameter counts once.

    Returns:
        The zeros and sizes by name and in total. ``.fraction`` is the total fraction of zeros.

    Raises:
        ValueError: If no parameter is selected.

    Example:
        >>> from torch import nn, ones
        >>> layer = nn.Linear(4, 2)
        >>> layer.weight = nn.Parameter(ones(2, 4).tril())
        >>> print(sparsity(layer))
        weight   62.50%  5 of 8
        total    62.50%  5 of 8
        >>> sparsity(layer).fraction
        0.625
    """
    with torch.no_grad():
        tensors = effective_tensors(module, params)
        counts = {
            name: ZeroCount(int(sum_over_shards((local_tensor(tensor) == 0).count_nonzero(), tensor)), tensor.numel())
            for name, tensor in tensors.items()
            if not is_lazy(tensor)
        }
    total = ZeroCount(sum(count.zeros for count in counts.values()), sum(count.total for count in counts.values()))
    return Sparsity(counts, total)
