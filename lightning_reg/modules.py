"""Regularizers that act on modules: in their forward pass, through hooks or attributes."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_reg import host
from lightning_reg.base import Regularizer
from lightning_reg.selection import select_modules

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn

__all__ = ["ForwardHook", "ModuleRegularizer"]


class ForwardHook:
    """A forward hook that copies and pickles of its module do not take along: theirs does nothing.

    Args:
        act: Called with the module, its arguments and its output; returns another output, or ``None``.
    """

    def __init__(self, act: Callable[[nn.Module, Any, Any], Tensor | None] | None = None) -> None:
        self.act = act

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Act on the output."""
        return self.act(module, args, output) if self.act else None

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        return ForwardHook, ()


class ModuleRegularizer(Regularizer):
    """A regularizer of modules, which a subclass finds.

    Args:
        name: What metrics and the checkpoint call it.
    """

    effect: ClassVar[str]
    """What a module in eval mode will not do, for a warning."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self.modules_found: dict[str, nn.Module] = {}

    @abstractmethod
    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules that it acts on, by name."""

    def matching(self, pl_module: LightningModule, patterns: str | list[str]) -> dict[str, nn.Module]:
        """Return the modules that name globs or class names mean; an error names the class of the callback."""
        try:
            return select_modules(pl_module, [patterns] if isinstance(patterns, str) else patterns)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to act on, as far as the modules exist."""
        if not host.builds_modules_later(pl_module):
            self.find(pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, and warn of those in eval mode."""
        self.modules_found = self.find(pl_module)
        still = [name for name, module in self.modules_found.items() if not module.training]
        if still:
            rank_zero_warn(
                f"{self.name}: {', '.join(still)} will not {self.effect}, since Lightning trains modules in the mode that it "
                "finds and these are in eval mode: call model.train() before the fit"
            )

    def detach(self) -> None:
        """Let go of the modules."""
        self.modules_found = {}

    def acts_on(self) -> str:
        """Count the modules."""
        count = len(self.modules_found)
        return f"{count} module{'s' if count > 1 else ''}"

    def route(self) -> str:
        """Say that it acts in the forward pass."""
        return "forward pass"
