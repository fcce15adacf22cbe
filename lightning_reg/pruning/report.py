"""How sparse a module is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch.nn.parameter import is_lazy

from lightning_reg._engine.selection import select_parameters
from lightning_reg._tensors.shards import local_tensor, sum_over_shards

if TYPE_CHECKING:
    from torch import nn

    from lightning_reg._engine.selection import Params


class ZeroCount(NamedTuple):
    """How many of some weights are exactly zero."""

    zeros: int
    total: int

    @property
    def share(self) -> float:
        """The zeros as a share of all; 0 where there is nothing."""
        return self.zeros / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.share:7.2%}  {self.zeros:,} of {self.total:,}"


class Sparsity(NamedTuple):
    """How sparse the parameters of a module are, each and all together; ``print`` shows a table.

    Args:
        parameters: The zeros of each parameter, by name.
        total: Those of all.
    """

    parameters: dict[str, ZeroCount]
    total: ZeroCount

    @property
    def share(self) -> float:
        """The share of zeros among all weights."""
        return self.total.share

    def __str__(self) -> str:
        width = max(map(len, [*self.parameters, "total"]))
        return "\n".join(f"{name:<{width}}  {share}" for name, share in [*self.parameters.items(), ("total", self.total)])


def sparsity(module: nn.Module, params: Params = "weights") -> Sparsity:
    r"""Count the exact zeros of a module's parameters: :math:`\#\{i : \theta_i = 0\} / n`.

    Works on any module, pruned by this package or not. For sharded parameters every rank must call it.

    Args:
        module: The module.
        params: Which parameters, see :func:`lightning_reg._engine.selection.select_parameters`; a tied one counts once.

    Returns:
        Zeros and sizes, by name and in total; ``.share`` is the share in total.

    Raises:
        ValueError: If nothing is selected.

    Example:
        >>> from torch import nn, ones
        >>> layer = nn.Linear(4, 2)
        >>> layer.weight = nn.Parameter(ones(2, 4).tril())
        >>> print(sparsity(layer))
        weight   62.50%  5 of 8
        total    62.50%  5 of 8
        >>> sparsity(layer).share
        0.625
    """
    counted = {
        name: ZeroCount(int(sum_over_shards((local_tensor(p.detach()) == 0).count_nonzero(), p)), p.numel())
        for name, p in select_parameters(module, params).items()
        if not is_lazy(p)
    }
    return Sparsity(counted, ZeroCount(sum(c.zeros for c in counted.values()), sum(c.total for c in counted.values())))
