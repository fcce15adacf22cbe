"""Base classes of gradient processing: checks that gradients can be processed, and metrics for each optimizer."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._tensors.gradients import existing_gradients
from lightning_reg._tensors.reductions import total_norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step


class GradientProcessing(ParameterRegularizer):
    """Base class of callbacks that change gradients before the optimizer step: g ← f(g).

    Runs in: ``on_before_optimizer_step``, once per optimizer step, on accumulated and unscaled gradients.

    A subclass sets ``phase`` to its place in the step, and overrides ``gradients``, which changes each ``.grad`` in place.
    If an optimizer evaluates the loss several times in a step, as LBFGS does, the callback runs at each evaluation.

    Args:
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If nothing is selected, a fused optimizer is used under float16 loss scaling, an embedding has sparse
            gradients (unless ``supports_sparse``), or FSDP1 has flattened the parameters (unless ``supports_fsdp1``).

    Example:
        >>> from lightning_reg.custom import GradientProcessing, Phase
        >>> class SignedGradients(GradientProcessing):  # g ← sign(g)
        ...     phase = Phase.VALUE_CLIPPING
        ...     def gradients(self, params, optimizer, step):
        ...         for p in params:
        ...             if p.grad is not None:
        ...                 p.grad.sign_()
        >>> callback = SignedGradients(params="all", name=None)
    """

    supports_sparse: ClassVar[bool] = False
    """Whether the callback can process the sparse gradients of embeddings."""
    supports_fsdp1 = False
    reads_weights = False

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and check that their gradients can be processed."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)
        if not self.supports_sparse:
            self._check_dense(pl_module)

    def _check_dense(self, pl_module: LightningModule) -> None:
        """Raise an error if a selected embedding has sparse gradients."""
        if sparse := self.sparse_embeddings(pl_module):
            names = ", ".join(sparse)
            raise ValueError(f"{self.name} needs dense gradients: create {names} with sparse=False, or exclude it from params")

    @abstractmethod
    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Change the gradients in place. Called after unscaling, before the update."""

    @contextmanager
    def logging_norms(self, params: list[Parameter], optimizer: Optimizer) -> Iterator[None]:
        """Log the norm of the gradients before and after the body of the ``with`` statement, if this step is logged."""
        logs = self.logging and bool(existing_gradients(params))
        if logs:
            self.log_metrics(**{self.label("norm_before", optimizer): total_norm(existing_gradients(params))})
        yield
        if logs:
            self.log_metrics(**{self.label("norm_after", optimizer): total_norm(existing_gradients(params))})

    def route(self) -> str:
        """Return where the callback acts: before the optimizer step."""
        return "before the step"


class GradientClipping(GradientProcessing):
    """Base class of gradient clipping: counts how often it clips, and warns if the Trainer clips too."""

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the Trainer clips too."""
        super().prepare(trainer, pl_module)
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"{self.name} and Trainer(gradient_clip_val={trainer.gradient_clip_val}) both clip the gradients, the callback "
                "first: remove one of them"
            )

    def record_clipping(self, optimizer: Optimizer, norm: Tensor, bound: float | Tensor) -> None:
        """Count this step in the metrics, given its largest norm and the bound. Call it only if ``self.has_logger``."""
        self.running.mean(self.label("clipped_steps", optimizer), norm > bound)
        self.running.sum(self.label("nonfinite_steps", optimizer), (norm < math.inf).logical_not_())
