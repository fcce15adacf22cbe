"""Pruning during training: masks that the callback keeps and applies after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import Interval, check_choice, check_integer
from lightning_reg._engine.clock import END
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.selection import Params, owners
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.layers import layer_units
from lightning_reg._tensors.random import hashed
from lightning_reg._tensors.units import input_dim
from lightning_reg.pruning import rewinding
from lightning_reg.pruning.masks import clear_state_, mask_, mask_copy_, mask_gradients_
from lightning_reg.pruning.scores import GivenScores, MagnitudeScores, RandomScores, Score, as_shard_of
from lightning_reg.pruning.state import PruningState
from lightning_reg.pruning.structures import (
    DEFAULT_MIN_KEPT,
    Scope,
    Structure,
    count_true,
    count_units,
    masks_of_scores,
    prunable,
)
from lightning_reg.pruning.targets import (
    check_layers,
    check_rewinding,
    check_rising,
    check_schedule,
    known_targets,
    late_rewinding_message,
    planned_targets,
    schedule_warnings,
)
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Clock, Moment
    from lightning_reg._engine.plan import Step
    from lightning_reg.schedules import Value

Criterion = Literal["magnitude", "random"] | Callable[[str, Parameter], Any]
"""``"magnitude"``, ``"random"``, or a callable ``(name, parameter) -> scores``. The lowest scores are pruned first.

