"""Penalties on the magnitude of each weight: L1, L2, and both together."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg._engine.arguments import NON_NEGATIVE
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.chunks import CHUNK_ENTRIES, batched_chunks, chunks, list_chunks, sum_entries
from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import in_accumulation_dtype, is_cpu, magnitudes, real_pairs, sum_scalars, tensor_norms
from lightning_reg._tensors.shards import full_tensor, local_tensors
from lightning_reg.penalties.elementwise import ElementwisePenalty
from lightning_reg.penalties.fused import fused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.penalties.base import Route
    from lightning_reg.penalties.fused import GradientFunction, PlainFunction, ValueFunction
    from lightning_reg.schedules import Value


def l1_penalty(params: Tensors) -> Tensor:
    """Return R(θ) = Σ|θ| over all entries of all tensors.

    The subgradient at 0 is 0. Half-precision tensors are summed in float32. Small tensors share one node of the autograd graph,
    and each large tensor has its own. Higher derivatives, ``torch.func``, and ``torch.compile`` work too.

    Args:
        params: Tensors of any shapes. For complex ones, |θ| is the magnitude.

    Returns:
        A scalar. Its gradient with respect to a tensor is the sign of each entry, or θ/|θ|.

    Example:
        >>> theta = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
        >>> l1_penalty([theta]).backward()
        >>> theta.grad
        tensor([ 1., -1.,  0.])

    Reference:
        R. Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    """
    params = tensor_list("l1_penalty: params", params)
    return _fused_by_size(_plain_l1, _l1_value, _l1_gradients, magnitudes(params))


def l2_penalty(params: Tensors) -> Tensor:
    """Return R(θ) = ½ Σθ² over all entries of all tensors.

    Half-precision tensors are summed in float32. Small tensors share one node of the autograd graph, and each large tensor has
    its own. Higher derivatives, ``torch.func``, and ``torch.compile`` work too.

    Args:
        params: Tensors of any shapes. For complex ones, θ² is |θ|².

    Returns:
        A scalar. Its gradient with respect to a tensor is the tensor itself.

    Example:
        >>> theta = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> l2_penalty([theta])
        tensor(2.5000, grad_fn=<_FusedBackward>)

    Reference:
        A. E. Hoerl, R. W. Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", 1970.
    """
    params = tensor_list("l2_penalty: params", params)
    return _fused_by_size(_plain_l2, _l2_value, _l2_gradients, real_pairs(params))


@torch.no_grad()
def add_l1_gradient_(params: Tensors, strength: float) -> None:
    """Add the gradient of λ Σ|θ| to ``.grad``: g ← g + λ sign(θ).

    Args:
        params: Tensors. A missing ``.grad`` counts as zeros and is created.
        strength: The strength λ.

    Example:
        >>> theta = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
        >>> add_l1_gradient_([theta], strength=0.5)
        >>> theta.grad
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    params = tensor_list("add_l1_gradient_: params", params)
    tensors, gradients = local_tensors(params), dense_gradients(params)
    if all(map(is_cpu, tensors)):
        for source, buffer, signs, chunk_gradients in batched_chunks(tensors, gradients):
            torch.sgn(source, out=buffer)  # the sign of a real number, z/|z| of a complex one
            torch._foreach_add_(chunk_gradients, signs, alpha=strength)
    else:
        for sources, chunk_gradients in list_chunks(tensors, gradients):
            torch._foreach_add_(chunk_gradients, _signs(sources), alpha=strength)


@torch.no_grad()
def add_l2_gradient_(params: Tensors, strength: float) -> None:
    """Add the gradient of (λ/2) Σθ² to ``.grad``: g ← g + λθ.

    Args:
        params: Tensors. A missing ``.grad`` counts as zeros and is created.
        strength: The strength λ.

    Example:
        >>> theta = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> add_l2_gradient_([theta], strength=0.5)
        >>> theta.grad
        tensor([ 0.5000, -1.0000])
    """
    params = tensor_list("add_l2_gradient_: params", params)
    if params:
        torch._foreach_add_(dense_gradients(params), local_tensors(params), alpha=strength)


