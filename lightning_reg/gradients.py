"""Gradient processing: what happens to the gradients between the backward pass and the optimizer's update."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_reg.base import Phase
from lightning_reg.configuration import POSITIVE
from lightning_reg.parameters import ParameterRegularizer
from lightning_reg.tensors import fraction_beyond, joint_norm, locals_of, present_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg.schedules import Value
    from lightning_reg.selection import Params

__all__ = [
    "GradientNormClipping",
    "GradientValueClipping",
    "PeakGradientDropping",
    "clip_gradient_norm_",
    "clip_gradient_value_",
    "drop_peak_gradients_",
]


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
    gradients = present_gradients(params)
    norm = joint_norm(gradients, norm_type)
    if gradients:
        torch._foreach_mul_(locals_of(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
    gradients = locals_of(present_gradients(params))
    if gradients:
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)


@torch.no_grad()
def drop_peak_gradients_(params: Sequence[Tensor], k: int = 1) -> None:
    r"""Set the k entries of largest magnitude in each tensor's gradient to 0.

    Args:
        params: Tensors whose ``.grad`` is changed in place; those without one are left out.
        k: How many entries of each tensor, ≥ 0; exactly that many, however many are tied.

    Raises:
        ValueError: For a sparse gradient.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> theta.grad = torch.tensor([-3.0, 0.5, 2.0])
        >>> drop_peak_gradients_([theta], k=1)
        >>> theta.grad
        tensor([0.0000, 0.5000, 2.0000])
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("peak dropping needs a dense gradient, got a sparse one: make the embedding with sparse=False")
        if p.grad is not None and k > 0:
            peaks = p.grad.abs().flatten().topk(min(k, p.grad.numel())).indices
            p.grad.put_(peaks, torch.zeros_like(peaks, dtype=p.grad.dtype))


class _GradientProcessing(ParameterRegularizer):
    """What the gradient callbacks share: unscaled gradients, and their norm before and after on logging steps."""

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and check that their gradients will be unscaled."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)

    @contextmanager
    def watched(self, params: list[Parameter]) -> Iterator[None]:
        """Log the norm of the gradients before and after what happens within."""
        if self.logging:
            self.observe(norm_before=joint_norm(present_gradients(params)))
        yield
        if self.logging:
            self.observe(norm_after=joint_norm(present_gradients(params)))

    def route(self) -> str:
        """Say that it acts before the step."""
        return "before the step"


class _GradientClipping(_GradientProcessing):
    """What clipping adds: a warning where the Trainer clips too."""

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of clipping twice."""
        super().prepare(trainer, pl_module)
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"{self.name} and Trainer(gradient_clip_val={trainer.gradient_clip_val}) both clip the gradients, the callback "
                "first: remove one of them"
            )


class GradientNormClipping(_GradientClipping):
    r"""Scale the gradients down where their norm exceeds a bound: :math:`g \leftarrow g \min(1, c / (\|g\| + 10^{-6}))`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and after every other change of gradients.

    With the default selection it does what ``Trainer(gradient_clip_val=max_norm)`` does, to the last bit, and says how often.
    A norm that is not finite is treated as in torch: the gradients become NaN or 0.

    Args:
        max_norm: The largest norm c > 0, or a schedule; infinity only watches.
        norm_type: The order of the norm, > 0; ``.inf`` for the largest magnitude.
        scope: ``"model"`` for one norm over all selected parameters, ``"tensor"`` for each tensor by itself.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a bound or an order that is not positive, a selection of nothing, or a fused optimizer under float16
            loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormClipping(1.0)], logger=False)

    Reference:
        R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training Recurrent Neural Networks", 2013.
    """

    phase = Phase.NORM_CLIPPING
    limits = {"max_norm": POSITIVE}
    instead_of_deepspeed = "set Trainer(gradient_clip_val=…), which Lightning hands to the engine"

    def __init__(
        self,
        max_norm: Value,
        *,
        norm_type: float = 2.0,
        scope: Literal["model", "tensor"] = "model",
        params: Params = "all",
        name: str | None = None,
    ) -> None:
        if scope not in ("model", "tensor"):
            raise ValueError(f"GradientNormClipping: scope must be 'model' or 'tensor', got {scope!r}")
        self.max_norm = max_norm
        self.norm_type = POSITIVE.check("GradientNormClipping: norm_type", norm_type)
        self.scope = scope
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Clip, and keep the fraction of steps in which there was something to clip."""
        max_norm = self.current["max_norm"]
        groups = [params] if self.scope == "model" else [[p] for p in params]
        norms = [clip_gradient_norm_(group, max_norm, self.norm_type) for group in groups]
        if self.listening:
            self.average(clipped_steps=(torch.stack(norms).max() > max_norm).float())
        if self.logging:
            before = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
            after = torch.linalg.vector_norm(torch.stack(norms).clamp(max=max_norm), self.norm_type)
            self.observe(norm_before=before, norm_after=after)


class GradientValueClipping(_GradientClipping):
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
    limits = {"clip_value": POSITIVE}
    instead_of_deepspeed = "its engine clips by norm only: set Trainer(gradient_clip_val=…)"

    def __init__(self, clip_value: Value, *, params: Params = "all", name: str | None = None) -> None:
        self.clip_value = clip_value
        super().__init__(params, name)

    def gradients(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Clamp the gradients, and keep the fraction of entries that this changes."""
        clip_value = self.current["clip_value"]
        if self.logging:
            self.observe(clipped_entries=fraction_beyond(present_gradients(params), clip_value))
        with self.watched(params):
            clip_gradient_value_(params, clip_value)


class PeakGradientDropping(_GradientProcessing):
    r"""Set the k largest entries of each parameter's gradient to 0: where :math:`|g_i|` peaks, :math:`g_i \leftarrow 0`.

    Runs in: ``on_before_optimizer_step``, once per optimizer step, after unscaling and before every clipping.

    The rule of the article that this project grew from, under the name "gradient clipping": no entry may dominate the step.
    A tensor of k entries or fewer would never learn; a warning names such tensors when the fit starts.

    Args:
        k: How many entries of each tensor, ≥ 0; 0 does nothing.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative k, a selection of nothing, sharded parameters, sparse gradients, or a fused optimizer under
            float16 loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PeakGradientDropping(k=1, params="weights")], logger=False)
    """

    phase = Phase.PEAK_DROPPING
    whole_tensors = True

    def __init__(self, k: int = 1, *, params: Params = "all", name: str | None = None) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(f"PeakGradientDropping: k must be a whole number ≥ 0, got {k!r}")
        self.k = k
        super().__init__(params, name)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, refuse sparse gradients, and name those that would never learn."""
        super().attach(trainer, pl_module)
        embeddings = ((name, m) for name, m in pl_module.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        sparse = {id(module.weight): name for name, module in embeddings if module.sparse}
        if any(id(p) in sparse for p in self.tensors.values()):
            names = ", ".join(sparse.values())
            raise ValueError(f"{self.name} needs dense gradients: make {names} with sparse=False, or leave it out of params")
        starved = [name for name, p in self.tensors.items() if p.requires_grad and not is_lazy(p) and 0 < p.numel() <= self.k]
        if starved:
            rank_zero_warn(
                f"{self.name} drops all {self.k} or fewer entries of {', '.join(starved)}, which will not learn: leave such "
                f"parameters out, as in params={['all', *('!' + name for name in starved)]}"
            )

    def gradients(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Drop the peaks."""
        with self.watched(params):
            drop_peak_gradients_(params, self.k)
