"""Dropout as functions: of a tensor, into modules, and the rate of modules that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop_elements

from lightning_reg.modules import ForwardHook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

__all__ = ["dropout", "inject_dropout", "set_dropout_"]


def dropout(x: Tensor, p: float, channelwise: bool = False) -> Tensor:
    r"""Inverted dropout: :math:`y_i = x_i\,m_i / (1 - p)` with :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`.

    The expectation is x, so nothing needs to be rescaled when dropout is off.

    Args:
        x: Any shape; with ``channelwise`` a batch with channels in dimension 1.
        p: The probability of a zero, in [0, 1].
        channelwise: Whether whole channels are dropped, one draw for each of them.

    Returns:
        A tensor of the shape of ``x``; ``x`` itself where p is 0.

    Example:
        >>> kept = dropout(torch.ones(1000), 0.5)
        >>> sorted(set(kept.tolist())), 400 < kept.count_nonzero() < 600
        ([0.0, 2.0], tensor(True))

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; channels: J. Tompson
        et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """
    if p == 0:
        return x
    return torch.feature_dropout(x, p, True) if channelwise else drop_elements(x, p, training=True)


def inject_dropout(
    modules: Mapping[str, nn.Module], rate: Callable[[], float], channelwise: bool = False
) -> list[RemovableHandle]:
    """Drop parts of the outputs of modules while these are in training mode, through forward hooks: no key is renamed.

    Args:
        modules: The modules, by a name for error messages.
        rate: Asked for p in every forward pass.
        channelwise: Whether whole channels are dropped.

    Returns:
        Handles whose ``remove()`` takes the dropout out again.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> handles = inject_dropout({"layer": layer}, rate=lambda: 1.0)
        >>> layer(torch.ones(2, 4)).count_nonzero().item(), layer.eval()(torch.ones(2, 4)).count_nonzero().item()
        (0, 16)
    """

    def hook_of(name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not module.training:
                return None
            _check_output(name, module, output, channelwise)
            return dropout(output, rate(), channelwise)

        return ForwardHook(hook)

    return [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]


def set_dropout_(modules: Iterable[nn.Module], p: float) -> None:
    """Set the rate of dropout modules.

    Args:
        modules: Modules with an attribute ``p``, such as :class:`torch.nn.Dropout`.
        p: The probability of a zero, in [0, 1].

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> set_dropout_([layer], 0.1)
        >>> layer
        Dropout(p=0.1, inplace=False)
    """
    for module in modules:
        module.p = p  # type: ignore[assignment]


def _check_output(name: str, module: nn.Module, output: Any, channelwise: bool) -> None:
    what = f"dropout cannot follow {name!r} ({type(module).__name__})"
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{what}: it returns {type(output).__name__}, expected one float tensor; name a module inside it")
    if not output.is_floating_point():
        raise TypeError(f"{what}: it returns a tensor of {output.dtype}, expected a float tensor")
    if channelwise and output.ndim < 2:
        raise TypeError(f"{what}: channels are in dimension 1, but its output has shape {tuple(output.shape)}")
