"""What the callbacks that process gradients share: unscaled gradients, figures for each optimizer, and what they refuse."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_reg.parameters import ParameterRegularizer
from lightning_reg.tensors import joint_norm, present_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

__all__ = ["GradientClipping", "GradientProcessing"]


class GradientProcessing(ParameterRegularizer):
    """Unscaled gradients, and their norm before and after on logging steps."""

    takes_sparse: ClassVar[bool] = False
    """Whether it can act on the sparse gradient of an embedding."""
    takes_flattened = False

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin its statistics anew."""
        super().prepare(trainer, pl_module)
        self.forget()

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, and check that their gradients can be processed."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)
        if not self.takes_sparse:
            self._refuse_sparse(pl_module)

    def _refuse_sparse(self, pl_module: LightningModule) -> None:
        embeddings = ((name, m) for name, m in pl_module.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        selected = {id(p) for p in self.tensors.values()}
        sparse = [name for name, module in embeddings if module.sparse and id(module.weight) in selected]
        if sparse:
            names = ", ".join(sparse)
            raise ValueError(f"{self.name} needs dense gradients: make {names} with sparse=False, or leave it out of params")

    def forget(self) -> None:
        """Drop what was learnt in another fit; what a checkpoint holds comes after this."""

    @contextmanager
    def watched(self, params: list[Parameter], optimizer: Optimizer) -> Iterator[None]:
        """Log the norm of the gradients before and after what happens within."""
        shown = self.logging and bool(present_gradients(params))
        if shown:
            self.observe(**{self.label("norm_before", optimizer): joint_norm(present_gradients(params))})
        yield
        if shown:
            self.observe(**{self.label("norm_after", optimizer): joint_norm(present_gradients(params))})

    def state_dict(self) -> dict[str, Any]:
        """Return the running figures, and what a subclass adds."""
        return {"figures": self.figures.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the figures of the run that is resumed."""
        self.figures.load_state_dict(state_dict["figures"])

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

    def note(self, optimizer: Optimizer, norm: Tensor, bound: float | Tensor) -> None:
        """Keep by how much this step's largest norm exceeded its bound; call it only when ``self.listening``."""
        self.figures.average(self.label("clipped_steps", optimizer), norm - bound, then=_is_positive)
        self.figures.count(self.label("nonfinite_steps", optimizer), norm, then=_is_not_finite)


def _is_positive(excess: Tensor) -> Tensor:
    return excess > 0


def _is_not_finite(norms: Tensor) -> Tensor:
    return ~norms.isfinite()
