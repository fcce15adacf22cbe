"""What the callbacks that process gradients share: unscaled gradients, figures for each optimizer, and what they refuse."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._tensors.gradients import existing_gradients
from lightning_reg._tensors.reductions import total_norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer


class GradientProcessing(ParameterRegularizer):
    """Unscaled gradients, and their norm before and after on logging steps."""

    supports_sparse: ClassVar[bool] = False
    """Whether it can act on the sparse gradient of an embedding."""
    supports_fsdp1 = False

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and check that their gradients can be processed."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)
        if not self.supports_sparse:
            self._refuse_sparse(pl_module)

    def _refuse_sparse(self, pl_module: LightningModule) -> None:
        embeddings = ((name, m) for name, m in pl_module.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        selected = {id(p) for p in self.tensors.values()}
        sparse = [name for name, module in embeddings if module.sparse and id(module.weight) in selected]
        if sparse:
            names = ", ".join(sparse)
            raise ValueError(f"{self.name} needs dense gradients: make {names} with sparse=False, or leave it out of params")

    @contextmanager
    def logging_norms(self, params: list[Parameter], optimizer: Optimizer) -> Iterator[None]:
        """Log the norm of the gradients before and after what happens within."""
        shown = self.logging and bool(existing_gradients(params))
        if shown:
            self.log_metrics(**{self.label("norm_before", optimizer): total_norm(existing_gradients(params))})
        yield
        if shown:
            self.log_metrics(**{self.label("norm_after", optimizer): total_norm(existing_gradients(params))})

    def route(self) -> str:
        """Say that it acts before the step."""
        return "before the step"


class GradientClipping(GradientProcessing):
    """What clipping adds: how often it clips, and a warning where the Trainer clips too."""

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of clipping twice."""
        super().prepare(trainer, pl_module)
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"{self.name} and Trainer(gradient_clip_val={trainer.gradient_clip_val}) both clip the gradients, the callback "
                "first: remove one of them"
            )

    def record_clipping(self, optimizer: Optimizer, norm: Tensor, bound: float | Tensor) -> None:
        """Add this step to the running metrics, given its largest norm and the bound; call it only if ``self.has_logger``."""
        self.running.mean(self.label("clipped_steps", optimizer), norm > bound)
        self.running.sum(self.label("nonfinite_steps", optimizer), ~norm.isfinite())
