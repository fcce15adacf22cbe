"""Gradient centralization: gradients without the mean of each unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list, units_list
from lightning_reg._tensors.units import Units, local_unit_means, unit_view
from lightning_reg.gradients.base import GradientProcessing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors


@torch.no_grad()
def centralize_gradients_(params: Tensors, units: Units | Sequence[Units] | None = None) -> None:
    """Subtract the mean of each unit's gradient: g_u ← g_u − mean(g_u).

    Args:
        params: Tensors whose ``.grad`` is changed in place. Those without one are skipped, and so are those with fewer than
            two dimensions, whose units are single entries.
        units: Where each tensor has its output units, as returned by ``units_of``; dimension 0 by default.

    Raises:
        ValueError: If a gradient is sparse.

    Example:
        >>> theta = torch.zeros(2, 2, requires_grad=True)
        >>> theta.grad = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> centralize_gradients_([theta])
        >>> theta.grad
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    Reference:
        H. Yong, J. Huang, X. Hua, L. Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural
        Networks", 2020.
    """
    params = tensor_list("centralize_gradients_: params", params)
    for p, layout in zip(params, units_list("centralize_gradients_", units, params), strict=True):
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("centralization needs a dense gradient, got a sparse one: create the embedding with sparse=False")
        if p.grad is not None and p.ndim > 1 and p.numel():
            unit_view(p.grad, layout).sub_(local_unit_means(p.grad, layout))


class GradientCentralization(GradientProcessing):
    """Subtract the mean of each unit's gradient: g_u ← g_u − mean(g_u).

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before noise and clipping.

    A unit is a row of a linear layer, a filter of a convolution (dimension 1 if it is transposed), or the vector of a token in
    an embedding.
    Biases and other tensors with fewer than two dimensions do not change.
    Works with sharded parameters (FSDP2).

    Args:
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If nothing is selected, gradients are sparse, a fused optimizer is used under float16 loss scaling, or FSDP1
            has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientCentralization(params="features.*")], logger=False)

    Reference:
        H. Yong, J. Huang, X. Hua, L. Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural
        Networks", 2020.
    """

    phase = Phase.CENTRALIZATION

    def __init__(self, *, params: Params = "all", name: str | None = None) -> None:
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Subtract the means."""
        with self.logging_norms(params, optimizer):
            centralize_gradients_(params, self.units(params))