class L1Penalty(ElementwisePenalty):
    """Lasso (L1 regularization): J = L + λ Σ|θ|.

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    Pulls each weight toward zero with the same force, regardless of its magnitude.
    Gradient steps leave weights near zero, not exactly at it. For exact zeros, use ``SoftThresholding``.
    Works with sharded and complex parameters.

    Args:
        strength: The strength λ ≥ 0, or a schedule. Typical values are 1e-5 to 1e-3, for a loss that is a mean over samples.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``, without an autograd
            graph, for large models. ``"auto"`` uses the loss wherever that is exact, and the gradients otherwise.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, ``inject="loss"`` is not exact in this run, or the
            penalty is added to the gradients of a fused optimizer under float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[L1Penalty(1e-4)], logger=False)

    Reference:
        R. Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
    """

    supports_complex = True

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return Σ|θ|."""
        return l1_penalty(params)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ sign(θ)."""
        add_l1_gradient_(params, strength)

    def entry_gradients(self, weights: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
        """Return sign(θ)."""
        return torch.sgn(weights, out=out)


class L2Penalty(ElementwisePenalty):
    """Ridge (L2 regularization): J = L + (λ/2) Σθ².

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    Its gradient is λθ, so it equals ``weight_decay=λ`` in SGD, and with ``inject="gradient"`` the two match bit for bit.
    If your source omits the factor ½, use twice its λ. If it uses the norm without the square, λ‖θ‖, subclass ``Penalty``.
    With Adam, it is not the decoupled weight decay of AdamW, because Adam rescales the gradient of the penalty like any other.
    For decoupled decay, use ``WeightDecay``.
    Warns if the optimizer also decays the same parameters.
    Works with sharded and complex parameters.

    Args:
        strength: The strength λ ≥ 0, or a schedule. Typical values are 1e-5 to 1e-2, for a loss that is a mean over samples.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``, without an autograd
            graph, for large models. ``"auto"`` uses the loss wherever that is exact, and the gradients otherwise.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, ``inject="loss"`` is not exact in this run, or the
            penalty is added to the gradients of a fused optimizer under float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[L2Penalty(1e-3, params=["weights", "!head.*"])], logger=False)

    Reference:
        A. E. Hoerl, R. W. Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems", 1970.
    """

    supports_complex = True

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return ½ Σθ²."""
        return l2_penalty(params)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λθ."""
        add_l2_gradient_(params, strength)

    def entry_gradients(self, weights: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
        """Return θ."""
        return weights

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and warn if the optimizer decays them too."""
        super().attach(trainer, pl_module)
        self.warn_of_second_decay(trainer)


class ElasticNetPenalty(ElementwisePenalty):
    """Elastic net (L1 and L2 together): J = L + λ₁ Σ|θ| + (λ₂/2) Σθ².

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    It equals scikit-learn's ``ElasticNet(alpha, l1_ratio)`` with ``l1 = alpha * l1_ratio``, ``l2 = alpha * (1 - l1_ratio)``,
    and half the mean squared error as the loss.
    Gradient steps leave weights near zero, not exactly at it. For exact zeros, use ``L2Penalty`` with ``SoftThresholding``.
    Works with sharded and complex parameters.

    Args:
        l1: The strength λ₁ ≥ 0 of the L1 part, or a schedule.
        l2: The strength λ₂ ≥ 0 of the L2 part, or a schedule.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``, without an autograd
            graph, for large models. ``"auto"`` uses the loss wherever that is exact, and the gradients otherwise.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``l1`` or ``l2`` is negative or NaN, nothing is selected, ``inject="loss"`` is not exact in this run, or
            the penalty is added to the gradients of a fused optimizer under float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ElasticNetPenalty(1e-4, 1e-3)], logger=False)

    Reference:
        H. Zou, T. Hastie, "Regularization and Variable Selection via the Elastic Net", 2005.
    """

    supports_complex = True
    valid_ranges = {"l1": NON_NEGATIVE, "l2": NON_NEGATIVE}

    def __init__(
        self,
        l1: Value,
        l2: Value,
        *,
        params: Params = "weights",
        inject: Route = "auto",
        name: str | None = None,
    ) -> None:
        self.l1 = l1
        self.l2 = l2
        super().__init__(1.0, params=params, inject=inject, name=name)

    @property
    def scale(self) -> float:
        """The factor of ``value``, which already contains the strengths: 1, or 0 if both strengths are 0."""
        return float(bool(self.current["l1"] or self.current["l2"]))

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return λ₁ Σ|θ| + (λ₂/2) Σθ²."""
        l1, l2 = self.current["l1"], self.current["l2"]
        if any(p.is_complex() for p in params):
            return l1 * l1_penalty(params) + l2 * l2_penalty(params)
        return _fused_by_size(_plain_elastic_net, _elastic_net_value, _elastic_net_gradients, params, l1=l1, l2=l2)

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ₁ sign(θ) + λ₂ θ."""
        if self.current["l1"]:
            add_l1_gradient_(params, strength * self.current["l1"])
        if self.current["l2"]:
            add_l2_gradient_(params, strength * self.current["l2"])

    def entry_gradients(self, weights: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
        """Return λ₁ sign(θ) + λ₂ θ."""
        return torch.sgn(weights, out=out).mul_(self.current["l1"]).add_(weights, alpha=self.current["l2"])


def _fused_by_size(
    plain: PlainFunction, value: ValueFunction, gradients: GradientFunction, params: Sequence[Tensor], **constants: float
) -> Tensor:
    """Return a sum over all tensors, with one autograd node for all small tensors and one for each large tensor.

    A shared node saves calls. A separate node lets autograd free the gradient of a large tensor before it computes the next
    one.
    """
    small = [p for p in params if p.numel() <= CHUNK_ENTRIES]
    parts = [*([p] for p in params if p.numel() > CHUNK_ENTRIES), *([small] if small else [])]
    return sum_scalars([fused(plain, value, gradients, part, **constants) for part in parts or [small]])


_MAX_TENSORS, _MAX_ENTRIES = 8, 1 << 12
"""The most tensors, and the most entries in each, for which torch's norms on the CPU are accurate and faster than chunks."""


