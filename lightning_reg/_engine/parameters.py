"""Techniques that act on selected parameters: the selection, and the part of it that an optimizer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_reg._engine import _lightning
from lightning_reg._engine.computed import Computed, computed_tensors, mask_original_
from lightning_reg._engine.names import counted
from lightning_reg._engine.regularizer import Regularizer, regularizers_of
from lightning_reg._engine.selection import (
    Params,
    check_params,
    described,
    left_out,
    lookup,
    nothing_selected_message,
    owners,
    parametrized_warning,
    selection_mask,
    uses_weights,
)
from lightning_reg._engine.steps import is_torchs_own
from lightning_reg._tensors.layers import checked_units
from lightning_reg._tensors.shards import local_tensor, shard_like
from lightning_reg._tensors.units import Units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Moment

_FEW = 3  # tensors that the summary names


class _Held(NamedTuple):
    """The parameters that an optimizer held when last checked."""

    optimizer: Optimizer  # kept, so that no other one gets its id
    ids: list[int]
    selected: list[Parameter]


class ParameterRegularizer(Regularizer):
    """Base class of callbacks that act on selected parameters.

    The selection is made by name before the fit, while modules still have their shapes. The tensors are looked up when the fit
    starts, since a strategy may have replaced them by then.

    Args:
        params: The parameters to act on, as for :func:`lightning_reg.select_parameters`.
        name: The name in metrics and checkpoints.

    Raises:
        TypeError: If ``params`` has another type.
        ValueError: In ``setup`` or when the fit starts, if nothing is selected.
    """

    params: Params
    reads_weights: ClassVar[bool] = True
    """Whether the technique depends on the values of the parameters, not only on their gradients."""
    supports_complex: ClassVar[bool] = False
    """Whether it is defined for complex parameters, with |θ| as the magnitude. It never acts on frozen ones."""
    needs_learning_rate: ClassVar[bool] = False
    """Whether it acts in proportion to the learning rate of each parameter group."""
    rate_alternative: ClassVar[str] = "another technique"
    """What to use with an optimizer whose learning rate is unknown."""
    supports_fsdp1: ClassVar[bool] = True
    """Whether it works without the shapes of tensors, which FSDP1 flattens."""
    fit_attributes: ClassVar[tuple[str, ...]] = (
        "tensors",
        "_names",
        "_units",
        "_refused",
        "_masked",
        "_held",
        "_known",
        "_optimizers",
        "_trainer",
    )

    def __init__(self, params: Params, name: str | None) -> None:
        check_params(type(self).__name__, params)
        self.params = params
        super().__init__(name)
        self.tensors: dict[str, Parameter] = {}
        self._selected: dict[str, bool] = {}
        self._left_out = ""
        self._names: dict[int, str] = {}
        self._units: dict[int, Units] = {}
        self._refused: set[int] = set()  # the ids of complex parameters, which must stay frozen
        self._masked: dict[int, tuple[Parameter, Computed]] = {}  # those under a mask of torch.nn.utils.prune
        self._held: dict[int, _Held] = {}
        self._known: set[int] = set()  # the ids of the module's parameters, selected or not
        self._optimizers: list[Optimizer] = []
        self._trainer: Trainer | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select by name, as far as the modules exist."""
        try:
            self._selected = self._select(pl_module)
        except ValueError:
            self._selected = {}
            if not _lightning.builds_modules_later(pl_module):
                raise

    def _select(self, pl_module: LightningModule) -> dict[str, bool]:
        try:
            selected = self.chosen(pl_module)
            if not any(selected.values()):
                raise ValueError(nothing_selected_message(pl_module, self.params))
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        self._left_out = described(left_out(pl_module, "weights")) if uses_weights(self.params) else ""
        return selected

    def chosen(self, module: Module) -> dict[str, bool]:
        """Return whether it acts on each parameter, by name."""
        return selection_mask(module, self.params)

    def sparse_embeddings(self, pl_module: LightningModule) -> list[str]:
        """Return the names of the selected embeddings that have sparse gradients."""
        embeddings = ((name, m) for name, m in pl_module.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        selected = {id(p) for p in self.tensors.values()}
        return [name for name, module in embeddings if module.sparse and id(module.weight) in selected]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters."""
        now = self.chosen(pl_module) if self._selected else self._select(pl_module)
        self._selected = {**now, **self._selected}
        self._trainer = trainer
        self._optimizers = list(trainer.optimizers)
        self._held.clear()
        computed = self._look_up(pl_module)
        if len(computed) > len(self._masked):
            self._warn_of_parametrized(trainer, pl_module)
        self._check_trainable(trainer)
        self._check_supported(trainer)
        self._check_learning_rates(trainer)

    def _look_up(self, pl_module: LightningModule) -> dict[int, Computed]:
        """Look up the selected tensors; return those that are computed from parameters."""
        self.tensors = lookup(pl_module, [name for name, selected in self._selected.items() if selected])
        self._names = {id(p): name for name, p in self.tensors.items()}
        self._known = set(map(id, pl_module.parameters()))
        modules = owners(pl_module)
        self._units = {id(p): checked_units(name, p, modules[id(p)]) for name, p in self.tensors.items()}
        computed = computed_tensors(pl_module)
        masked = {id(p): (p, computed[id(p)]) for p in self.tensors.values() if id(p) in computed}
        self._masked = {key: (p, tensor) for key, (p, tensor) in masked.items() if tensor.is_masked}
        self._mask_originals()
        return computed

    def _follow(self, params: Sequence[Parameter]) -> None:
        """Select among parameters of modules that were added or replaced during the fit, once an optimizer holds them."""
        assert self._trainer is not None, "the fit has started"
        if self._known.issuperset(map(id, params)):
            return
        pl_module = self._trainer.lightning_module
        before = {name: id(p) for name, p in self.tensors.items()}
        self._selected = {**self.chosen(pl_module), **self._selected}
        self._look_up(pl_module)
        self._known.update(map(id, params))  # do not look again for those that the module does not have
        self._held.clear()
        if changed := [name for name, p in self.tensors.items() if before.get(name) != id(p)]:
            self._check_supported(self._trainer)
            self.tensors_changed(changed)

    def tensors_changed(self, names: Sequence[str]) -> None:
        """Handle selected tensors that were added or replaced during the fit."""

    def _warn_of_parametrized(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once, in the first callback whose selection leaves out weights that are computed from other parameters."""
        warnings = (
            (cb, parametrized_warning(pl_module, cb.params))
            for cb in regularizers_of(trainer)
            if isinstance(cb, ParameterRegularizer)
        )
        first, warning = next(((cb, text) for cb, text in warnings if text), (None, ""))
        if first is self:
            rank_zero_warn(warning)

    def _mask_originals(self) -> None:
        """Zero entries that masks of ``torch.nn.utils.prune`` hide, so that acting on originals is acting on the weights."""
        for p, tensor in self._masked.values() if self.reads_weights else ():
            mask_original_(p, tensor)

    def update(self, moment: Moment) -> None:
        """Set the scheduled values to those of a moment; another callback may have pruned since the last batch."""
        super().update(moment)
        self._mask_originals()

    def hidden(self, p: Parameter) -> Tensor | None:
        """Return which entries of this rank's part a mask of ``torch.nn.utils.prune`` hides, or ``None`` without a mask."""
        if id(p) not in self._masked:
            return None
        return local_tensor(shard_like(self._masked[id(p)][1].mask(), p)) == 0

    def _check_supported(self, trainer: Trainer) -> None:
        """Raise an error for parameters that the technique does not support."""
        if not self.supports_complex:
            self._refused = {id(p) for p in self.tensors.values() if p.is_complex()}
            self._refuse_complex([p for p in self.tensors.values() if p.requires_grad])
        if not self.supports_fsdp1 and _lightning.uses_fsdp1(trainer):
            raise ValueError(
                f"{self.name} does not work with the flattened parameters of FSDPStrategy: use ModelParallelStrategy (FSDP2) "
                "or DDP"
            )

    def _refuse_complex(self, params: Sequence[Tensor]) -> None:
        """Raise an error if some of the parameters are complex and the technique is not defined for them."""
        if names := [self.name_of(p) for p in params if id(p) in self._refused]:
            excluding = f"params=[…, {', '.join(repr('!' + name) for name in names)}]"
            raise ValueError(
                f"{self.name} needs real parameters, got complex {', '.join(names)}: exclude them, as in {excluding}"
            )

    def detach(self) -> None:
        """Release the tensors."""
        self.tensors.clear()
        self._names.clear()
        self._units.clear()
        self._masked.clear()
        self._refused.clear()
        self._held.clear()
        self._known.clear()
        self._trainer = None
        self._optimizers = []

    def name_of(self, p: Tensor) -> str:
        """Return the name of a selected parameter."""
        return self._names[id(p)]

    def units(self, params: Sequence[Tensor]) -> list[Units]:
        """Return where each parameter has its output units."""
        return [self._units.get(id(p), Units()) for p in params]

    def optimizer_index(self, optimizer: Optimizer) -> int:
        """Return the index of an optimizer in the trainer's list. Each optimizer has its own state.

        An optimizer that replaces another one continues with its state.
        """
        if self._trainer is not None and optimizer in self._trainer.optimizers:
            self._optimizers = list(self._trainer.optimizers)
        return self._optimizers.index(optimizer)

    def label(self, key: str, optimizer: Optimizer) -> str:
        """Return the name of a metric, which ends with the index of the optimizer if there are several."""
        return f"{key}_{self.optimizer_index(optimizer)}" if len(self._optimizers) > 1 else key

    def _check_trainable(self, trainer: Trainer) -> None:
        """Warn if none of the selected parameters is currently trained. A callback may unfreeze them later."""
        frozen = not any(p.requires_grad for p in self.tensors.values())
        if frozen and self.params == "weights":
            raise ValueError(f"{type(self).__name__}: params='weights' selects no parameter: all weights are frozen")
        if frozen or not any(self.parameters_of(optimizer) for optimizer in trainer.optimizers):
            reason = "frozen" if frozen else "not in any optimizer"
            rank_zero_warn(f"{self.name} has no effect for now: all {len(self.tensors)} selected parameters are {reason}")

    def require_unscaled_gradients(self, trainer: Trainer) -> None:
        """Raise an error for an optimizer that unscales float16 gradients only in its step, after every hook."""
        for optimizer in trainer.optimizers:
            if _lightning.unscales_in_step(trainer, optimizer):
                raise ValueError(
                    f"{self.name} acts before the optimizer step, but the fused {type(optimizer).__name__} unscales its "
                    "float16 gradients only in the step: create the optimizer with fused=False, or set precision='bf16-mixed'"
                )

    def parameters_of(self, optimizer: Optimizer) -> list[Parameter]:
        """Return the selected parameters of an optimizer that require a gradient now."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        ids = list(map(id, params))
        held = self._held.get(id(optimizer))
        if held is None or held.ids != ids:  # the first time, or a callback such as BaseFinetuning has changed a group
            if self._trainer is not None:
                self._follow(params)
            held = _Held(optimizer, ids, [p for p in params if id(p) in self._names])
            self._held[id(optimizer)] = held
        toggled = _lightning.toggled(self._trainer.lightning_module) if self._trainer is not None else {}
        trained = [p for p in held.selected if p.requires_grad or (toggled and toggled.get(p))]
        if self._refused:  # another callback may have unfrozen a complex parameter
            self._refuse_complex(trained)
        return trained

    def learning_rate(self, optimizer: Optimizer, group: Mapping[str, Any]) -> Any:
        """Return the learning rate of a parameter group.

        Raises:
            ValueError: If the rate with which the optimizer steps is not in the group.
        """
        rate = group.get("lr")
        if rate is None or ("d" in group and not is_torchs_own(optimizer)):  # torch's Adafactor has another d
            why = "multiplies the learning rate by its own factor d" if rate is not None else "has no learning rate (lr)"
            raise ValueError(
                f"{self.name} acts in proportion to the learning rate, but {type(optimizer).__name__} {why}: use "
                f"{self.rate_alternative}"
            )
        return rate

    def _check_learning_rates(self, trainer: Trainer) -> None:
        """Raise an error early if a learning rate is not known."""
        for optimizer in trainer.optimizers if self.needs_learning_rate else ():
            for group, _ in self.by_group(self.parameters_of(optimizer), optimizer):
                self.learning_rate(optimizer, group)

    def by_group(self, params: list[Parameter], optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[Parameter]]]:
        """Yield each parameter group of an optimizer, which has its own learning rate, with its share of the parameters."""
        wanted = {id(p) for p in params}
        for group in optimizer.param_groups:
            held = [p for p in group["params"] if id(p) in wanted]
            if held:
                yield group, held

    def warn_of_second_decay(self, trainer: Trainer) -> None:
        """Warn if the optimizer also decays the selected parameters."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups if group.get("weight_decay")]
        decays = {group["weight_decay"] for group in groups if any(id(p) in self._names for p in group["params"])}
        if decays:
            rank_zero_warn(
                f"{self.name} acts on parameters that the optimizer also decays (weight_decay={', '.join(map(str, decays))}): "
                f"both shrink them. Set weight_decay=0, or remove {type(self).__name__}."
            )

    def reproject_copy(self, copy: Module) -> None:
        """Enforce what ``reproject`` enforces in a copy of the module, such as an average of the weights."""
        tensors = lookup(copy, list(self.tensors))
        for name, p in tensors.items():
            self._units[id(p)] = self._units[id(self.tensors[name])]
        self.reproject([p for name, p in tensors.items() if self.tensors[name].requires_grad])
        for p in tensors.values():
            del self._units[id(p)]

    def acts_on(self) -> str:
        """Count the selected tensors and parameters that are trained now, and name the tensors if there are few."""
        held = {id(p) for optimizer in self._optimizers for p in self.parameters_of(optimizer)}
        trained = {name: p for name, p in self.tensors.items() if id(p) in held}
        count = sum(p.numel() for p in trained.values() if not is_lazy(p))
        later = " and those of lazy modules" if any(map(is_lazy, trained.values())) else ""
        names = f": {', '.join(trained)}" if 0 < len(trained) <= _FEW else ""
        return f"{counted(len(trained), 'tensor')}, {counted(count, 'parameter')}{later}{names}"

    def notes(self) -> list[str]:
        """Describe what ``"weights"`` leaves out."""
        return [f"'weights' leaves out {self._left_out}"] if self._left_out else []
