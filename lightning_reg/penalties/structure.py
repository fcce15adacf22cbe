"""Penalties on the distance of the weights from something: from orthogonality, from where they started."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import accumulation_dtype, sum_scalars
from lightning_reg._tensors.shards import full_tensor, local_tensors, shard_like
from lightning_reg.penalties.base import Penalty, Route
from lightning_reg.penalties.fused import one_node
from lightning_reg.penalties.norms import l2_penalty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


def orthogonality_penalty(params: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`R(W) = \frac{1}{2} \|W W^\top - I\|_F^2`, summed over all tensors.

    Each tensor is a matrix with a row for each output unit (dimension 0), the other dimensions flattened; where it has more
    rows than columns, :math:`W^\top W` takes the place of :math:`W W^\top`, the smaller of the two Gram matrices.

    Args:
        params: Tensors of two or more dimensions.

    Returns:
        A scalar, computed in float32 or better.

    Raises:
        ValueError: For a tensor of fewer dimensions.

    Example:
        >>> orthogonality_penalty([torch.eye(3)]), orthogonality_penalty([2 * torch.eye(3)])
        (tensor(0.), tensor(13.5000))

    Reference:
        A. Brock et al., "Neural Photo Editing with Introspective Adversarial Networks", 2017; N. Bansal et al., "Can We Gain
        More from Orthogonality Regularizations in Training Deep CNNs?", 2018.
    """
    return one_node(_orthogonality_value, _orthogonality_gradients, params)


def distance_penalty(params: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`R(w) = \frac{1}{2} \sum \|w - w^0\|^2`.

    Args:
        params: Tensors w.
        references: Tensors w⁰ of the same shapes.

    Returns:
        A scalar; its gradient is :math:`w - w^0`.

    Example:
        >>> distance_penalty([torch.tensor([3.0, 4.0])], [torch.zeros(2)])
        tensor(12.5000)
    """
    fixed = list(references)
    return one_node(partial(_distance_value, references=fixed), partial(_distance_gradients, references=fixed), params)


@torch.no_grad()
def add_distance_gradient_(params: Sequence[Tensor], references: Sequence[Tensor], strength: float) -> None:
    r"""Add the gradient of :math:`\frac{\lambda}{2} \sum \|w - w^0\|^2`, which is :math:`\lambda\,(w - w^0)`, to ``.grad``.

    Args:
        params: Tensors w; where there is no gradient yet, one is made.
        references: Tensors w⁰ of the same shapes.
        strength: λ.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> add_distance_gradient_([w], [torch.ones(2)], strength=0.5)
        >>> w.grad
        tensor([1.0000, 1.5000])
    """
    if params:
        gradients = dense_gradients(params)
        torch._foreach_add_(gradients, local_tensors(params), alpha=strength)
        torch._foreach_add_(gradients, local_tensors(references), alpha=-strength)


class OrthogonalityPenalty(Penalty):
    r"""Pull the units of each layer towards an orthonormal set: :math:`J = L + \frac{\lambda}{2} \|W W^\top - I\|_F^2`.

    Runs in: ``on_before_backward`` (loss route) or ``on_before_optimizer_step`` (gradient route), once per optimizer step.

    W has a row for each output unit, or is transposed where it has more rows than columns. Sharded parameters are gathered.

    Args:
        strength: λ ≥ 0, or a schedule.
        params: Which parameters, of two or more dimensions: ``"weights"``, globs, or a callable
            ``(name, parameter, module) -> bool``.
        inject: ``"loss"``, ``"gradient"``, or ``"auto"``: the loss wherever that is exact.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing or of vectors, or a route that cannot be exact.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[OrthogonalityPenalty(1e-4)], logger=False)

    Reference:
        A. Brock et al., "Neural Photo Editing with Introspective Adversarial Networks", 2017; N. Bansal et al., "Can We Gain
        More from Orthogonality Regularizations in Training Deep CNNs?", 2018.
    """

    supports_fsdp1 = False

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return ½‖WWᵀ − I‖²."""
        return orthogonality_penalty([full_tensor(p) for p in params])

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and refuse vectors."""
        super().attach(trainer, pl_module)
        vectors = [name for name, p in self.tensors.items() if not is_lazy(p) and p.ndim < 2]
        if vectors:
            raise ValueError(f"{self.name}: vectors have no Gram matrix, got {', '.join(vectors)}: leave them out of params")


class StartingPointPenalty(Penalty):
    r"""Stay near where training started (L2-SP): :math:`J = L + \frac{\lambda}{2} \sum \|w - w^0\|^2`.

    Runs in: ``on_before_backward`` (loss route) or ``on_before_optimizer_step`` (gradient route), once per optimizer step.

    For fine-tuning: w⁰ are the weights when the first fit starts. They are kept in the checkpoint, so a resumed run pulls
    towards the same place, at the price of a copy of the selected weights.

    Args:
        strength: λ ≥ 0, or a schedule.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"``, ``"gradient"`` (no graph: for large models), or ``"auto"``: the loss wherever that is exact.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, a selection of nothing, a route that cannot be exact, or a starting point of
            other names or shapes than the model's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StartingPointPenalty(0.1, params=["weights", "!head.*"])], logger=False)

    Reference:
        X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", 2018.
    """

    state_entries = ("start",)
    resets_each_fit = False

    def __init__(self, strength: Value, *, params: Params = "weights", inject: Route = "auto", name: str | None = None) -> None:
        super().__init__(strength, params=params, inject=inject, name=name)
        self._references: dict[int, Tensor] = {}

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return ½Σ‖w − w⁰‖²."""
        return distance_penalty(params, self.references(params))

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ (w − w⁰)."""
        add_distance_gradient_(params, self.references(params), strength)

    def references(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return where parameters started."""
        return [self._references[id(p)] for p in params]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up; keep them if no fit or checkpoint has given a starting point yet."""
        super().attach(trainer, pl_module)
        if lazy := [name for name, p in self.tensors.items() if is_lazy(p)]:
            raise ValueError(
                f"{self.name}: {', '.join(lazy)} of a lazy module has no start: give the model a batch before the fit"
            )
        if not self.state["start"]:
            self.state["start"].update((name, p.detach().clone()) for name, p in self.tensors.items())
        self._bind()

    def detach(self) -> None:
        """Let go of the tensors, not of the starting point."""
        super().detach()
        self._references.clear()

    def _bind(self) -> None:
        """Lay the starting point beside the parameters: on their devices, and sharded as they are."""
        for name, p in self.tensors.items():
            start = self.state["start"].get(name)
            if start is None or start.shape != p.shape:
                found = "nothing" if start is None else f"shape {tuple(start.shape)}"
                raise ValueError(
                    f"{self.name}: the starting point has {found} for {name!r} of shape {tuple(p.shape)}: it is of another "
                    "model or selection; use a new callback, or fit without the checkpoint's"
                )
            self._references[id(p)] = start if isinstance(start, DTensor) else shard_like(start.to(p.device, p.dtype), p)

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Take over the starting point of the run that is resumed."""
        super().unpack_state(packed)
        self._bind()


