"""Masks that last: after each step, in averages of the weights, in checkpoints, and in later fits of the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_reg._engine import _lightning
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.selection import owners
from lightning_reg._tensors.layers import layer_units
from lightning_reg._tensors.units import input_dim
from lightning_reg.pruning.masks import clear_state_, mask_, mask_copy_, mask_gradients_
from lightning_reg.pruning.scores import as_shard_of
from lightning_reg.pruning.state import PruningState, check_packed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Clock
    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.pruning.structures import Structure


class MaskedRegularizer(ParameterRegularizer):
    """Base class of pruning: parameters with masks that keep entries at 0.

    Args:
        params: The parameters to act on.
        name: The name in metrics and checkpoints.
    """

    structure: Structure
    supports_fsdp1 = False
    resets_each_fit = False
    fit_attributes: ClassVar[tuple[str, ...]] = ("_local_masks",)

    def __init__(self, params: Params, name: str | None) -> None:
        super().__init__(params, name)
        self._state = PruningState()
        self._restored: dict[str, Any] = {}  # the state of a checkpoint, until the parameters are known
        self._is_restored = False  # whether the masks of this fit come from a checkpoint
        self._local_masks: dict[int, Tensor] = {}  # this rank's parts of the masks, keyed by the id of the parameter
        self._in_layers: set[int] = set()  # the ids of parameters of known layers

    # The step -------------------------------------------------------------------------------------------------------

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the gradients, so that pruned weights build up no momentum."""
        mask_gradients_(*self._with_masks(params))

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the weights."""
        self.reproject(params)
        self._state.trained.update(self.name_of(p) for p in params)

    def step_end(self, step: Step, done: int) -> bool:
        """Count the steps."""
        self._state.steps += 1
        return False

    def reproject(self, params: list[Parameter]) -> None:
        """Mask the weights."""
        mask_(*self._with_masks(params))

    def reproject_copy(self, copy: Module) -> None:
        """Mask the weights of a copy of the module."""
        mask_copy_(copy, self._state.masks)

    def _add_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Adopt this rank's parts of new masks."""
        self._state.masks |= {name: as_shard_of(mask, self.tensors[name]) for name, mask in masks.items()}
        self._local_masks = self._state.local_masks(self.tensors)

    def _apply_masks(self) -> None:
        """Mask the weights, the state of the optimizers, and averages in other callbacks."""
        assert self._trainer is not None, "attached"
        mask_(*self._with_masks(list(self.tensors.values())))
        self._clear_states()
        for average in _lightning.averaged_models(self._trainer):
            mask_copy_(average, self._state.masks)

    def _clear_states(self) -> None:
        """Clear the state of the optimizers for pruned weights."""
        assert self._trainer is not None, "attached"
        for optimizer in self._trainer.optimizers:
            clear_state_(optimizer, *self._with_masks(list(self.tensors.values())))

    def _with_masks(self, params: Sequence[Parameter]) -> tuple[list[Parameter], list[Tensor]]:
        """Return the parameters that have masks, and their masks."""
        masked = [p for p in params if id(p) in self._local_masks]
        return masked, [self._local_masks[id(p)] for p in masked]

    def _inputs_of(self, params: Sequence[Tensor]) -> list[int]:
        """Return the dimension of each parameter's inputs: the last one in modules of unknown type."""
        known = zip(params, self.units(params), strict=True)
        return [input_dim(p, unit) if id(p) in self._in_layers else max(p.ndim - 1, 0) for p, unit in known]

    def _pruned(self, p: Parameter) -> Tensor | None:
        """Return which entries are already pruned, by this callback or (single weights) by ``torch.nn.utils.prune``."""
        mine, hidden = self._local_masks.get(id(p)), self.hidden(p) if self.structure == "element" else None
        return mine if hidden is None else hidden if mine is None else mine | hidden

    # The fit and the checkpoint -------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select by name. It is not known yet whether the fit resumes from a checkpoint."""
        super().prepare(trainer, pl_module)
        self._is_restored = False

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and restore the masks of a checkpoint."""
        super().attach(trainer, pl_module)
        self._in_layers = self._ids_in_layers()
        self._restore()

    def resolve(self, clock: Clock) -> None:
        """Start with the masks of a checkpoint or of the same model's last fit, or without masks."""
        super().resolve(clock)
        if not self._is_restored and not self._state.matches(self.tensors):
            self._state = PruningState()
        self._local_masks = self._state.local_masks(self.tensors)
        with torch.no_grad():
            mask_(*self._with_masks(list(self.tensors.values())))

    def _ids_in_layers(self) -> set[int]:
        """Return the ids of the parameters of layers with known classes."""
        assert self._trainer is not None, "attached"
        modules = owners(self._trainer.lightning_module)
        return {id(p) for p in self.tensors.values() if layer_units(modules[id(p)])}

    def detach(self) -> None:
        """Release the tensors. The masks stay, for a second fit."""
        super().detach()
        self._local_masks.clear()

    def tensors_changed(self, names: Sequence[str]) -> None:
        """Start without masks for tensors that were added or replaced during the fit."""
        for name in names:
            self._state.forget(name)
        self._in_layers = self._ids_in_layers()
        self._local_masks = self._state.local_masks(self.tensors)

    def reset(self) -> None:
        """Remove the masks."""
        super().reset()
        self._state = PruningState()

    def pack_state(self) -> dict[str, Any]:
        """Return masks as bits, and the weights to rewind to as full tensors. Every rank must call it."""
        return self._restored or (self._state.packed() if self._state.steps or self._state.start else {})

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Restore the masks of a checkpoint: when the fit starts, or now if the fit goes back to an earlier point."""
        check_packed(packed)
        self._restored = packed
        self._restore()

    def _restore(self) -> None:
        if self._restored and self.tensors:
            self._state = PruningState.unpacked(self._restored, self.tensors, self.name, self.structure)
            self._restored, self._is_restored = {}, True
            self._local_masks = self._state.local_masks(self.tensors)
