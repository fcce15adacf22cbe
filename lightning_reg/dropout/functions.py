"""Dropout of a tensor, with a rate that is a number or, for compiled code, a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

_ALPHA = -1.7580993408473766  # what SELU tends to at minus infinity: its scale times its alpha


def dropout(x: Tensor, p: float | Tensor, channelwise: bool = False, samplewise: bool = False) -> Tensor:
    r"""Inverted dropout: :math:`y_i = x_i\,m_i / (1 - p)` with :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`.

    The expectation is x, so nothing needs to be rescaled when dropout is off. With a number for p it is torch's own kernel; a
    tensor is drawn against in float32, whatever the precision of x, without reading its value: compiled code serves every p.

    Args:
        x: Any shape; with ``channelwise`` a batch with channels in dimension 1.
        p: The probability of a zero, in [0, 1]: a number, or a tensor of no dimensions.
        channelwise: Whether whole channels are dropped, one draw for each of them.
        samplewise: Whether whole samples (dimension 0) are dropped: stochastic depth, if x is the branch of a residual block.

    Returns:
        A tensor of the shape of ``x``; ``x`` itself where p is the number 0.

    Example:
        >>> kept = dropout(torch.ones(1000), 0.5)
        >>> sorted(set(kept.tolist())), 400 < kept.count_nonzero() < 600
        ([0.0, 2.0], tensor(True))

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; channels: J. Tompson
        et al., "Efficient Object Localization Using Convolutional Networks", 2015; samples: G. Huang et al., "Deep Networks
        with Stochastic Depth", 2016.
    """
    if isinstance(p, torch.Tensor):
        kept = _kept(x, p, channelwise, samplewise)
        return x * (kept * _inverse(1 - p)).to(x.dtype)
    if p == 0:
        return x
    if samplewise:
        return x * functional.dropout(x.new_ones(_mask_shape(x, channelwise, samplewise)), p, training=True)
    return torch.feature_dropout(x, p, True) if channelwise else functional.dropout(x, p, training=True)


def alpha_dropout(x: Tensor, p: float | Tensor, channelwise: bool = False) -> Tensor:
    r"""Dropout that keeps mean 0 and variance 1: :math:`y_i = a\,(x_i\,m_i + \alpha\,(1 - m_i)) + b`.

    Here :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`, α is the value that SELU tends to at minus infinity, and
    :math:`a = ((1 - p)\,(1 + p\,\alpha^2))^{-1/2}`, :math:`b = -a\,p\,\alpha`.

    Args:
        x: Any shape; with ``channelwise`` a batch with channels in dimension 1.
        p: The probability that an entry is replaced, in [0, 1]: a number, or a tensor of no dimensions.
        channelwise: Whether whole channels are replaced.

    Returns:
        A tensor of the shape of ``x``; zeros where p is 1.

    Example:
        >>> y = alpha_dropout(torch.randn(10_000), torch.tensor(0.2))
        >>> bool(y.mean().abs() < 0.1), bool((y.var() - 1).abs() < 0.2)
        (True, True)

    Reference:
        G. Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    """
    if isinstance(p, torch.Tensor):
        kept = _kept(x, p, channelwise)
        a = _inverse(((1 - p) * (1 + p * _ALPHA**2)).sqrt())
        shift = _ALPHA * a * (kept.logical_not().to(a.dtype) - p)  # α for what is dropped, and b
        return x * (kept * a).to(x.dtype) + shift.to(x.dtype)
    replace = functional.feature_alpha_dropout if channelwise else functional.alpha_dropout
    return replace(x, p, training=True)


def _mask_shape(x: Tensor, channelwise: bool, samplewise: bool) -> list[int]:
    drawn = 1 if samplewise else 2 if channelwise else x.ndim
    return [*x.shape[:drawn], *[1] * (x.ndim - drawn)]


def _kept(x: Tensor, p: Tensor, channelwise: bool = False, samplewise: bool = False) -> Tensor:
    """Draw which entries, channels or samples stay."""
    shape = _mask_shape(x, channelwise, samplewise)
    return torch.rand(shape, device=x.device, dtype=torch.float32) >= p.to(x.device)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1/s, and 0 for 0: with p = 1 nothing is kept, and neither the output nor the gradient may become NaN."""
    return torch.where(scale > 0, 1 / scale, 0.0)
