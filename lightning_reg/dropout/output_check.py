"""A warning about dropout that reaches the output of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_reg._engine.modules import ForwardHook

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class OutputCheck:
    """A warning if the first training pass applies dropout to an output of the model, which ``"*"`` should not do.

    A model may define its output layer before others, or have several. Only a forward pass reveals them. Modules without
    parameters that follow such a layer, such as a softmax, do not hide it.

    Args:
        name: The name of the callback, for the warning.
        pl_module: The model. If it has only one child with parameters, the outputs of that child count too.
    """

    def __init__(self, name: str, pl_module: LightningModule) -> None:
        self._name, self._has_ended = name, False
        # By memory address, which is not reused as long as the tensors exist
        self._dropped: dict[int, tuple[Tensor, str]] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # the output and the input of modules without parameters
        networks = [child for child in pl_module.children() if _has_parameters(child)]
        functions = [module for module in pl_module.modules() if not _has_parameters(module)]
        watched = [pl_module, *(networks if len(networks) == 1 else [])]
        hooks = [*((module, self._remember_input) for module in functions), *((module, self._check) for module in watched)]
        self._handles = [module.register_forward_hook(ForwardHook(act)) for module, act in hooks]

    def end(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._has_ended = True
        self._dropped.clear()
        self._inputs.clear()

    def remember(self, name: str, dropped: Any) -> None:
        """Remember the dropped output of a module."""
        if isinstance(dropped, Tensor) and not self._has_ended:
            self._dropped[_memory_of(dropped)] = dropped, name

    def _remember_input(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self._inputs[_memory_of(output)] = output, args[0]

    def _check(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training:
            return
        returned: set[int] = set()
        left = [_memory_of(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        while left:
            memory = left.pop()
            if memory not in returned:
                returned.add(memory)
                left += [_memory_of(self._inputs[memory][1])] if memory in self._inputs else []
        if names := list(dict.fromkeys(name for memory, (_, name) in self._dropped.items() if memory in returned)):
            rank_zero_warn(
                f"{self._name}: '*' adds dropout after {', '.join(names)}, whose output the model returns, because the "
                f"model defines other layers later: exclude it, as in after={['*', *(f'!{name}' for name in names)]}"
            )
        self.end()


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _memory_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, which its views share."""
    return tensor.untyped_storage().data_ptr()
