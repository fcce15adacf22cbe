"""Gradient clipping by bounds that are given: on the norm, on every entry."""

from __future__ import annotations

import math
from ctypes import c_float
from typing import TYPE_CHECKING, Literal

import torch

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import POSITIVE, check_choice
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.gradients import existing_gradients
from lightning_reg._tensors.reductions import fraction_above, is_cpu, tensor_norms, total_norm
from lightning_reg._tensors.shards import local_tensors
from lightning_reg.gradients.base import GradientClipping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def clip_gradient_norm_(params: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    r"""Scale all gradients by one factor so that their joint norm is at most ``max_norm``.

    :math:`g \leftarrow g \cdot \min(1, \mathrm{max\_norm} / (\|g\| + 10^{-6}))`, as
    :func:`torch.nn.utils.clip_grad_norm_` does it; sparse gradients are clipped by their values.

    Args:
        params: Tensors whose ``.grad`` is scaled in place; those without one are left out.
        max_norm: The largest norm, > 0.
        norm_type: The order of the norm, > 0, or infinity for the largest magnitude.

    Returns:
        The norm before clipping, a scalar. A norm that is not finite makes every gradient NaN or 0, as in torch.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> theta.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradient_norm_([theta], max_norm=1.0)
        tensor(5.)
        >>> theta.grad
        tensor([0.6000, 0.8000])

    Reference:
        R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training Recurrent Neural Networks", 2013.
    """
    gradients = existing_gradients(params)
    norm = total_norm(gradients, norm_type)
    if gradients and (factor := _clip_factor(norm, max_norm, gradients)) is not None:
        torch._foreach_mul_(local_tensors(gradients), factor)
    return norm


@torch.no_grad()
def clip_gradient_norm_per_tensor_(params: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    r"""Scale each tensor's gradient by itself so that its norm is at most ``max_norm``.

    Args:
        params: Tensors whose ``.grad`` is scaled in place; those without one are left out.
        max_norm: The largest norm, > 0.
        norm_type: The order of the norm, > 0, or infinity for the largest magnitude.

    Returns:
        The norms before clipping, a vector with an entry for each gradient that there is and that is not empty.

    Example:
        >>> params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
        >>> params[0].grad, params[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
        >>> clip_gradient_norm_per_tensor_(params, max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> params[0].grad, params[1].grad
        (tensor([0.6000, 0.8000]), tensor([0.5000]))
    """
    gradients = existing_gradients(params)
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(tensor_norms(gradients, norm_type))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local_tensors(gradients), list(factors.unbind()))
    return norms


@torch.no_grad()
def clip_gradient_value_(params: Sequence[Tensor], clip_value: float) -> None:
    r"""Clamp every entry of every gradient: :math:`g_i \leftarrow \max(-c, \min(c, g_i))`.

    Args:
        params: Tensors whose ``.grad`` is clamped in place; those without one are left out.
        clip_value: The largest magnitude c, > 0.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([-3.0, 0.5, 4.0])
        >>> clip_gradient_value_([theta], 1.0)
        >>> theta.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    gradients = local_tensors(existing_gradients(params))
    if gradients:
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)


class GradientNormClipping(GradientClipping):
    r"""Scale the gradients down where their norm exceeds a bound: :math:`g \leftarrow g \min(1, c / (\|g\| + 10^{-6}))`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and after every other change of gradients.

    With the default selection it does what ``Trainer(gradient_clip_val=max_norm)`` does, to the last bit, and says how often.
    Sharded parameters (FSDP2) are clipped by their norm over all shards. A norm that is not finite is treated as in torch: the
    gradients become NaN or 0; :class:`NonFiniteGradientGuard` is there for that. Under ``FSDPStrategy`` (FSDP1), with all
    parameters and one norm for them, the root module's own ``clip_grad_norm_`` does it; that needs CUDA and has not been run.

    Args:
        max_norm: The largest norm c > 0, or a schedule; infinity only watches finite gradients.
        norm_type: The order of the norm, > 0; ``.inf`` for the largest magnitude.
        scope: ``"model"`` for one norm over all selected parameters, ``"tensor"`` for each tensor by itself.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a bound or an order that is not positive, a selection of nothing, a fused optimizer under float16
            loss scaling, or parts of a model under FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormClipping(1.0)], logger=False)

    Reference:
        R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training Recurrent Neural Networks", 2013.
    """

    phase = Phase.NORM_CLIPPING
    valid_ranges = {"max_norm": POSITIVE}
    supports_sparse = supports_fsdp1 = True
    deepspeed_alternative = "set Trainer(gradient_clip_val=…), which Lightning hands to the engine"

    def __init__(
        self,
        max_norm: Value,
        *,
        norm_type: float = 2.0,
        scope: Literal["model", "tensor"] = "model",
        params: Params = "all",
        name: str | None = None,
    ) -> None:
        check_choice("GradientNormClipping: scope", scope, ("model", "tensor"))
        self.max_norm = max_norm
        self.norm_type = POSITIVE.check("GradientNormClipping: norm_type", norm_type)
        self.scope = scope
        super().__init__(params, name)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and the root module that clips them where FSDP1 has flattened them."""
        super().attach(trainer, pl_module)
        self._root = _lightning.fsdp1_root(trainer)
        if self._root is not None and (self.params != "all" or self.scope != "model"):
            raise ValueError(
                f"{self.name}: under FSDPStrategy only params='all' with scope='model' can be clipped, got "
                f"params={self.params!r} with scope={self.scope!r}: use ModelParallelStrategy (FSDP2)"
            )

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clip, and keep the fraction of steps in which there was something to clip."""
        norms = self._clip(params)
        if not self.has_logger or (self._root is None and all(p.grad is None for p in params)) or not norms.numel():
            return
        norms = norms.view(-1)
        self.record_clipping(optimizer, norms.amax() if self.scope == "tensor" else norms[0], self.current["max_norm"])
        if self.logging:
            after = norms.clamp(max=self.current["max_norm"])
            for key, value in (("norm_before", norms), ("norm_after", after)):
                self.log_metrics(**{self.label(key, optimizer): torch.linalg.vector_norm(value, self.norm_type)})

    def _clip(self, params: list[Parameter]) -> Tensor:
        """Return the norms before clipping: one, or one for each tensor."""
        max_norm = self.current["max_norm"]
        if self._root is not None:
            norm: Tensor = self._root.clip_grad_norm_(max_norm, self.norm_type)
            return norm
        clip = clip_gradient_norm_per_tensor_ if self.scope == "tensor" else clip_gradient_norm_
        return clip(params, max_norm, self.norm_type)


class GradientValueClipping(GradientClipping):
    r"""Clamp every entry of the gradients: :math:`g_i \leftarrow \max(-c, \min(c, g_i))`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before clipping by norm.

    It changes the direction of the gradient; :class:`GradientNormClipping` does not.

    Args:
        clip_value: The largest magnitude c > 0, or a schedule; infinity does nothing.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a bound that is not positive, a selection of nothing, or a fused optimizer under float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientValueClipping(0.5)], logger=False)

    Reference:
        T. Mikolov, "Statistical Language Models Based on Neural Networks", 2012.
    """

    phase = Phase.VALUE_CLIPPING
    valid_ranges = {"clip_value": POSITIVE}
    supports_sparse = supports_fsdp1 = True
    deepspeed_alternative = "its engine clips by norm only: set Trainer(gradient_clip_val=…)"

    def __init__(self, clip_value: Value, *, params: Params = "all", name: str | None = None) -> None:
        self.clip_value = clip_value
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clamp the gradients, and keep how often and how many entries this changes."""
        clip_value, gradients = self.current["clip_value"], existing_gradients(params)
        if not gradients:
            return
        if self.has_logger:
            largest = total_norm(gradients, math.inf)
            self.record_clipping(optimizer, largest, clip_value)
        if self.logging:
            self.log_metrics(**{self.label("clipped_entries", optimizer): fraction_above(gradients, clip_value)})
        with self.logging_norms(params, optimizer):
            clip_gradient_value_(params, clip_value)


def _clip_factor(norm: Tensor, max_norm: float, gradients: Sequence[Tensor]) -> Tensor | float | None:
    """Return what gradients of some norm are multiplied by, or ``None`` where that is known to be 1."""
    if not is_cpu(norm) or {tensor.dtype for tensor in (norm, *gradients)} != {torch.float32}:
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # the same numbers, to the last bit, as on a device: torch divides by a tensor by multiplying with its reciprocal
    inverse = _float32(1.0 / _float32(norm.item() + _float32(1e-6)))
    factor = _float32(inverse * _float32(max_norm))
    return None if factor >= 1.0 else factor


def _float32(number: float) -> float:
    return c_float(number).value
