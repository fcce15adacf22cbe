"""Pruning during training: a schedule of sparsities, a criterion, and the resulting masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import Interval, check_choice
from lightning_reg._engine.clock import END
from lightning_reg._engine.selection import Params, selection_mask
from lightning_reg._engine.technique import Phase
from lightning_reg.pruning.criteria import Criterion, scores_of
from lightning_reg.pruning.groups import assign, check_mapping, keyed
from lightning_reg.pruning.masks import masks_of_zeros
from lightning_reg.pruning.rewound import RewindingRegularizer
from lightning_reg.pruning.state import Pruned
from lightning_reg.pruning.structures import (
    DEFAULT_MIN_KEPT,
    MIN_KEPT,
    Scope,
    Structure,
    count_true,
    masks_of_scores,
    most_prunable,
)
from lightning_reg.pruning.targets import check_layers, check_schedule, known_targets
from lightning_reg.pruning.timing import (
    check_rewinding,
    never_warning,
    parse_every,
    planned_targets,
    short_schedule_warning,
)
from lightning_reg.schedules import Schedule, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.clock import Clock, Moment
    from lightning_reg._engine.plan import Step

DEFAULT_PARAMS: Params = ["weights", "!embeddings"]


class WeightPruning(RewindingRegularizer):
    """Prune an exact fraction of the weights during training: θᵢ ← 0 for the lowest scores. Pruned weights stay 0.

    Runs in: the end of an epoch, after its last optimizer step and before its validation, or right after a step (masks grow);
    ``on_before_optimizer_step``, after clipping (gradients are masked); right after each optimizer step (weights are masked).

    Nothing is added to the model, and its parameters keep their names.
    The masks belong to the callback. A checkpoint stores one bit for each weight.
    Pruning a weight also clears the optimizer's state for it.
    Averages of the weights in EMA and SWA callbacks are masked too.
    Frozen parameters, and parameters whose optimizer has not stepped yet, are neither pruned nor counted.
    A second fit continues with the same masks if the model still has the zeros. With any other model, it starts with new
    masks.
    All ranks prune the same weights, even when parameters are sharded.
    Scores are compared in float32. A NaN weight counts as the largest. Among equal scores, the first ones are pruned.

    Args:
        sparsity: The fraction of all selected weights to prune, in [0, 1), including those already pruned; or a schedule that
            never decreases; or a mapping from patterns of parameter names to these. ``Cubic(0.0, 0.9, until=0.7)`` has the
            shape that Zhu and Gupta recommend, and leaves the last 30% of training for recovery. Where a function decreases,
            its maximum so far applies. In a mapping, each sparsity counts over the parameters that match its pattern, and
            parameters that match none are not pruned. For ``"2:4"``: 0.5, or a step from 0 to 0.5.
        criterion: ``"magnitude"`` (the smallest weights are pruned first), ``"random"``, or a callable
            ``(name, parameter) -> scores`` that returns a tensor of the parameter's shape; the lowest scores are pruned first.
            Scores are averaged over processes.
        scope: ``"global"`` for a fraction of all selected weights together, ``"layer"`` for the same fraction of each tensor.
        structure: ``"element"`` for single weights. ``"unit"`` for whole output units with the smallest L2 norms; with scope
            ``"global"``, units are compared by the root mean square of their weights, and as many are pruned as the sparsity
            allows. ``"2:4"`` for two of every four weights along the inputs of a linear layer, or the input channels of a
            convolution.
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``. The default leaves out embeddings, because their
            magnitudes are not comparable with those of other weights. For ``structure="unit"``, name the layers: in an output
            layer, pruning a unit removes a class.
        every: How often to prune: ``"1ep"`` at the end of each epoch, ``"100st"`` after every 100th optimizer step, for one
            long epoch or endless data.
        min_kept: The fraction of its weights, or units, that each tensor keeps, in [0, 1), and always at least one. With scope
            ``"global"``, the other tensors lose more instead. A warning names the protected tensors. The default becomes
            1 − sparsity where that is smaller.
        keep_zeros: Keep weights at 0 that are 0 when the fit starts, to continue training a sparse model. All-zero tensors are
            left out.
        rewind_to_step: After each pruning, set all trained parameters and batch normalization statistics back to their values
            after this many optimizer steps, and reset the optimizers, to find a winning lottery ticket. 0 is the start of the
            fit. In manual optimization, the steps of all optimizers count. The learning rate schedule continues. A copy of the
            model is kept in memory and in checkpoints.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If the sparsity is outside [0, 1), decreases, or cannot be reached because of ``min_kept``; if scores have
            the wrong shape or are not finite; if ``"2:4"`` does not divide the inputs; if ``structure="unit"`` comes without
            ``params``; if a checkpoint has the masks of another model; or under FSDP1.
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
    valid_ranges = {"sparsity": Interval(0.0, 1.0, open_high=True)}
    accept_mappings = frozenset({"sparsity"})

    def __init__(
        self,
        sparsity: Values,
        *,
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        structure: Structure = "element",
        params: Params = DEFAULT_PARAMS,
        every: str = "1ep",
        min_kept: float = DEFAULT_MIN_KEPT,
        keep_zeros: bool = False,
        rewind_to_step: int | None = None,
        name: str | None = None,
    ) -> None:
        custom = "a callable (name, parameter) -> scores"
        check_choice("WeightPruning: criterion", criterion, ("magnitude", "random"), custom)
        check_choice("WeightPruning: scope", scope, ("global", "layer"))
        check_choice("WeightPruning: structure", structure, ("element", "unit", "2:4"))
        if structure == "unit" and params == DEFAULT_PARAMS:
            raise ValueError(
                "WeightPruning: structure='unit' needs params that leave out the output layer, because pruning one of its "
                "units removes a class: use, for example, params=['weights', '!embeddings', '!head.*']"
            )
        check_mapping("WeightPruning", sparsity)
        self._every = parse_every("WeightPruning", every)
        self.sparsity = sparsity
        self.criterion = criterion
        self.scope = scope
        self.structure = structure
        self.every = every
        self.min_kept = MIN_KEPT.check("WeightPruning: min_kept", min_kept)
        self.keep_zeros = keep_zeros
        super().__init__(rewind_to_step, params, name)
        for key, value in keyed(sparsity).items():
            check_schedule(f"WeightPruning: {key}", value, structure)
        self._groups: dict[str, str] = {}  # the key of the sparsity of each parameter, by name
        self._protected: set[str] = set()  # the keys of parameters that kept weights because of min_kept
        self._highest: dict[str, float] = {}  # the highest sparsity so far, by its key
        self._final: dict[str, float] = {}  # the last one of the schedule
        self._automatic = True

    # The step and the epoch -----------------------------------------------------------------------------------------

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the weights."""
        super().weights(params, optimizer, step)
        self._log_pruned()

    def step_end(self, step: Step, done: int) -> bool:
        """Prune after each n-th step."""
        super().step_end(step, done)
        if self._every.unit == "ep" or not self._every.is_due(self._state.done, done):
            return False
        assert self._trainer is not None, "attached"
        assert self._clock is not None, "resolved"
        self._state.done = done
        self.update(self._clock.advance(_lightning.point_after_step(self._trainer, done)))
        return self._prune([p for o in self._trainer.optimizers for p in self.parameters_of(o)], step)

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Prune at the end of each n-th epoch."""
        assert self._trainer is not None, "attached"
        if self._every.unit == "ep" and self._every.is_due(self._trainer.current_epoch, self._trainer.current_epoch + 1):
            self._prune(params, step)

    def update(self, moment: Moment) -> None:
        """Set the sparsities to those of a moment, but never below those already reached."""
        super().update(moment)
        self.current |= {key: max(self.current[key], highest) for key, highest in self._highest.items()}

    def route(self) -> str:
        """Return when pruning acts."""
        return "after the step" if self._every.unit == "st" else "after the step and the epoch"

    # Pruning --------------------------------------------------------------------------------------------------------

    def _prune(self, params: Sequence[Parameter], step: Step) -> bool:
        """Grow the masks to the current sparsities; return whether they have grown. An error leaves the weights unchanged."""
        ids = {id(p) for p in params if self.name_of(p) in self._state.trained and p.numel()}
        masks: dict[str, Tensor] = {}
        for key in self.current:
            self._highest[key] = max(self._highest.get(key, 0.0), self.current[key])
            members = {name: p for name, p in self.tensors.items() if id(p) in ids and self._groups[name] == key}
            if self._is_outdated(key, members):
                masks |= self._grown_masks(key, members, step)
        if masks:
            self._add_masks(masks)
            self.rewind()
            self._apply_masks()
        self._log_pruned()
        return bool(masks)

    def _is_outdated(self, key: str, params: Collection[str]) -> bool:
        """Return whether the trained parameters or the sparsity have changed since the last pruning."""
        last, target = self._state.groups.get(key, Pruned()), self._highest[key]
        return bool(target and params) and (last.target, last.names) != (target, set(params))

    def _grown_masks(self, key: str, params: dict[str, Parameter], step: Step) -> dict[str, Tensor]:
        """Return larger masks of parameters that are pruned together; none if the masks stay the same."""
        assert self._trainer is not None, "attached"
        target, tensors = self._highest[key], list(params.values())
        known = [self._pruned(p) for p in tensors]
        units, inputs = self.units(tensors), self._inputs_of(tensors)
        limits = most_prunable(tensors, units, self.structure, target, self.min_kept)
        scores = scores_of(self.name, self.criterion, params, step.key, self._trainer)
        masks, protected = masks_of_scores(scores, target, self.scope, self.structure, units, inputs, known, limits)
        before = sum(count_true(mask, p) for mask, p in zip(known, tensors, strict=True))
        reached = sum(count_true(mask, p) for mask, p in zip(masks, tensors, strict=True))
        self._state.groups[key] = Pruned(target, set(params), sum(p.numel() for p in tensors), reached)
        self._state.structure = self.structure
        self._warn_of_protected(key, [name for index, name in enumerate(params) if index in protected])
        return dict(zip(params, masks, strict=True)) if reached > before else {}

    def _warn_of_protected(self, key: str, names: Sequence[str]) -> None:
        """Warn at the first pruning that would take more from a tensor than it may lose."""
        if names and key not in self._protected:
            self._protected.add(key)
            instead = " The other tensors lose more instead." if self.scope == "global" else ""
            group = self._state.groups[key]
            rank_zero_warn(
                f"{self.name}: at a sparsity of {group.target:.2%}, min_kept={self.min_kept:g} protects weights in these "
                f"tensors: {', '.join(names)}.{instead} The pruned fraction is {group.reached / group.total:.2%}"
            )

    def _keep_zeros(self) -> None:
        """Mask the weights that are 0 when the fit starts."""
        zeros, empty = masks_of_zeros(self.tensors)
        if empty:
            rank_zero_warn(f"{self.name}: keep_zeros leaves out all-zero tensors, which may be new: {', '.join(empty)}")
        self._add_masks({name: mask | self._local_masks.get(id(self.tensors[name]), mask) for name, mask in zeros.items()})
        for key in self.current:
            members = [p for name, p in self.tensors.items() if self._groups[name] == key and not is_lazy(p)]
            reached = sum(count_true(self._local_masks.get(id(p)), p) for p in members)
            self._state.groups[key] = Pruned(total=sum(p.numel() for p in members), reached=reached)
        self._state.structure = self.structure

    # Logging --------------------------------------------------------------------------------------------------------

    def epoch_metrics(self) -> dict[str, float]:
        """Return the target and the pruned fraction of all weights, and of those that each pattern matches."""
        return {**self.current, **self._fractions()}

    def _log_pruned(self) -> None:
        if self.logging:
            self.log_metrics(**self._fractions())

    def _fractions(self) -> dict[str, float]:
        groups = {key.replace("sparsity", "pruned", 1): group for key, group in self._state.groups.items()}
        fractions = {key: group.reached / max(group.total, 1) for key, group in groups.items()}
        return {**fractions, "pruned": self._state.reached / max(self._state.total, 1)}

    def fit_summary(self) -> str:
        """Return the pruned fraction of the weights."""
        total = self._state.total
        pruned = f"{self._state.reached / total:.2%} of {total:,} weights are pruned" if total else "no weights are pruned"
        patterns = {key: key.removeprefix("sparsity").removeprefix("/") for key in self._final}
        targets = (f"{final:.2%}{' of ' * bool(patterns[key])}{patterns[key]}" for key, final in self._final.items())
        return f"{pruned} (target: {', '.join(targets)})"

    # The fit and the checkpoint -------------------------------------------------------------------------------------

    def chosen(self, module: Module) -> dict[str, bool]:
        """Return whether a sparsity applies to each parameter, by name."""
        self._groups = {**assign(module, self.params, self.sparsity), **self._groups}
        return {name: name in self._groups for name in selection_mask(module, self.params)}

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select by name."""
        self._groups = {}
        super().prepare(trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, check the sparsity as far as it is known, and restore the masks of a checkpoint."""
        super().attach(trainer, pl_module)
        self._automatic = pl_module.automatic_optimization
        for key, value in keyed(self.sparsity).items():
            self._check_layers(key, known_targets(value))

    def resolve(self, clock: Clock) -> None:
        """Resume schedules and masks from a checkpoint or the same model's last fit; otherwise, start without masks."""
        super().resolve(clock)
        assert self._trainer is not None, "attached"
        self._protected, self._final, self._highest = set(), {}, self._restored_targets()
        for key, valid, value in self._values_given():
            self._check_plan(key, valid, value, clock)
        if not clock.is_trial and (warning := never_warning(self._every, clock.plan)):
            rank_zero_warn(f"{self.name} {warning}")
        done = self._trainer.global_step
        self._state.done = min(self._state.done, done) if self._is_restored else done
        if self.keep_zeros and not self._is_restored:
            self._keep_zeros()

    def _check_layers(self, key: str, targets: Sequence[float]) -> None:
        members = {name: p for name, p in self.tensors.items() if self._groups[name] == key}
        how = self.scope, self.structure, self.units(list(members.values())), self._inputs_of(list(members.values()))
        check_layers(self.name, max(targets, default=0.0), members, *how, self.min_kept)

    def _check_plan(self, key: str, valid: Interval, value: Any, clock: Clock) -> None:
        """Check the sparsity of each planned pruning of the fit."""
        schedule: Callable[[Moment], float] = self._schedules.get(key, lambda _: self.current[key])
        markers = value.markers if isinstance(value, Schedule) else ()
        planned = planned_targets(schedule, clock, self._every) if clock.knows(markers) else {}
        self._final[key] = schedule(END)
        targets = [valid.check(f"{self.name}: {key}={value!r}", target) for target in planned.values()]
        self._check_layers(key, targets)
        check_rewinding(self.name, self.rewind_to_step if self._automatic else None, planned, clock)
        late = clock.is_trial or any(map(clock.ends_before, markers))  # the latter is a warning already
        if not late and (warning := short_schedule_warning(planned, self._final[key], clock)):
            rank_zero_warn(f"{self.name} {warning}")

    def _restore(self) -> None:
        super()._restore()
        self._state.groups = {key: group for key, group in self._state.groups.items() if key in self.current}
        self._highest = self._restored_targets()

    def _restored_targets(self) -> dict[str, float]:
        groups = self._state.groups if self._is_restored else {}
        return {key: group.target for key, group in groups.items()}
