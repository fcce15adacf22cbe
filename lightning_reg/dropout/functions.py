"""Dropout of a tensor, with a rate that is a number or, for compiled code, a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

_ALPHA = -1.7580993408473766  # the limit of SELU at −∞: minus its scale times its alpha


def dropout(x: Tensor, p: float | Tensor, channelwise: bool = False, samplewise: bool = False) -> Tensor:
    """Inverted dropout: yᵢ = xᵢ · mᵢ / (1 − p) with mᵢ ~ Bernoulli(1 − p).

    The expectation of y is x, so nothing needs to be rescaled when dropout is off.
    If p is a number, torch's own kernel runs. If p is a tensor, masks are drawn in float32, whatever the dtype of x, and the
    value of p is not read, so one compiled graph serves all values of p.

    Args:
        x: A tensor of any shape. With ``channelwise``, a batch with channels in dimension 1.
        p: The probability of a zero, in [0, 1]: a number or a scalar tensor.
        channelwise: Drop whole channels, with one draw for each channel.
        samplewise: Drop whole samples (dimension 0). After the branch of a residual block, this is stochastic depth.

    Returns:
        A tensor of the shape of ``x``; ``x`` itself if p is the number 0.

    Example:
        >>> y = dropout(torch.ones(1000), 0.5)
        >>> sorted(set(y.tolist())), 400 < y.count_nonzero() < 600
        ([0.0, 2.0], tensor(True))

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
        J. Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015 (channels).
        G. Huang et al., "Deep Networks with Stochastic Depth", 2016 (samples).
    """
    if isinstance(p, torch.Tensor):
        kept = _draw_kept(x, p, channelwise, samplewise)
        return x * (kept * _inverse(1 - p)).to(x.dtype)
    if p == 0:
        return x
    if samplewise:
        return x * functional.dropout(x.new_ones(_mask_shape(x, channelwise, samplewise)), p, training=True)
    return torch.feature_dropout(x, p, True) if channelwise else functional.dropout(x, p, training=True)


def alpha_dropout(x: Tensor, p: float | Tensor, channelwise: bool = False) -> Tensor:
    """Dropout that keeps mean 0 and variance 1: yᵢ = a · (xᵢ · mᵢ + α · (1 − mᵢ)) + b with mᵢ ~ Bernoulli(1 − p).

    α is the limit of SELU at −∞, a = 1 / √((1 − p)(1 + p α²)), and b = −a p α.

    Args:
        x: A tensor of any shape. With ``channelwise``, a batch with channels in dimension 1.
        p: The probability that an entry is replaced, in [0, 1]: a number or a scalar tensor.
        channelwise: Replace whole channels.

    Returns:
        A tensor of the shape of ``x``; zeros if p is 1.

    Example:
        >>> y = alpha_dropout(torch.randn(10_000), torch.tensor(0.2))
        >>> bool(y.mean().abs() < 0.1), bool((y.var() - 1).abs() < 0.2)
        (True, True)

    Reference:
        G. Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    """
    if isinstance(p, torch.Tensor):
        kept = _draw_kept(x, p, channelwise)
        a = _inverse(((1 - p) * (1 + p * _ALPHA**2)).sqrt())
        shift = _ALPHA * a * (kept.logical_not().to(a.dtype) - p)  # a · α for replaced entries, plus b
        return x * (kept * a).to(x.dtype) + shift.to(x.dtype)
    replace = functional.feature_alpha_dropout if channelwise else functional.alpha_dropout
    return replace(x, p, training=True)


def _mask_shape(x: Tensor, channelwise: bool, samplewise: bool) -> list[int]:
    drawn = 1 if samplewise else 2 if channelwise else x.ndim
    return [*x.shape[:drawn], *[1] * (x.ndim - drawn)]


def _draw_kept(x: Tensor, p: Tensor, channelwise: bool = False, samplewise: bool = False) -> Tensor:
    """Draw which entries, channels, or samples are kept."""
    shape = _mask_shape(x, channelwise, samplewise)
    return torch.rand(shape, device=x.device, dtype=torch.float32) >= p.to(x.device)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / s, and 0 for s = 0: if p is 1, nothing is kept, and neither the output nor the gradient may become NaN."""
    return torch.where(scale > 0, 1 / scale, 0.0)
