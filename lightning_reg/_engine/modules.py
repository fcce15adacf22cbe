"""Techniques that act on modules in the forward pass, through hooks or attributes."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_reg._engine import _lightning
from lightning_reg._engine.module_selection import Patterns, check_patterns, select_modules
from lightning_reg._engine.names import abbreviate, counted
from lightning_reg._engine.regularizer import Regularizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn


class ForwardHook:
    """A forward hook that does nothing in copies and pickles of its module, most of which lose the hook.

    Args:
        act: Called with the module, its arguments, and its output. Returns another output, or ``None``.
    """

    def __init__(self, act: Callable[[nn.Module, Any, Any], Tensor | None]) -> None:
        self.act = act

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Act on the output."""
        return self.act(module, args, output)

    @property
    def __name__(self) -> str:
        """The first attribute that ``torch.jit.script`` reads from a hook."""
        raise AttributeError(
            "torch.jit.script cannot compile the forward hook of a callback of lightning_reg: compile a copy, which has "
            "no such hook, as in torch.jit.script(copy.deepcopy(model)), or compile after the fit"
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        """Copy or pickle it as a function that returns ``None`` for any arguments and does not need this package."""
        return getattr, (nullcontext(), "__exit__")


class ForwardPreHook(ForwardHook):
    """A hook before the forward pass that does nothing in copies and pickles of its module.

    Args:
        act: Called with the module and its arguments. Returns other arguments, or ``None``.
    """

    def __init__(self, act: Callable[[nn.Module, Any], Any]) -> None:
        self.before = act

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        """Act on the arguments."""
        return self.before(module, args)


class ModuleRegularizer(Regularizer):
    """Base class of callbacks that act on modules, which a subclass finds.

    Args:
        name: The name in metrics and checkpoints.

    Raises:
        TypeError: If the argument that selects modules (``selector``) contains a class or a module instead of a name.
    """

    effect: ClassVar[str] = "have any effect"
    """What modules in eval mode will not do, for a warning such as "net.1 will not drop anything"."""
    fit_attributes: ClassVar[tuple[str, ...]] = ("modules_found",)

    def __init__(self, name: str | None) -> None:
        if hasattr(self, self.selector):
            patterns = getattr(self, self.selector)
            check_patterns(f"{type(self).__name__}: {self.selector}", patterns)
        super().__init__(name)
        self.modules_found: dict[str, nn.Module] = {}

    @abstractmethod
    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules to act on, by name."""

    def matching(self, pl_module: LightningModule, patterns: Patterns) -> dict[str, nn.Module]:
        """Return the modules that match name globs or class names. A leading ``!`` excludes.

        Raises:
            ValueError: If a pattern matches nothing. The message names the class of the callback.
        """
        try:
            return select_modules(pl_module, patterns)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are modules to act on, as far as they exist."""
        if not _lightning.builds_modules_later(pl_module):
            self.find(pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, and warn if some are in eval mode."""
        self.modules_found = self.find(pl_module)
        in_eval_mode = [name for name, module in self.modules_found.items() if not module.training]
        if in_eval_mode:
            rank_zero_warn(
                f"{self.name}: {', '.join(in_eval_mode)} will not {self.effect}, because Lightning does not change the mode of "
                "modules, and these are in eval mode: call model.train() before the fit"
            )

    def detach(self) -> None:
        """Release the modules."""
        self.modules_found = {}

    def acts_on(self) -> str:
        """Count and name the modules."""
        return f"{counted(len(self.modules_found), 'module')}: {abbreviate(list(self.modules_found))}"

    def route(self) -> str:
        """Return where the technique acts: in the forward pass."""
        return "forward pass"
