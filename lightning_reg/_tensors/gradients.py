"""Lists of gradients: which parameters have one, and in a form that can be added to or scaled."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, cast

import torch

from lightning_reg._tensors.shards import local_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def dense_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each gradient, to add to: missing gradients become zeros, sparse ones become dense."""
    gradients = [p.grad for p in params]
    if type(None) in set(map(type, gradients)) or any(map(attrgetter("is_sparse"), gradients)):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
        gradients = [p.grad for p in params]
    return local_tensors(cast("list[Tensor]", gradients))


def existing_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that exist and have entries; for a sparse one, the dense tensor of its values, sharing memory."""
    gradients = []
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
            gradients.append(p.grad._values())
        elif p.grad is not None:
            gradients.append(p.grad)
    return [gradient for gradient in gradients if gradient.numel()]
