"""Regularizers that act on selected parameters: which they are, and which of them the stepping optimizer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_reg import host
from lightning_reg.base import Regularizer
from lightning_reg.selection import Params, lookup, nothing_selected, owners, verdicts
from lightning_reg.units import Units, units_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

__all__ = ["ParameterRegularizer"]


class ParameterRegularizer(Regularizer):
    """A regularizer of selected parameters.

    Which ones is decided by name before the fit, while the modules still have their shapes; the tensors are looked up when
    it starts, since a strategy may have replaced them by then.

    Args:
        params: Which parameters, see :func:`lightning_reg.selection.select_parameters`.
        name: What metrics and the checkpoint call it.
    """

    params: Params
    whole_tensors: ClassVar[bool] = False
    """Whether it needs whole tensors, so that it cannot act on the shards of one."""
    takes_flattened: ClassVar[bool] = True
    """Whether it can do without the shapes of tensors: FSDP1 makes flat pieces of all of them."""

    def __init__(self, params: Params, name: str | None) -> None:
        globs = [params] if isinstance(params, str) else params
        if not callable(params) and not (isinstance(globs, list) and all(isinstance(glob, str) for glob in globs)):
            raise TypeError(
                f"{type(self).__name__}: params must be 'weights', 'all', a glob, a list of these, or a callable "
                f"(name, parameter, module) -> bool, got {params!r:.80}"
            )
        self.params = params
        super().__init__(name)
        self.tensors: dict[str, Parameter] = {}
        self._verdicts: dict[str, bool] = {}
        self._members: dict[int, tuple[int, list[Parameter]]] = {}
        self._units: dict[int, Units] = {}
        self._optimizers: list[Optimizer] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which names are meant, as far as the modules exist."""
        try:
            self._verdicts = self._decide(pl_module)
        except ValueError:
            self._verdicts = {}
            if not host.builds_modules_later(pl_module):
                raise

    def _decide(self, pl_module: LightningModule) -> dict[str, bool]:
        try:
            decided = verdicts(pl_module, self.params)
            if not any(decided.values()):
                raise ValueError(nothing_selected(pl_module, self.params))
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        return decided

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up."""
        now = verdicts(pl_module, self.params) if self._verdicts else self._decide(pl_module)
        self._verdicts = {**now, **self._verdicts}
        self.tensors = lookup(pl_module, [name for name, selected in self._verdicts.items() if selected])
        self._units = {number: units_of(owner) for number, owner in owners(pl_module).items()}
        self._members.clear()
        self._optimizers = list(trainer.optimizers)
        self._check_trainable(trainer)
        complex_ones = [name for name, p in self.tensors.items() if p.is_complex()]
        if complex_ones:
            raise ValueError(f"{self.name} acts on real parameters only, got complex {', '.join(complex_ones)}: leave them out")
        if not self.takes_flattened and host.flattens(trainer):
            raise ValueError(
                f"{self.name} cannot act on the flat parameters of FSDPStrategy: use ModelParallelStrategy (FSDP2) or DDP"
            )
        if self.whole_tensors and host.shards(trainer, self.tensors.values()):
            raise ValueError(f"{self.name} cannot act on sharded parameters: it needs whole tensors; use DDP")

    def detach(self) -> None:
        """Let go of the tensors."""
        self.tensors.clear()
        self._members.clear()
        self._units.clear()

    def units(self, params: Sequence[Tensor]) -> list[Units]:
        """Return where each parameter keeps its output units."""
        return [self._units.get(id(p), Units()) for p in params]

    def place(self, optimizer: Optimizer) -> int:
        """Return which of the trainer's optimizers it is: each has statistics of its own."""
        return self._optimizers.index(optimizer)

    def label(self, key: str, optimizer: Optimizer) -> str:
        """Return the name of a figure, told apart where there are several optimizers."""
        return f"{key}_{self.place(optimizer)}" if len(self._optimizers) > 1 else key

    def _check_trainable(self, trainer: Trainer) -> None:
        """Say so when nothing that is selected is trained, now at least: a callback may unfreeze it later."""
        frozen = not any(p.requires_grad for p in self.tensors.values())
        if frozen and self.params == "weights":
            raise ValueError(f"{type(self).__name__}: params='weights' selects no parameter: all weights are frozen")
        if frozen or not any(self.members(optimizer) for optimizer in trainer.optimizers):
            why = "frozen" if frozen else "held by no optimizer"
            rank_zero_warn(f"{self.name}: all {len(self.tensors)} selected parameters are {why}, so it does nothing for now")

    def require_unscaled_gradients(self, trainer: Trainer) -> None:
        """Refuse an optimizer that unscales float16 gradients only in its step, after every hook."""
        for optimizer in trainer.optimizers:
            if host.refuses_unscaled_gradients(trainer, optimizer):
                raise ValueError(
                    f"{self.name} acts before the optimizer steps, but the fused {type(optimizer).__name__} "
                    "unscales its float16 gradients only within the step: make the optimizer with fused=False, or train with "
                    "precision='bf16-mixed'"
                )

    def members(self, optimizer: Optimizer) -> list[Parameter]:
        """Return the selected parameters of an optimizer that require a gradient now."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known, parameters = self._members.get(id(optimizer), (-1, []))
        if known != size:  # the first time, or a callback such as BaseFinetuning has added parameters
            wanted = {id(p) for p in self.tensors.values()}
            parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in wanted]
            self._members[id(optimizer)] = (size, parameters)
        return [p for p in parameters if p.requires_grad]

    def by_group(self, params: list[Parameter], optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[Parameter]]]:
        """Yield the optimizer's groups, whose learning rates may differ, with those of some parameters that they hold."""
        wanted = {id(p) for p in params}
        for group in optimizer.param_groups:
            held = [p for p in group["params"] if id(p) in wanted]
            if held:
                yield group, held

    def warn_of_second_decay(self, trainer: Trainer) -> None:
        """Say so when the optimizer decays what is selected too."""
        selected = {id(p) for p in self.tensors.values()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        decays = {g["weight_decay"] for g in groups if g.get("weight_decay") and any(id(p) in selected for p in g["params"])}
        if decays:
            rank_zero_warn(
                f"{self.name} acts on parameters that the optimizer decays too (weight_decay={', '.join(map(str, decays))}): "
                f"both shrink them. Set weight_decay=0, or leave {type(self).__name__} out."
            )

    def acts_on(self) -> str:
        """Count the tensors and parameters that are selected and not frozen."""
        live = [p for p in self.tensors.values() if p.requires_grad]
        count = sum(p.numel() for p in live if not is_lazy(p))
        later = " and those of lazy modules" if any(is_lazy(p) for p in live) else ""
        return f"{len(live)} tensor{'s' if len(live) > 1 else ''}, {count:,} parameters{later}"
