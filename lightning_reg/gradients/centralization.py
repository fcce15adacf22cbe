"""Gradients without their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.units import Units, local_unit_means, unit_view
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params


@torch.no_grad()
def centralize_gradients_(params: Sequence[Tensor], units: Sequence[Units] | None = None) -> None:
    r"""Subtract from each output unit's gradient its mean: :math:`G_u \leftarrow G_u - \frac{1}{|u|} \sum_i G_{u,i}`.

    Args:
        params: Tensors whose ``.grad`` is changed in place; those without one, and those of fewer than two dimensions, whose
            units are single entries, are left out.
        units: Where each tensor keeps its output units, as :func:`units_of` tells; dimension 0 by default.

    Raises:
        ValueError: For a sparse gradient.

    Example:
        >>> theta = torch.zeros(2, 2, requires_grad=True)
        >>> theta.grad = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> centralize_gradients_([theta])
        >>> theta.grad
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    Reference:
        H. Yong, J. Huang, X. Hua, L. Zhang, "Gradient Centralization: A New Optimization Technique for Deep
        Neural Networks", 2020.
    """
    for p, of in zip(params, units or [Units()] * len(params), strict=True):
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("centralization needs a dense gradient, got a sparse one: make the embedding with sparse=False")
        if p.grad is not None and p.ndim > 1 and p.numel():
            unit_view(p.grad, of).sub_(local_unit_means(p.grad, of))


class GradientCentralization(GradientProcessing):
    r"""Take the mean out of each output unit's gradient: :math:`G_u \leftarrow G_u - \overline{G_u}`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before noise and clipping.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 in a transposed one), the vector of a token.
    Biases and other tensors of fewer than two dimensions stay as they are. Works for sharded parameters.

    Args:
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a selection of nothing, sparse gradients, a fused optimizer under float16 loss scaling, or the flat
            parameters of FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientCentralization(params="features.*")], logger=False)

    Reference:
        H. Yong, J. Huang, X. Hua, L. Zhang, "Gradient Centralization: A New Optimization Technique for Deep
        Neural Networks", 2020.
    """

    phase = Phase.CENTRALIZATION

    def __init__(self, *, params: Params = "all", name: str | None = None) -> None:
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Take the means out."""
        with self.logging_norms(params, optimizer):
            centralize_gradients_(params, self.units(params))
