"""Dropout whose rate changes over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules.dropout import _DropoutNd

from lightning_reg.base import Phase
from lightning_reg.configuration import PROBABILITY
from lightning_reg.dropout.functions import set_dropout_
from lightning_reg.modules import ModuleRegularizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from lightning_reg.schedules import Value

__all__ = ["DropoutScheduler"]


class DropoutScheduler(ModuleRegularizer):
    """Drive the rate of the dropout modules that a model has.

    Runs in: ``on_train_batch_start``, whenever the scheduled value has changed.

    It drives ``nn.Dropout``, its variants for channels, and ``nn.AlphaDropout``; their own rates come back after the fit.
    Early dropout is ``Steps([p, 0.0], at=["10ep"])``, late dropout ``Steps([0.0, p], at=["10ep"])``.

    Args:
        p: The probability of a zero, in [0, 1], or a schedule.
        modules: Globs on the names of dropout modules, or class names; ``"*"`` for all of them.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For p outside [0, 1], or a model without such modules.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Linear
        >>> trainer = Trainer(callbacks=[DropoutScheduler(Linear(0.0, 0.5, until=0.3))], logger=False)

    Reference:
        Z. Liu et al., "Dropout Reduces Underfitting", 2023; P. Morerio et al., "Curriculum Dropout", 2017.
    """

    phase = Phase.DROPOUT
    limits = {"p": PROBABILITY}
    instead_of_deepspeed = None
    selector = "modules"
    effect = "drop anything"

    def __init__(self, p: Value, *, modules: str | list[str] = "*", name: str | None = None) -> None:
        self.p = p
        self.modules = modules
        super().__init__(name)
        self._own_rates: dict[nn.Module, float] = {}

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the dropout modules that it drives."""
        matched = self.matching(pl_module, self.modules)
        found: dict[str, nn.Module] = {name: module for name, module in matched.items() if isinstance(module, _DropoutNd)}
        if not found:
            raise ValueError(
                f"DropoutScheduler: no dropout module matches {self.modules!r}; to put dropout into a model that has none, use "
                "DropoutInjection"
            )
        return found

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the modules' own rates."""
        super().attach(trainer, pl_module)
        self._own_rates = {module: module.p for module in self.modules_found.values()}  # type: ignore[misc]

    def values_changed(self) -> None:
        """Set the rate."""
        set_dropout_(self.modules_found.values(), self.current["p"])

    def detach(self) -> None:
        """Give the modules their own rates back."""
        super().detach()
        for module, p in self._own_rates.items():
            set_dropout_([module], p)
        self._own_rates.clear()
