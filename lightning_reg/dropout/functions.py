"""Dropout of a tensor, with a rate that is a number or, for compiled code, a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lightning_reg._engine.arguments import described_value
from lightning_reg._engine.tensor_arguments import check_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ALPHA = -1.7580993408473766  # the limit of SELU at −∞: minus its scale times its alpha


def dropout(
    x: Tensor,
    p: float | Tensor,
    channelwise: bool = False,
    samplewise: bool = False,
    shared_dims: Sequence[int] = (),
) -> Tensor:
    """Inverted dropout: yᵢ = xᵢ · mᵢ / (1 − p) with mᵢ ~ Bernoulli(1 − p).

    The expectation of y is x, so nothing needs rescaling when dropout is off. If p is a number, torch's own kernel runs. If p
    is a tensor, masks are drawn in float32, regardless of the dtype of x, and one compiled graph serves all values of p.

    Args:
        x: A tensor of any shape. With ``channelwise``, a batch with channels in dimension 1.
        p: The probability of dropping an entry, in [0, 1]: a number or a scalar tensor.
        channelwise: Drop whole channels, with one draw for each channel.
        samplewise: Drop whole samples (dimension 0). After the branch of a residual block, this is stochastic depth.
        shared_dims: Dimensions along which one mask is shared. With the time dimension, the same entries are dropped in every
            step of a sequence.

    Returns:
        A tensor of the shape of ``x``; ``x`` itself if p is the number 0.

    Raises:
        IndexError: If ``x`` does not have one of the ``shared_dims``.

    Example:
        >>> y = dropout(torch.ones(1000), 0.5)
        >>> sorted(set(y.tolist())), 400 < y.count_nonzero() < 600
        ([0.0, 2.0], tensor(True))
        >>> y = dropout(torch.ones(8, 5, 3), 0.5, shared_dims=[1])
        >>> torch.equal(y[:, :1].expand(-1, 5, -1), y)
        True

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
        J. Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015 (channels).
        G. Huang et al., "Deep Networks with Stochastic Depth", 2016 (samples).
        Y. Gal, Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016 (time).
    """
    check_tensor("dropout: x", x)
    if not isinstance(p, torch.Tensor) and p == 0:
        return x
    if isinstance(p, torch.Tensor) or samplewise or shared_dims:
        return x * _draw_mask(x, _mask_shape(x.shape, channelwise, samplewise, shared_dims), p)
    return torch.feature_dropout(x, p, True) if channelwise else functional.dropout(x, p, training=True)


def packed_dropout(
    x: PackedSequence, p: float | Tensor, shared_dims: Sequence[int] = (), batch_first: bool = False
) -> PackedSequence:
    """Inverted dropout of packed sequences, as if they were padded.

    Args:
        x: The packed sequences.
        p: The probability of dropping an entry, in [0, 1]: a number or a scalar tensor.
        shared_dims: Dimensions of the padded sequences along which one mask is shared.
        batch_first: Whether samples are in dimension 0 of the padded sequences, and time in dimension 1.

    Returns:
        Packed sequences of the same lengths, in the same order; ``x`` itself if p is the number 0.

    Raises:
        IndexError: If padded sequences do not have one of the ``shared_dims``.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence, unpack_sequence
        >>> packed = pack_sequence([torch.ones(3, 4), torch.ones(2, 4)])
        >>> first, second = unpack_sequence(packed_dropout(packed, 0.5, shared_dims=[0]))  # dimension 0 is time
        >>> torch.equal(first, first[:1].expand(3, -1))
        True
    """
    if not isinstance(x, PackedSequence):
        raise TypeError(f"packed_dropout: x must be a PackedSequence, got {described_value(x)}: use dropout for a tensor")
    if not isinstance(p, torch.Tensor) and p == 0:
        return x
    sizes = (int(x.batch_sizes[0]), len(x.batch_sizes)) if batch_first else (len(x.batch_sizes), int(x.batch_sizes[0]))
    shape = _mask_shape((*sizes, *x.data.shape[1:]), shared_dims=shared_dims)
    if tuple(shape[:2]) == sizes:  # no row of the data shares its mask with another
        shared = [dim - 1 for dim, size in enumerate(shape) if dim > 1 and size == 1]
        data = dropout(x.data, p, shared_dims=shared)
    else:
        data = x.data * _draw_mask(x.data, shape, p)[_padded_rows(x, shape, batch_first)]
    return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)


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
    check_tensor("alpha_dropout: x", x)
    if isinstance(p, torch.Tensor):
        kept = _draw_kept(x, _mask_shape(x.shape, channelwise), p)
        a = _inverse(((1 - p) * (1 + p * _ALPHA**2)).sqrt())
        shift = _ALPHA * a * (kept.logical_not().to(a.dtype) - p)  # a · α for replaced entries, plus b
        return x * (kept * a).to(x.dtype) + shift.to(x.dtype)
    replace = functional.feature_alpha_dropout if channelwise else functional.alpha_dropout
    return replace(x, p, training=True)


def _mask_shape(
    shape: Sequence[int], channelwise: bool = False, samplewise: bool = False, shared_dims: Sequence[int] = ()
) -> list[int]:
    ndim = len(shape)
    if channelwise and ndim < 2 and 0 not in shape:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")  # as torch says it
    drawn = 1 if samplewise else 2 if channelwise else ndim
    mask = [*shape[:drawn], *[1] * (ndim - drawn)]
    for dim in shared_dims:
        if not -ndim <= dim < ndim:
            raise IndexError(f"shared_dims={list(shared_dims)}: there is no dimension {dim} in the shape {tuple(shape)}")
        mask[dim] = 1
    return mask


def _draw_mask(x: Tensor, shape: Sequence[int], p: float | Tensor) -> Tensor:
    """Draw the factors of x: 0 where an entry is dropped, 1 / (1 − p) where it is kept."""
    if isinstance(p, torch.Tensor):
        return (_draw_kept(x, shape, p) * _inverse(1 - p)).to(x.dtype)
    return functional.dropout(x.new_ones(shape), p, training=True)


def _draw_kept(x: Tensor, shape: Sequence[int], p: Tensor) -> Tensor:
    """Draw which entries, channels, or samples are kept."""
    if not (x.is_floating_point() or x.is_complex()):
        x.new_empty(1).div_(1.0)  # raises the error of torch's own dropout
    return torch.rand(shape, device=x.device, dtype=torch.float32) >= p.to(x.device)


def _padded_rows(x: PackedSequence, shape: Sequence[int], batch_first: bool) -> tuple[Tensor, Tensor]:
    """Return where each row of packed data is in the first two dimensions of a padded mask, which may have size 1."""
    starts = x.batch_sizes.cumsum(0) - x.batch_sizes
    times = torch.repeat_interleave(torch.arange(len(x.batch_sizes)), x.batch_sizes)
    samples = torch.arange(len(times)) - starts[times]
    first, second = (samples, times) if batch_first else (times, samples)
    device = x.data.device
    return first.clamp(max=shape[0] - 1).to(device), second.clamp(max=shape[1] - 1).to(device)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / s, and 0 for s = 0: if p is 1, nothing is kept, and neither the output nor the gradient may become NaN."""
    return torch.where(scale > 0, 1 / scale, 0.0)