def _norms_suffice(params: Sequence[Tensor]) -> bool:
    """Return whether torch's norms can compute the sums; on the CPU they lose digits over many entries."""
    return not params[0].is_cpu or (len(params) <= _MAX_TENSORS and all(p.numel() <= _MAX_ENTRIES for p in params))


def _signs(tensors: Sequence[Tensor]) -> list[Tensor]:
    if any(tensor.is_complex() for tensor in tensors):
        return [torch.sgn(tensor) for tensor in tensors]
    return list(torch._foreach_sign(list(tensors)))


def _plain_l1(params: Sequence[Tensor]) -> Tensor:
    return sum_scalars([full_tensor(in_accumulation_dtype(p).abs().sum()) for p in params])


def _l1_value(params: Sequence[Tensor]) -> tuple[Tensor, None]:
    if _norms_suffice(params):
        return sum_scalars(tensor_norms(params, 1)), None
    return sum_entries(params, torch.abs), None


def _l1_gradients(params: Sequence[Tensor], factor: Tensor, saved: None) -> Sequence[Tensor]:
    if len(params) > 1:
        signs = list(torch._foreach_sign(list(params)))
        torch._foreach_mul_(signs, factor)
        return signs
    gradients = [torch.empty_like(p) for p in params]
    for gradient, p in chain.from_iterable(map(chunks, gradients, params)):
        torch.sign(p, out=gradient).mul_(factor)
    return gradients


def _plain_l2(params: Sequence[Tensor]) -> Tensor:
    return sum_scalars([full_tensor(in_accumulation_dtype(p).square().sum()) for p in params]) / 2


def _l2_value(params: Sequence[Tensor]) -> tuple[Tensor, None]:
    if _norms_suffice(params):
        return sum_scalars(torch._foreach_pow(tensor_norms(params, 2), 2)) / 2, None
    return sum_entries(params, torch.square) / 2, None


def _l2_gradients(params: Sequence[Tensor], factor: Tensor, saved: None) -> Sequence[Tensor]:
    return list(torch._foreach_mul(list(params), factor))


def _plain_elastic_net(params: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    return l1 * _plain_l1(params) + l2 * _plain_l2(params)


def _elastic_net_value(params: Sequence[Tensor], l1: float, l2: float) -> tuple[Tensor, None]:
    return l1 * _l1_value(params)[0] + l2 * _l2_value(params)[0], None


def _elastic_net_gradients(params: Sequence[Tensor], factor: Tensor, saved: None, l1: float, l2: float) -> Sequence[Tensor]:
    gradients = list(torch._foreach_sign(list(params)))
    torch._foreach_mul_(gradients, l1)
    torch._foreach_add_(gradients, list(params), alpha=l2)
    torch._foreach_mul_(gradients, factor)
    return gradients