The command line refuses a callable whose annotation does not return what this one names, so it names no type.
"""

DEFAULT_PARAMS: Params = ["weights", "!embeddings"]


class WeightPruning(ParameterRegularizer):
    """Prune an exact fraction of the weights during training: θᵢ ← 0 for the lowest scores. Pruned weights stay 0.

    Runs in: the end of an epoch, after its last optimizer step and before its validation (masks grow);
    ``on_before_optimizer_step``, after clipping (gradients are masked); right after each optimizer step (weights are masked).

    Nothing is added to the model, and its parameters keep their names.
    The masks belong to the callback. A checkpoint stores one bit for each weight.
    When weights are pruned, the optimizer's state for them is cleared.
    Averages of the weights in EMA and SWA callbacks are masked too.
    Frozen parameters, and parameters whose optimizer has not stepped yet, are neither pruned nor counted.
    A second fit continues with the masks if the model still has their zeros. For any other model, it starts with new masks.
    All ranks prune the same weights, for sharded parameters too.
    Scores are compared in float32. A weight that is NaN counts as the largest. Among equal scores, the first are pruned.

    Args:
        sparsity: The fraction of all selected weights to prune, in [0, 1), including those already pruned; or a schedule that
            never decreases. ``Cubic(0.0, 0.9, until=0.7)`` has the shape that Zhu and Gupta recommend, and leaves the last 30%
            of training to recover. For ``"2:4"``, 0.5, or a step from 0 to 0.5.
        criterion: ``"magnitude"`` (the smallest weights are pruned first), ``"random"``, or a callable
            ``(name, parameter) -> scores`` that returns a tensor of the parameter's shape; the lowest scores are pruned first.
            With several processes, the mean of their scores is used.
        scope: ``"global"`` for a fraction of all selected weights together, ``"layer"`` for the same fraction of each tensor.
        structure: ``"element"`` for single weights. ``"unit"`` for whole output units with the smallest L2 norms; with scope
            ``"global"``, units are compared by the root mean square of their weights, and as many are pruned as fit into the
            sparsity. ``"2:4"`` for two of every four weights along the inputs of a linear layer, or the input channels of a
            convolution.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``. The default leaves out embeddings, because their
            magnitudes do not compare with those of other weights. For ``structure="unit"``, name the layers: in an output
            layer, a pruned unit is a class that is gone.
        every_n_epochs: Prune at the end of each n-th epoch, n ≥ 1.
        min_kept: The fraction of its weights, or units, that each tensor keeps, in [0, 1), and at least one. With scope
            ``"global"``, more of the other tensors is pruned instead. A warning names the tensors. The default becomes
            1 − sparsity where that is less.
        rewind_to_step: Each time weights are pruned, set all trained parameters and the statistics of batch normalization back
            to their values after this many optimizer steps, and reset the optimizers, to find a winning lottery ticket. 0 is
            the start of the fit. In manual optimization, the steps of all optimizers count. The learning rate schedule
            continues. A copy of the model is kept in memory and in checkpoints.
        name: The name in metrics and checkpoints. By default it is made from the class and the selection.

    Raises:
        ValueError: If the sparsity is outside [0, 1), falls, or cannot be reached because of ``min_kept``; if scores have the
            wrong shape or are not finite; if ``"2:4"`` cannot divide the inputs; for units without ``params``; if a checkpoint
            has masks of another model; or under FSDP1.
        TypeError: If the criterion does not return a tensor.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Cubic
        >>> pruning = WeightPruning(Cubic(0.0, 0.9, until=0.7), params=["weights", "!head.*"])
        >>> trainer = Trainer(callbacks=[pruning], logger=False)

    Reference:
        M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
        J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2019.
        J. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (rewinding).
    """

    phase = Phase.PRUNING
    supports_fsdp1 = False
    resets_each_fit = False
    valid_ranges = {"sparsity": Interval(0.0, 1.0, open_high=True)}
    fit_attributes = ("_local_masks", "_optimizer_states", "_saved")

    def __init__(
        self,
        sparsity: Value,
        *,
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        structure: Structure = "element",
        params: Params = DEFAULT_PARAMS,
        every_n_epochs: int = 1,
        min_kept: float = DEFAULT_MIN_KEPT,
        rewind_to_step: int | None = None,
        name: str | None = None,
    ) -> None:
        custom = "a callable (name, parameter) -> scores"
        check_choice("WeightPruning: criterion", criterion, ("magnitude", "random"), custom)
        check_choice("WeightPruning: scope", scope, ("global", "layer"))
        check_choice("WeightPruning: structure", structure, ("element", "unit", "2:4"))
        check_integer("WeightPruning: every_n_epochs", every_n_epochs, 1)
        if structure == "unit" and params == DEFAULT_PARAMS:
            raise ValueError(
                "WeightPruning: structure='unit' needs params that leave out the output layer, where a pruned unit is a class "
                "that is gone: use, for example, params=['weights', '!embeddings', '!head.*']"
            )
        if rewind_to_step is not None:
            check_integer("WeightPruning: rewind_to_step", rewind_to_step, 0)
        self.sparsity = sparsity
        self.criterion = criterion
        self.scope = scope
        self.structure = structure
        self.every_n_epochs = every_n_epochs
        self.min_kept = Interval(0.0, 1.0, open_high=True).check("WeightPruning: min_kept", min_kept)
        self.rewind_to_step = rewind_to_step
        super().__init__(params, name)
        check_schedule("WeightPruning", sparsity, structure)
        self._state = PruningState()
        self._restored: dict[str, Any] = {}  # the state of a checkpoint, until the parameters are known
        self._is_restored = False  # whether the masks of this fit come from a checkpoint
        self._local_masks: dict[int, Tensor] = {}  # this rank's parts of the masks, keyed by the id of the parameter
        self._in_layers: set[int] = set()  # the ids of parameters of known layers
        self._optimizer_states: dict[int, dict[Any, Any]] = {}
        self._saved: set[int] = set()  # the ids of parameters whose values to rewind to are saved
        self._protected: set[str] = set()  # the names of the parameters that kept weights because of min_kept
        self._highest = self._final = 0.0  # the highest sparsity so far, and the last one of the schedule
        self._automatic = True

    # The step and the epoch -----------------------------------------------------------------------------------------

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the gradients, so that pruned weights build up no momentum."""
        mask_gradients_(*self._with_masks(params))

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the weights."""
        self.reproject(params)
        self._state.trained.update(self.name_of(p) for p in params)
        self._log_pruned()

    def step_end(self, step: Step, done: int) -> bool:
        """Save the weights if this is the step to rewind to."""
        self._state.steps += 1
        if self._state.steps == self.rewind_to_step:
            self._save_start()
        return False

    def reproject(self, params: list[Parameter]) -> None:
        """Mask the weights."""
        mask_(*self._with_masks(params))

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Prune at the end of each n-th epoch."""
        assert self._trainer is not None, "attached"
        if (self._trainer.current_epoch + 1) % self.every_n_epochs == 0:
            ids = {id(p) for p in params if self.name_of(p) in self._state.trained and p.numel()}
            trained = {name: p for name, p in self.tensors.items() if id(p) in ids}
            self._prune(trained, self.current["sparsity"], step)
            self._log_pruned()

    def route(self) -> str:
        """Return when it acts."""
        return "after the step and the epoch"

    # Pruning --------------------------------------------------------------------------------------------------------

    def _prune(self, params: dict[str, Parameter], target: float, step: Step) -> None:
        """Let the masks grow to a sparsity. All checks come first, so an error leaves the weights as they are."""
        check_rising(f"{self.name}: sparsity={self.sparsity!r}", [self._highest, target])
        self._highest = target
        if not target or (self._state.target, self._state.counted) == (target, set(params)):
            return
        known = [self._pruned(p) for p in params.values()]
        tensors = list(params.values())
        units, inputs = self.units(tensors), self._inputs_of(tensors)
        sizes = [count_units(p, u) if self.structure == "unit" else p.numel() for p, u in zip(tensors, units, strict=True)]
        limits = [prunable(size, target, self.min_kept) for size in sizes]
        how = self.scope, self.structure, units, inputs
        masks, protected = masks_of_scores(self._scores(params, step), target, *how, known, limits)
        before = sum(count_true(mask, p) for mask, p in zip(known, params.values(), strict=True))
        self._state.target, self._state.counted, self._state.structure = target, set(params), self.structure
        self._state.total = sum(p.numel() for p in tensors)
        self._state.reached = sum(count_true(mask, p) for mask, p in zip(masks, tensors, strict=True))
        self._warn_of_protected([name for index, name in enumerate(params) if index in protected])
        if self._state.reached > before:
            self._apply(dict(zip(params, masks, strict=True)))

    def _warn_of_protected(self, names: Sequence[str]) -> None:
        """Warn at the first pruning that would take more of a tensor than it may lose."""
        if names and not self._protected:
            instead = " More of the others is pruned instead." if self.scope == "global" else ""
            rank_zero_warn(
                f"{self.name}: at a sparsity of {self._state.target:.2%}, these tensors keep weights that would be pruned "
                f"without min_kept={self.min_kept:g}: {', '.join(names)}.{instead} The pruned fraction is "
                f"{self._state.reached / self._state.total:.2%}"
            )
        self._protected.update(names)

    def _inputs_of(self, params: Sequence[Tensor]) -> list[int]:
        """Return the dimension of each parameter's inputs: the last one in modules of unknown type."""
        known = zip(params, self.units(params), strict=True)
        return [input_dim(p, unit) if id(p) in self._in_layers else max(p.ndim - 1, 0) for p, unit in known]

    def _pruned(self, p: Parameter) -> Tensor | None:
        """Return which entries are pruned already: by this callback, and single weights by ``torch.nn.utils.prune`` too."""
        mine, hidden = self._local_masks.get(id(p)), self.hidden(p) if self.structure == "element" else None
        return mine if hidden is None else hidden if mine is None else mine | hidden

    def _scores(self, params: dict[str, Parameter], step: Step) -> list[Score]:
        if self.criterion == "magnitude":
            return [MagnitudeScores(p) for p in params.values()]
        if self.criterion == "random":
            return [RandomScores(p, hashed(self.name, name, *step.key)) for name, p in params.items()]
        return [self._custom_scores(name, p) for name, p in params.items()]

    def _custom_scores(self, name: str, p: Parameter) -> GivenScores:
        assert callable(self.criterion), "checked by the constructor"
        assert self._trainer is not None, "attached"
        scores = self.criterion(name, p)
        what = f"{self.name}: the criterion must return finite scores for {name!r} as a tensor of its shape, got"
        if not isinstance(scores, Tensor):
            raise TypeError(f"{what} {scores!r:.80} of type {type(scores).__name__}")
        if not isinstance(scores, DTensor):
            summed = scores.detach().to(torch.float32, copy=True)  # they may be the weights themselves, or of half precision
            scores = _lightning.mean_over_ranks(self._trainer, summed)
        try:
            return GivenScores(p, scores)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None

    def _apply(self, masks: dict[str, Tensor]) -> None:
        """Apply new masks to the weights, to the state of the optimizers, and to averages in other callbacks."""
        assert self._trainer is not None, "attached"
        self._state.masks |= {name: as_shard_of(mask, self.tensors[name]) for name, mask in masks.items()}
        self._local_masks = self._state.local_masks(self.tensors)
        if self.rewind_to_step is not None:
            self._rewind(self.rewind_to_step)
        params, local_masks = self._with_masks(list(self.tensors.values()))
        mask_(params, local_masks)
        for optimizer in self._trainer.optimizers:
            clear_state_(optimizer, params, local_masks)
        for average in _lightning.averaged_models(self._trainer):
            mask_copy_(average, self._state.masks)

    def _with_masks(self, params: Sequence[Parameter]) -> tuple[list[Parameter], list[Tensor]]:
        """Return the parameters that have masks, and their masks."""
        masked = [p for p in params if id(p) in self._local_masks]
        return masked, [self._local_masks[id(p)] for p in masked]

    # Rewinding ------------------------------------------------------------------------------------------------------

    def _save_start(self) -> None:
        """Save the tensors to rewind to, unless an earlier fit or a checkpoint has done so."""
        self._state.start = self._state.start or rewinding.snapshot(self._rewindable())

    def before_batch(self) -> None:
        """Save parameters that were frozen at the step to rewind to, before they are trained."""
        if self._state.start and self._trainer and self._saved != (trained := rewinding.trained_ids(self._trainer.optimizers)):
            self._saved = trained
            self._state.start = {**rewinding.snapshot(self._rewindable(self._state.start)), **self._state.start}

    def _rewind(self, step: int) -> None:
        assert self._trainer is not None, "attached"
        if not self._state.start:
            raise ValueError(late_rewinding_message(self.name, step, f"{self._state.steps} steps"))
        rewinding.restore_(self._rewindable(), self._state.start)
        rewinding.reset_optimizers_(self._trainer.optimizers, self._optimizer_states)

    def _rewindable(self, without: Container[str] = ()) -> dict[str, Tensor]:
        assert self._trainer is not None, "attached"
        tensors = rewinding.rewindable(self._trainer.lightning_module, self._trainer.optimizers)
        return {name: tensor for name, tensor in tensors.items() if name not in without}

    # Logging --------------------------------------------------------------------------------------------------------

    def _log_pruned(self) -> None:
        if self.logging:
            self.log_metrics(pruned=self._state.reached / max(self._state.total, 1))

    def fit_summary(self) -> str:
        """Return which fraction of the weights is pruned."""
        total = self._state.total
        pruned = f"{self._state.reached / total:.2%} of {total:,} weights are pruned" if total else "no weights are pruned"
        return f"{pruned} (target: {self._final:.2%})"

    # The fit and the checkpoint -------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select by name. Whether the fit resumes from a checkpoint is not known yet."""
        super().prepare(trainer, pl_module)
        self._is_restored = False

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, check the sparsity as far as it is known, and restore the masks of a checkpoint."""
        super().attach(trainer, pl_module)
        self._in_layers = self._ids_in_layers()
        self._automatic = pl_module.automatic_optimization
        self._optimizer_states = {} if self.rewind_to_step is None else rewinding.initial_states(trainer.optimizers)
        self._check_layers(known_targets(self.sparsity))
        self._restore()

    def resolve(self, clock: Clock) -> None:
        """Take up the schedule, and start with the masks of a checkpoint or of the same model's last fit, or without masks."""
        super().resolve(clock)
        self._highest = 0.0
        self._protected = set()
        self._check_plan(clock)
        if not self._is_restored and not self._state.matches(self.tensors):
            self._state = PruningState()
        self._local_masks = self._state.local_masks(self.tensors)
        with torch.no_grad():
            mask_(*self._with_masks(list(self.tensors.values())))
        if self.rewind_to_step == 0:
            self._save_start()

    def _check_layers(self, targets: Sequence[float]) -> None:
        tensors = list(self.tensors.values())
        how = self.scope, self.structure, self.units(tensors), self._inputs_of(tensors)
        check_layers(self.name, max(targets, default=0.0), self.tensors, *how, self.min_kept)

    def _check_plan(self, clock: Clock) -> None:
        """Check the sparsity that each pruning of the fit will reach."""
        schedule: Callable[[Moment], float] = self._schedules.get("sparsity", lambda _: self.current["sparsity"])
        markers = [marker for _, _, value in self._values_given() if isinstance(value, Schedule) for marker in value.markers]
        planned = planned_targets(schedule, clock, self.every_n_epochs) if clock.knows(markers) else {}
        self._final = schedule(END)
        what = f"{self.name}: sparsity={self.sparsity!r}"
        targets = [self.valid_ranges["sparsity"].check(what, target) for target in planned.values()]
        check_rising(what, targets)
        self._check_layers(targets)
        check_rewinding(self.name, self.rewind_to_step if self._automatic else None, planned, clock)
        if clock.is_trial or any(map(clock.ends_before, markers)):  # the latter is a warning already
            return
        for warning in schedule_warnings(planned, self._final, self.every_n_epochs, clock):
            rank_zero_warn(f"{self.name} {warning}")

    def detach(self) -> None:
        """Release the tensors. The masks stay, for a second fit."""
        super().detach()
        self._local_masks.clear()
        self._optimizer_states.clear()
        self._saved.clear()

    def _ids_in_layers(self) -> set[int]:
        """Return the ids of the parameters of layers that are known, by their classes."""
        assert self._trainer is not None, "attached"
        modules = owners(self._trainer.lightning_module)
        return {id(p) for p in self.tensors.values() if layer_units(modules[id(p)])}

    def tensors_changed(self, names: Sequence[str]) -> None:
        """Start without masks for tensors that were added or replaced during the fit."""
        for name in names:
            self._state.forget(name)
        self._in_layers = self._ids_in_layers()
        self._local_masks = self._state.local_masks(self.tensors)

    def reproject_copy(self, copy: Module) -> None:
        """Mask the weights of a copy of the module."""
        mask_copy_(copy, self._state.masks)

    def reset(self) -> None:
        """Remove the masks."""
        super().reset()
        self._state = PruningState()

    def pack_state(self) -> dict[str, Any]:
        """Return masks as bits, and the weights to rewind to as full tensors. Every rank must call it."""
        return self._restored or (self._state.packed() if self._state.steps or self._state.start else {})

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Restore the masks of a checkpoint: when the fit starts, or now if the fit goes on from an earlier point."""
        self._restored = packed
        self._restore()

    def _restore(self) -> None:
        if self._restored and self.tensors:
            self._state = PruningState.unpacked(self._restored, self.tensors, self.name, self.structure)
            self._restored, self._is_restored = {}, True
            self._local_masks = self._state.local_masks(self.tensors)
            self._highest = 0.0
