"""Penalties on the distance of the weights from a target: from orthogonality, or from where they started."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_reg._engine.identity import WeakIdentity
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.gradients import dense_gradients
from lightning_reg._tensors.reductions import accumulation_dtype, sum_scalars
from lightning_reg._tensors.shards import full_tensor, local_tensors, shard_like
from lightning_reg.penalties.base import Penalty, Route
from lightning_reg.penalties.elementwise import ElementwisePenalty
from lightning_reg.penalties.fused import fused
from lightning_reg.penalties.norms import l2_penalty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


def orthogonality_penalty(params: Tensors) -> Tensor:
    """Return R(W) = ½ ‖WWᵀ − I‖²_F, summed over all tensors.

    W is a tensor with all dimensions but the first flattened. If W has more rows than columns, WᵀW replaces WWᵀ, because it is
    the smaller of the two Gram matrices.

    Args:
        params: Tensors with two or more dimensions.

    Returns:
        A scalar, computed in float32 or better. Higher derivatives, ``torch.func``, and ``torch.compile`` work too.

    Raises:
        ValueError: If a tensor has fewer than two dimensions.

    Example:
        >>> orthogonality_penalty([torch.eye(3)]), orthogonality_penalty([2 * torch.eye(3)])
        (tensor(0.), tensor(13.5000))

    Reference:
        A. Brock et al., "Neural Photo Editing with Introspective Adversarial Networks", 2017; N. Bansal et al., "Can We Gain
        More from Orthogonality Regularizations in Training Deep CNNs?", 2018.
    """
    params = tensor_list("orthogonality_penalty: params", params)
    return fused(_plain_orthogonality, _orthogonality_value, _orthogonality_gradients, params)


def distance_penalty(params: Tensors, references: Tensors) -> Tensor:
    """Return R(w) = ½ Σ‖w − w⁰‖².

    Args:
        params: Tensors w.
        references: Tensors w⁰ of the same shapes.

    Returns:
        A scalar. Its gradient with respect to w is w − w⁰. No gradient reaches w⁰. Higher derivatives, ``torch.func``, and
        ``torch.compile`` work too.

    Example:
        >>> distance_penalty([torch.tensor([3.0, 4.0])], [torch.zeros(2)])
        tensor(12.5000)
    """
    params = tensor_list("distance_penalty: params", params)
    references = tensor_list("distance_penalty: references", references, len(params))
    return fused(_plain_distance, _distance_value, _distance_gradients, params, references=list(references))


@torch.no_grad()
def add_distance_gradient_(params: Tensors, references: Tensors, strength: float) -> None:
    """Add the gradient of (λ/2) Σ‖w − w⁰‖² to ``.grad``: g ← g + λ (w − w⁰).

    Args:
        params: Tensors w. A missing ``.grad`` counts as zeros and is created.
        references: Tensors w⁰ of the same shapes.
        strength: The strength λ.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> add_distance_gradient_([w], [torch.ones(2)], strength=0.5)
        >>> w.grad
        tensor([1.0000, 1.5000])
    """
    params = tensor_list("add_distance_gradient_: params", params)
    references = tensor_list("add_distance_gradient_: references", references, len(params))
    if params:
        gradients = dense_gradients(params)
        torch._foreach_add_(gradients, local_tensors(params), alpha=strength)
        torch._foreach_add_(gradients, local_tensors(references), alpha=-strength)


class OrthogonalityPenalty(Penalty):
    """Pull the units of each layer toward an orthonormal set: J = L + (λ/2) ‖WWᵀ − I‖²_F.

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    W is a weight with all dimensions but the first flattened, so it has one row for each output unit of a linear layer or a
    convolution. If W has more rows than columns, WᵀW replaces WWᵀ.
    Works with sharded parameters (FSDP2), which each rank gathers. FSDP1 is not supported.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        params: The parameters to act on, with two or more dimensions: ``"weights"`` (no biases or normalization parameters), a
            glob, a list of these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``. ``"auto"`` uses the
            loss wherever that is exact, and the gradients otherwise.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, a selected parameter has fewer than two dimensions,
            ``inject="loss"`` is not exact in this run, the penalty is added to the gradients of a fused optimizer under float16
            loss scaling, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[OrthogonalityPenalty(1e-4)], logger=False)

    Reference:
        A. Brock et al., "Neural Photo Editing with Introspective Adversarial Networks", 2017; N. Bansal et al., "Can We Gain
        More from Orthogonality Regularizations in Training Deep CNNs?", 2018.
    """

    sums_over_tensors = True
    supports_fsdp1 = False

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return ½ ‖WWᵀ − I‖²_F."""
        return orthogonality_penalty([full_tensor(p) for p in params])

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and raise an error for vectors."""
        super().attach(trainer, pl_module)
        vectors = [name for name, p in self.tensors.items() if not is_lazy(p) and p.ndim < 2]
        if vectors:
            raise ValueError(
                f"{self.name} needs parameters with two or more dimensions, got {', '.join(vectors)}: exclude them from params"
            )


class StartingPointPenalty(ElementwisePenalty):
    """Stay close to the initial weights (L2-SP): J = L + (λ/2) Σ‖w − w⁰‖².

    Runs in: ``on_before_backward`` (added to the loss) or ``on_before_optimizer_step`` (added to the gradients), once per
    optimizer step.

    For fine-tuning: w⁰ are the weights when the first fit of a model starts. Later fits of the same ``LightningModule`` object
    with the same callback keep them. A fit of any other object starts anew, even if it is a copy or comes from
    ``load_from_checkpoint``. So does a fit after ``reset()``.
    The copy w⁰ takes as much memory as the selected weights. Checkpoints contain it, so a run resumed with ``ckpt_path`` uses
    the same w⁰.
    Works with sharded and complex parameters.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        inject: ``"loss"`` adds the penalty to the loss. ``"gradient"`` adds its gradient to ``.grad``, without an autograd
            graph, for large models. ``"auto"`` uses the loss wherever that is exact, and the gradients otherwise.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, nothing is selected, ``inject="loss"`` is not exact in this run, the
            penalty is added to the gradients of a fused optimizer under float16 loss scaling, a lazy module has no weights
            yet, or the names or shapes of w⁰ do not match the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StartingPointPenalty(0.1, params=["weights", "!head.*"])], logger=False)

    Reference:
        X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", 2018.
    """

    supports_complex = True
    state_entries = ("start",)
    fit_attributes = ("_references",)
    resets_each_fit = False

    def __init__(self, strength: Value, *, params: Params = "weights", inject: Route = "auto", name: str | None = None) -> None:
        super().__init__(strength, params=params, inject=inject, name=name)
        self._references: dict[int, Tensor] = {}
        self._model = WeakIdentity()  # the model that the starting point belongs to

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the starting point of another model."""
        super().prepare(trainer, pl_module)
        if not self._model.is_of(pl_module):
            self.reset()
            self._model = WeakIdentity(pl_module)

    def value(self, params: Sequence[Tensor]) -> Tensor:
        """Return ½ Σ‖w − w⁰‖²."""
        return distance_penalty(params, self.references(params))

    def add_gradient_(self, params: Sequence[Tensor], strength: float) -> None:
        """Add λ (w − w⁰)."""
        add_distance_gradient_(params, self.references(params), strength)

    def entry_gradients(self, weights: Tensor, out: Tensor, *constants: Tensor) -> Tensor:
        """Return w − w⁰."""
        return torch.sub(weights, *constants, out=out)

    def entry_constants(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's part of w⁰."""
        return local_tensors(self.references(params))

    def references(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return w⁰ for each parameter."""
        return [self._references[id(p)] for p in params]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and copy them unless an earlier fit or a checkpoint has set the starting point."""
        super().attach(trainer, pl_module)
        if lazy := [name for name, p in self.tensors.items() if is_lazy(p)]:
            raise ValueError(
                f"{self.name}: a lazy module has no values yet for {', '.join(lazy)}: run the model on a batch before the fit"
            )
        if not self.state["start"]:
            self.state["start"].update((name, p.detach().clone()) for name, p in self.tensors.items())
        self._bind()

    def tensors_changed(self, names: Sequence[str]) -> None:
        """Let tensors that were added or replaced during the fit start where they are now."""
        self.state["start"].update((name, self.tensors[name].detach().clone()) for name in names)
        self._bind()

    def detach(self) -> None:
        """Release the parameters, but keep the starting point."""
        super().detach()
        self._references.clear()

    def _bind(self) -> None:
        """Match the starting point to the parameters: by name, on the same devices, and sharded in the same way."""
        for name, p in self.tensors.items():
            start = self.state["start"].get(name)
            if start is None or start.shape != p.shape:
                saved = "nothing" if start is None else f"shape {tuple(start.shape)}"
                raise ValueError(
                    f"{self.name}: the starting point has {saved} for {name!r} of shape {tuple(p.shape)}, so it belongs to "
                    "another model or selection: use a new callback, or fit without this checkpoint"
                )
            self._references[id(p)] = start if isinstance(start, DTensor) else shard_like(start.to(p.device, p.dtype), p)

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Describe a valid entry: a tensor for each parameter."""
        return "" if isinstance(key, str) and isinstance(value, Tensor) else "a tensor for each parameter"

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Restore the starting point of the resumed run."""
        super().unpack_state(packed)
        self._bind()


def _matrix(p: Tensor) -> Tensor:
    """Return W, or its transpose if W has more rows than columns, so that the Gram matrix of the rows is the smaller one."""
    if p.ndim < 2:
        raise ValueError(f"the orthogonality penalty needs tensors with two or more dimensions, got shape {tuple(p.shape)}")
    matrix = p.flatten(1).to(accumulation_dtype(p.dtype))
    return matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Return a matrix product in the precision of its factors, under autocast too."""
    device = first.device.type
    # Before torch 2.12, torch.compile cannot trace is_autocast_available, which only devices without autocast need.
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    is_lowered = has_autocast and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if is_lowered else nullcontext():
        return first @ second


def _residual(matrix: Tensor) -> Tensor:
    """Return the Gram matrix of the rows minus the identity."""
    gram = _product(matrix, matrix.t())
    gram.diagonal().sub_(1)
    return gram


def _plain_orthogonality(params: Sequence[Tensor]) -> Tensor:
    return sum_scalars([_residual(_matrix(p)).square().sum() for p in params]) / 2


def _orthogonality_value(params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    residuals = [_residual(_matrix(p)) for p in params]
    return sum_scalars([residual.square().sum() for residual in residuals]) / 2, residuals


def _orthogonality_gradients(params: Sequence[Tensor], factor: Tensor, residuals: Sequence[Tensor]) -> Sequence[Tensor]:
    gradients = []
    for p, residual in zip(params, residuals, strict=True):
        gradient = _product((2 * factor) * residual, _matrix(p))
        gradients.append((gradient if len(gradient) == len(p) else gradient.t()).reshape(p.shape).to(p.dtype))
    return gradients


def _plain_distance(params: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    return l2_penalty([p - reference.detach() for p, reference in zip(params, references, strict=True)])


def _distance_value(params: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[Tensor, None]:
    differences = [p - reference for p, reference in zip(params, references, strict=True)]
    return l2_penalty(differences), None


def _distance_gradients(
    params: Sequence[Tensor], factor: Tensor, saved: None, references: Sequence[Tensor]
) -> Sequence[Tensor]:
    gradients = list(torch._foreach_sub(list(params), list(references)))
    torch._foreach_mul_(gradients, factor)
    return gradients