def _matrix(p: Tensor) -> Tensor:
    """Return a tensor as the matrix whose smaller Gram matrix is that of its rows."""
    if p.ndim < 2:
        raise ValueError(f"orthogonality needs tensors of two or more dimensions, got shape {tuple(p.shape)}")
    matrix = p.flatten(1).to(accumulation_dtype(p.dtype))
    return matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix


def _excess(matrix: Tensor) -> Tensor:
    """Return the Gram matrix less the identity."""
    gram = matrix @ matrix.t()
    gram.diagonal().sub_(1)
    return gram


def _orthogonality_value(params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    excesses = [_excess(_matrix(p)) for p in params]
    return sum_scalars([excess.square().sum() for excess in excesses]) / 2, excesses


def _orthogonality_gradients(params: Sequence[Tensor], factor: Tensor, excesses: Sequence[Tensor]) -> Sequence[Tensor]:
    gradients = []
    for p, excess in zip(params, excesses, strict=True):
        gradient = (2 * factor) * excess @ _matrix(p)
        gradients.append((gradient if len(gradient) == len(p) else gradient.t()).reshape(p.shape).to(p.dtype))
    return gradients


def _distance_value(params: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[Tensor, None]:
    apart = [p - reference for p, reference in zip(params, references, strict=True)]
    return l2_penalty(apart), None


def _distance_gradients(params: Sequence[Tensor], factor: Tensor, kept: None, references: Sequence[Tensor]) -> Sequence[Tensor]:
    gradients = list(torch._foreach_sub(list(params), list(references)))
    torch._foreach_mul_(gradients, factor)
    return gradients
