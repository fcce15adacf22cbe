"""Outputs of modules: the part that techniques act on, and the batch dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_OUTPUT_FIRST = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)  # these return a tuple that starts with their output
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def main_output(module: nn.Module, output: Any) -> Any:
    """Return the output itself, without the states of a recurrent module or the weights of an attention module.

    Example:
        >>> import torch
        >>> layer = nn.LSTM(4, 8)
        >>> main_output(layer, layer(torch.ones(5, 2, 4))).shape
        torch.Size([5, 2, 8])
    """
    is_plain_tuple = isinstance(output, tuple) and not isinstance(output, PackedSequence)
    return output[0] if is_plain_tuple and isinstance(module, _OUTPUT_FIRST) else output


def batch_first(module: nn.Module) -> bool:
    """Return whether the samples are in dimension 0 of the output of a module: the ``batch_first`` of torch's modules.

    Example:
        >>> batch_first(nn.GRU(4, 8)), batch_first(nn.GRU(4, 8, batch_first=True)), batch_first(nn.Linear(4, 8))
        (False, True, True)
    """
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.batch_first
    if isinstance(module, _TRANSFORMERS):
        attentions = (child for child in module.modules() if isinstance(child, nn.MultiheadAttention))
        return all(attention.batch_first for attention in attentions)
    return True


def batch_dim(module: nn.Module, output: Tensor) -> int | None:
    """Return the batch dimension of a module's output, or ``None`` if the output belongs to a single sample.

    Example:
        >>> import torch
        >>> batch_dim(nn.GRU(4, 8), torch.ones(5, 2, 8)), batch_dim(nn.GRU(4, 8), torch.ones(5, 8))
        (1, None)
    """
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention, *_TRANSFORMERS)):
        return (0 if batch_first(module) else 1) if output.ndim == 3 else None
    if isinstance(module, nn.RNNCellBase):
        return 0 if output.ndim == 2 else None
    return 0 if output.ndim else None


def batch_size(module: nn.Module, output: Tensor | PackedSequence) -> int:
    """Return the number of samples in the output of a module."""
    if isinstance(output, PackedSequence):
        return int(output.batch_sizes[0])
    dim = batch_dim(module, output)
    return 1 if dim is None else output.shape[dim]


def describe_output(output: Any) -> str:
    """Describe an unexpected output, for an error message.

    Example:
        >>> import torch
        >>> describe_output((1, 2)), describe_output(torch.ones(2, dtype=torch.int64))
        ('tuple', 'a tensor of torch.int64')
    """
    if isinstance(output, PackedSequence):
        return f"a PackedSequence of {output.data.dtype}"
    return f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__


def is_float(output: Any) -> bool:
    """Return whether an output is a float tensor, or a ``PackedSequence`` of one."""
    data = output.data if isinstance(output, PackedSequence) else output
    return isinstance(data, Tensor) and data.is_floating_point()
