"""Pruning while training: masks that live beside the model and hold after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import Interval, check_choice, check_integer
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.selection import lookup
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.random import hashed
from lightning_reg._tensors.shards import full_tensor, local_tensor
from lightning_reg.pruning import rewinding
from lightning_reg.pruning.masks import clear_state_, mask_, mask_gradients_
from lightning_reg.pruning.scores import Given, Magnitude, Random, Score, as_shard_of
from lightning_reg.pruning.state import PruningState
from lightning_reg.pruning.structures import Scope, Structure, count_true, masks_of_scores
from lightning_reg.pruning.targets import (
    check_layers,
    check_not_emptied,
    check_rewinding,
    check_rising,
    check_schedule,
    known_targets,
    planned_targets,
    schedule_warnings,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Plan, Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value

Criterion = Literal["magnitude", "random"] | Callable[[str, Parameter], Tensor]
"""``"magnitude"``, ``"random"``, or ``(name, parameter) -> scores`` of the parameter's shape, the lowest pruned first."""


class WeightPruning(ParameterRegularizer):
    r"""Set the weights of lowest score to 0 for good: :math:`\theta_i \leftarrow 0` where :math:`m_i`, exactly a share of all.

    Runs in: after the last step of an epoch and before its validation (masks grow), ``on_before_optimizer_step`` (gradients are
    masked, after clipping) and right after each optimizer step (weights are masked).

    Parameters keep their names and nothing is put into the model. The masks are the callback's state, one bit for each weight
    in a checkpoint. Where a weight is newly pruned the optimizer forgets it, and averages of the weights that EMA or SWA
    callbacks keep are masked, too. Frozen parameters, and those whose optimizer has not stepped yet, are neither pruned nor
    counted.

    A second fit goes on with the masks if the model still has their zeros; any other model begins anew. Ranks prune alike,
    sharded parameters included. Scores are compared in float32, a weight that is NaN counts as the largest, and ties are taken
    in order.

    Args:
        sparsity: The share of all selected weights that is 0, in [0, 1), or a schedule that does not fall, such as
            ``Cubic(0.0, 0.9, until=0.7)``; what is pruned already counts. For ``"2:4"`` 0.5, or 0 before.
        criterion: ``"magnitude"`` (the smallest go first), ``"random"``, or a callable ``(name, parameter) -> scores`` of the
            parameter's shape, of which the lowest go first; of several ranks' scores the mean counts.
        scope: ``"global"`` for the share of all selected weights together, ``"layer"`` for the same share of each tensor.
        structure: ``"element"`` for single weights; ``"unit"`` for whole output units by their L2 norm (globally by the root
            mean square of their weights, as many as fit into the share); ``"2:4"`` for two of each four along the last
            dimension.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        every_n_epochs: Prune at the end of each n-th epoch, ≥ 1.
        rewind_to_step: Whenever more is pruned, give all trained parameters and the statistics of batch normalisation the
            values that they had after so many optimizer steps (0: when the fit started; in manual optimization those of all
            optimizers count) and reset the optimizers, to find a winning lottery ticket; the learning rate goes on. A copy of
            the model is kept for it, also in the checkpoint.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a share outside [0, 1) or a schedule that falls; a share that leaves nothing of a layer; scores of
            another shape or not finite; a last dimension that ``"2:4"`` cannot divide; masks of another model; FSDP1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Cubic
        >>> pruning = WeightPruning(Cubic(0.0, 0.9, until=0.7), params=["weights", "!head.*"])
        >>> trainer = Trainer(callbacks=[pruning], logger=False)

    Reference:
        M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017;
        J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2019;
        J. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (rewinding).
    """

    phase = Phase.PRUNING
    supports_fsdp1 = False
    resets_each_fit = False
    valid_ranges = {"sparsity": Interval(0.0, 1.0, open_high=True)}

    def __init__(
        self,
        sparsity: Value,
        *,
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        structure: Structure = "element",
        params: Params = "weights",
        every_n_epochs: int = 1,
        rewind_to_step: int | None = None,
        name: str | None = None,
    ) -> None:
        callables = "a callable (name, parameter) -> scores"
        check_choice("WeightPruning: criterion", criterion, ("magnitude", "random"), callables)
        check_choice("WeightPruning: scope", scope, ("global", "layer"))
        check_choice("WeightPruning: structure", structure, ("element", "unit", "2:4"))
        check_integer("WeightPruning: every_n_epochs", every_n_epochs, 1)
        if rewind_to_step is not None:
            check_integer("WeightPruning: rewind_to_step", rewind_to_step, 0)
        self.sparsity = sparsity
        self.criterion = criterion
        self.scope = scope
        self.structure = structure
        self.every_n_epochs = every_n_epochs
        self.rewind_to_step = rewind_to_step
        super().__init__(params, name)
        check_schedule("WeightPruning", sparsity, structure)
        self._state = PruningState()
        self._restored: dict[str, Any] = {}
        self._bound: dict[int, Tensor] = {}  # this rank's parts of the masks, by the parameter's id
        self._states: dict[int, dict[Any, Any]] = {}
        self._highest = self._final = 0.0
        self._automatic = True
        self._trainer: Trainer | None = None

    # Where it acts --------------------------------------------------------------------------------------------------

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the gradients, so that the optimizer remembers nothing of pruned weights."""
        mask_gradients_(*self._masked(params))

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Mask the weights; keep those to rewind to."""
        self.reproject(params)
        self._state.steps += 1
        self._state.trained.update(self.name_of(p) for p in params)
        if self._state.steps == self.rewind_to_step:
            self._keep_start()
        self._log_reached()

    def reproject(self, params: list[Parameter]) -> None:
        """Mask the weights."""
        mask_(*self._masked(params))

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Prune at the end of each n-th epoch."""
        assert self._trainer is not None, "attached"
        if (self._trainer.current_epoch + 1) % self.every_n_epochs == 0:
            held = {id(p) for p in params}
            live = {name: p for name, p in self.tensors.items() if id(p) in held and name in self._state.trained and p.numel()}
            self._prune(live, self.current["sparsity"], step)
            self._log_reached()

    def route(self) -> str:
        """Say when it acts."""
        return "after the step and the epoch"

    # Pruning --------------------------------------------------------------------------------------------------------

    def _prune(self, live: dict[str, Parameter], target: float, step: Step) -> None:
        """Let the masks grow to a share; nothing is changed if that is refused."""
        check_rising(f"{self.name}: sparsity={self.sparsity!r}", [self._highest, target])
        self._highest = target
        total = sum(p.numel() for p in live.values())
        if not target or (self._state.target, self._state.total) == (target, total):
            return
        known = [self._bound.get(id(p)) for p in live.values()]
        units = self.units(list(live.values()))
        found = masks_of_scores(self._scores(live, step), target, self.scope, self.structure, units, known)
        counts = {name: (count_true(mask, p), p.numel()) for (name, p), mask in zip(live.items(), found, strict=True)}
        check_not_emptied(self.name, target, counts, self.structure)
        before = sum(count_true(mask, p) for mask, p in zip(known, live.values(), strict=True))
        self._state.target, self._state.total, self._state.structure = target, total, self.structure
        self._state.reached = sum(count for count, _ in counts.values())
        if self._state.reached > before:
            self._take(dict(zip(live, found, strict=True)))

    def _scores(self, live: dict[str, Parameter], step: Step) -> list[Score]:
        if self.criterion == "magnitude":
            return [Magnitude(p) for p in live.values()]
        if self.criterion == "random":
            return [Random(p, hashed(self.name, name, *step)) for name, p in live.items()]
        return [self._scored(name, p) for name, p in live.items()]

    def _scored(self, name: str, p: Parameter) -> Given:
        assert callable(self.criterion), "checked when made"
        assert self._trainer is not None, "attached"
        scores = self.criterion(name, p)
        what = f"{self.name}: the criterion must give scores for {name!r} as a tensor of its shape, got"
        if not isinstance(scores, Tensor):
            raise TypeError(f"{what} {scores!r:.80} of type {type(scores).__name__}")
        if not isinstance(scores, DTensor):
            scores = _lightning.mean_over_ranks(self._trainer, scores)
        try:
            return Given(p, scores)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None

    def _take(self, masks: dict[str, Tensor]) -> None:
        """Put masks into force: on the weights, in the optimizers, and on averages that others keep."""
        assert self._trainer is not None, "attached"
        self._state.masks |= {name: as_shard_of(mask, self.tensors[name]) for name, mask in masks.items()}
        self._bound = self._state.bound(self.tensors)
        optimizers = self._trainer.optimizers
        if self.rewind_to_step is not None:
            if not self._state.start:
                raise ValueError(
                    f"{self.name}: rewind_to_step={self.rewind_to_step} lies after the first pruning, which comes after "
                    f"{self._state.steps} steps: prune later, or rewind to an earlier step"
                )
            rewinding.restore_(self._rewindable(), self._state.start)
            rewinding.reset_(optimizers, self._states)
        params, bound = self._masked(list(self.tensors.values()))
        mask_(params, bound)
        for optimizer in optimizers:
            clear_state_(optimizer, params, bound)
        for average in _lightning.averaged_models(self._trainer):
            self._mask_average(average)

    def _mask_average(self, average: torch.nn.Module) -> None:
        for name, p in lookup(average, list(self._state.masks)).items():
            if not is_lazy(p):
                mask = self._state.masks[name]
                mask_([p], [local_tensor(mask if isinstance(p, DTensor) else full_tensor(mask)).to(p.device)])

    def _masked(self, params: Sequence[Parameter]) -> tuple[list[Parameter], list[Tensor]]:
        """Return those parameters that have masks, and the masks."""
        held = [p for p in params if id(p) in self._bound]
        return held, [self._bound[id(p)] for p in held]

    def _keep_start(self) -> None:
        self._state.start = self._state.start or rewinding.snapshot(self._rewindable())

    def _rewindable(self) -> dict[str, Tensor]:
        assert self._trainer is not None, "attached"
        return rewinding.rewindable(self._trainer.lightning_module, self._trainer.optimizers)

    # What is shown --------------------------------------------------------------------------------------------------

    def _log_reached(self) -> None:
        if self.logging:
            self.log_metrics(pruned=self._state.reached / max(self._state.total, 1))

    def fit_summary(self) -> str:
        """Return how much was pruned."""
        total = self._state.total
        share = f"{self._state.reached / total:.2%} of {total:,} weights are pruned" if total else "nothing is pruned"
        return f"{share}, {self._final:.2%} asked for"

    # The fit and the checkpoint -------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the parameters up, check what can be asked for of them, and lay restored masks beside them."""
        super().attach(trainer, pl_module)
        self._trainer, self._automatic = trainer, pl_module.automatic_optimization
        self._states = rewinding.started(trainer.optimizers) if self.rewind_to_step is not None else {}
        self._check_layers(known_targets(self.sparsity))
        self._take_restored()

    def resolve(self, plan: Plan) -> None:
        """Bind the schedule, and begin: with the masks of a checkpoint or of the same model's last fit, or anew."""
        super().resolve(plan)
        self._highest = 0.0
        self._check_plan(plan)
        if not self._restored and not self._state.fits(self.tensors):
            self._state = PruningState()
        self._restored = {}
        self._bound = self._state.bound(self.tensors)
        with torch.no_grad():
            mask_(*self._masked(list(self.tensors.values())))
        if self.rewind_to_step == 0:
            self._keep_start()

    def detach(self) -> None:
        """Let go of the tensors, not of the masks."""
        super().detach()
        self._bound.clear()
        self._states.clear()
        self._trainer = None

    def reset(self) -> None:
        """Forget the masks."""
        super().reset()
        self._state = PruningState()

    def pack_state(self) -> dict[str, Any]:
        """Return the masks as bits, and the weights to rewind to, as full tensors: every rank must call it."""
        return self._restored or (self._state.packed() if self._state.steps or self._state.start else {})

    def unpack_state(self, packed: dict[str, Any]) -> None:
        """Take over the masks of the run that is resumed."""
        self._restored = packed
        self._take_restored()

    def _take_restored(self) -> None:
        if self._restored and self.tensors:
            self._state = PruningState.unpacked(self._restored, self.tensors, self.name)
            if self._state.masks and self._state.structure != self.structure:
                raise ValueError(
                    f"{self.name}: the checkpoint's masks are of structure={self._state.structure!r}, got "
                    f"structure={self.structure!r}: resume with the same, or give the callback another name to begin anew"
                )

    def _check_layers(self, targets: Sequence[float]) -> None:
        live = {name: p for name, p in self.tensors.items() if p.requires_grad and not is_lazy(p) and p.numel()}
        units = dict(zip(live, self.units(list(live.values())), strict=True))
        check_layers(self.name, max(targets, default=0.0), live, self.scope, self.structure, units)

    def _check_plan(self, plan: Plan) -> None:
        """Look ahead: at the share that each pruning of the fit is to reach."""
        schedule: Callable[[float], float] = self._schedules.get("sparsity", lambda _: self.current["sparsity"])
        planned = planned_targets(schedule, plan, self.every_n_epochs)
        self._final = schedule(1.0)
        what = f"{self.name}: sparsity={self.sparsity!r}"
        targets = [self.valid_ranges["sparsity"].check(what, target) for target in planned.values()]
        check_rising(what, targets)
        self._check_layers(targets)
        check_rewinding(self.name, self.rewind_to_step if self._automatic else None, planned, plan)
        for doubt in schedule_warnings(planned, self._final, self.every_n_epochs, plan):
            rank_zero_warn(f"{self.name} {doubt}")
