"""Gradient clipping by a given bound: on the norm, or on each entry."""

from __future__ import annotations

import math
from ctypes import c_float
from typing import TYPE_CHECKING, Literal

import torch

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import POSITIVE, check_choice
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.gradients import changeable_gradients, existing_gradients, scalable_gradients
from lightning_reg._tensors.reductions import fraction_above, is_cpu, tensor_norms, total_norm
from lightning_reg._tensors.shards import local_tensors
from lightning_reg.gradients.base import GradientClipping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.command_line import Infinity
    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def clip_gradient_norm_(params: Tensors, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients by one factor, so that their total norm is at most c: g ← g · min(1, c / (‖g‖ + 10⁻⁶)).

    The result equals that of ``torch.nn.utils.clip_grad_norm_``. Unlike torch, it also clips sparse gradients. If the norm is
    not finite, the gradients become NaN or 0, as in torch.

    Args:
        params: Tensors whose ``.grad`` is scaled in place. Those without one are skipped.
        max_norm: The largest norm c > 0.
        norm_type: The order of the norm, > 0. Infinity takes the largest magnitude.

    Returns:
        A scalar, the total norm before clipping.

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
    params = tensor_list("clip_gradient_norm_: params", params)
    gradients = existing_gradients(params)
    norm = total_norm(gradients, norm_type)
    if gradients and (factor := _clip_factor(norm, max_norm, gradients)) is not None:
        torch._foreach_mul_(local_tensors(scalable_gradients(params)), factor)
    return norm


@torch.no_grad()
def clip_gradient_norm_per_tensor_(params: Tensors, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale the gradient of each tensor separately, so that its norm is at most c: g ← g · min(1, c / (‖g‖ + 10⁻⁶)).

    Args:
        params: Tensors whose ``.grad`` is scaled in place. Those without one are skipped.
        max_norm: The largest norm c > 0.
        norm_type: The order of the norm, > 0. Infinity takes the largest magnitude.

    Returns:
        A vector of the norms before clipping, with an entry for each tensor that is not empty and has a gradient.

    Example:
        >>> params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
        >>> params[0].grad, params[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
        >>> clip_gradient_norm_per_tensor_(params, max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> params[0].grad, params[1].grad
        (tensor([0.6000, 0.8000]), tensor([0.5000]))
    """
    params = tensor_list("clip_gradient_norm_per_tensor_: params", params)
    gradients = existing_gradients(params)
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(tensor_norms(gradients, norm_type))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local_tensors(scalable_gradients(params)), list(factors.unbind()))
    return norms


@torch.no_grad()
def clip_gradient_value_(params: Tensors, clip_value: float) -> None:
    """Clamp each entry of the gradients: g ← max(−c, min(c, g)).

    Args:
        params: Tensors whose ``.grad`` is clamped in place. Those without one are skipped.
        clip_value: The largest magnitude c > 0.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([-3.0, 0.5, 4.0])
        >>> clip_gradient_value_([theta], 1.0)
        >>> theta.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    params = tensor_list("clip_gradient_value_: params", params)
    gradients = local_tensors(changeable_gradients(params, lambda values: values.abs() > clip_value))
    if gradients:
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)


class GradientNormClipping(GradientClipping):
    """Clip the norm of the gradients: g ← g · min(1, c / (‖g‖ + 10⁻⁶)).

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and all other gradient processing.

    The norm covers the selected parameters of the optimizer that steps, so each of several optimizers has its own norm. By
    default, the result equals that of ``Trainer(gradient_clip_val=max_norm)`` bit for bit. The callback also logs how often it
    clips.
    If the norm is not finite, the gradients become NaN or 0, as in torch. ``NonFiniteGradientGuard`` prevents that.
    For sharded parameters (FSDP2), the norm is computed over all shards.
    Under ``FSDPStrategy`` (FSDP1), the callback calls the root module's ``clip_grad_norm_``, which needs CUDA. This is
    untested.

    Args:
        max_norm: The largest norm c > 0, or a schedule. Infinity leaves finite gradients alone and only logs.
        norm_type: The order of the norm, > 0. Infinity (``.inf`` in YAML) takes the largest magnitude.
        scope: ``"model"`` for one norm over all selected parameters of the optimizer, ``"tensor"`` to clip each tensor
            separately.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``max_norm`` or ``norm_type`` is not positive, ``scope`` is neither ``"model"`` nor ``"tensor"``, nothing
            is selected, a fused optimizer is used under float16 loss scaling, or FSDP1 is used without ``params="all"`` and
            ``scope="model"``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormClipping(1.0)], logger=False)

    Reference:
        R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training Recurrent Neural Networks", 2013.
    """

    phase = Phase.NORM_CLIPPING
    supports_complex = True
    valid_ranges = {"max_norm": POSITIVE}
    fit_attributes = ("_root",)
    supports_sparse = supports_fsdp1 = True
    deepspeed_alternative = "set Trainer(gradient_clip_val=…), which Lightning passes to the engine"

    def __init__(
        self,
        max_norm: Value,
        *,
        norm_type: float | Infinity = 2.0,
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
        """Look up the parameters, and the root module that must clip them under FSDP1."""
        super().attach(trainer, pl_module)
        self._root = _lightning.fsdp1_root(trainer)
        if self._root is not None and (self.params != "all" or self.scope != "model"):
            raise ValueError(
                f"{self.name}: under FSDPStrategy, clipping needs params='all' and scope='model', got params={self.params!r} "
                f"and scope={self.scope!r}: use ModelParallelStrategy (FSDP2)"
            )

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Clip, and count the steps in which a norm was clipped."""
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
        """Clip, and return the norms before it: one for the model, or one for each tensor."""
        max_norm = self.current["max_norm"]
        if self._root is not None:
            norm: Tensor = self._root.clip_grad_norm_(max_norm, self.norm_type)
            return norm
        clip = clip_gradient_norm_per_tensor_ if self.scope == "tensor" else clip_gradient_norm_
        return clip(params, max_norm, self.norm_type)


class GradientValueClipping(GradientClipping):
    """Clamp each entry of the gradients: g ← max(−c, min(c, g)).

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before norm clipping.

    Clamping changes the direction of the gradient. ``GradientNormClipping`` does not.
    An infinite entry becomes c or −c, and NaN stays NaN.
    Works with sharded parameters.

    Args:
        clip_value: The largest magnitude c > 0, or a schedule. Infinity does nothing.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``clip_value`` is not positive, nothing is selected, or a fused optimizer is used under float16 loss
            scaling.

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
        """Clamp the gradients, and count the steps and the entries that changed."""
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
    """Return min(1, max_norm / (norm + 1e-6)), or ``None`` if it is known to be 1, so that no multiplication is needed."""
    if not is_cpu(norm) or {tensor.dtype for tensor in (norm, *gradients)} != {torch.float32}:
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # On the CPU the norm can be read without waiting, and Python floats are faster than scalar tensors. Each result is rounded
    # to float32, and the division is a product with the reciprocal, as in torch, so that the factor has the same bits.
    inverse = _float32(1.0 / _float32(norm.item() + _float32(1e-6)))
    factor = _float32(inverse * _float32(max_norm))
    return None if factor >= 1.0 else factor


def _float32(number: float) -> float:
    return c_float(number).value
