"""Dropout put into a finished model by rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_reg.base import Phase
from lightning_reg.configuration import PROBABILITY
from lightning_reg.dropout.functions import inject_dropout
from lightning_reg.modules import ModuleRegularizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lightning_reg.schedules import Value

__all__ = ["DropoutInjection"]


class DropoutInjection(ModuleRegularizer):
    r"""Put dropout behind modules of a finished model: :math:`y_i = x_i\,m_i / (1 - p)`.

    Here :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`, drawn anew for every entry or channel.

    Runs in: the forward pass of each matched module while it is in training mode; the rate is set in ``on_train_batch_start``.

    A forward hook does it, so no state-dict key is renamed, and it is gone after the fit: a checkpoint taken under it loads
    into the plain model. Each rank draws its own masks from torch's global generator.

    Args:
        p: The probability of a zero, in [0, 1], or a schedule.
        after: Name globs (``"encoder.layers.*"``) or class names (``"ReLU"``) of modules that return one float tensor.
        channelwise: Whether whole channels (dimension 1) are dropped.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For p outside [0, 1], or an ``after`` that matches nothing.
        TypeError: In the first forward pass, for a module that returns something else than a float tensor.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DropoutInjection(0.2, after="ReLU")], logger=False)

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
    """

    phase = Phase.DROPOUT
    limits = {"p": PROBABILITY}
    instead_of_deepspeed = None
    selector = "after"
    effect = "drop anything"

    def __init__(self, p: Value, *, after: str | list[str], channelwise: bool = False, name: str | None = None) -> None:
        if not after:
            raise ValueError("DropoutInjection: after must name modules or classes, as in after=['ReLU'], got nothing")
        self.p = p
        self.after = after
        self.channelwise = channelwise
        super().__init__(name)
        self._handles: list[RemovableHandle] = []

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules behind which it drops."""
        return self.matching(pl_module, self.after)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks."""
        super().attach(trainer, pl_module)
        self._handles = inject_dropout(self.modules_found, lambda: self.current["p"], self.channelwise)

    def detach(self) -> None:
        """Remove the hooks."""
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
