"""What each callback must do to a model of another library, as references in plain torch.

A reference knows the weights and their output units from ``models.py``, which says by hand what they are.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import observed
import torch
from observed import LR, Recording, of_matrices, optimizer_alone_moves, penalized
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from zoo.models import BATCH

from lightning_reg import (
    ActivityPenalty,
    AdaptiveGradientClipping,
    DropoutInjection,
    DropoutScheduler,
    ElasticNetPenalty,
    GradientCentralization,
    GradientNoise,
    GradientNormClipping,
    GradientValueClipping,
    GroupLassoPenalty,
    GroupSoftThresholding,
    L1Penalty,
    L2Penalty,
    MaxNorm,
    MinMaxNorm,
    MonteCarloDropout,
    NonFiniteGradientGuard,
    NonNegative,
    OrthogonalityPenalty,
    OverfittingMonitor,
    ParameterMonitor,
    PeakGradientDropping,
    QuantileGradientClipping,
    RandomShrinkage,
    SoftThresholding,
    StartingPointPenalty,
    UnitNorm,
    WeightClipping,
    WeightDecay,
    WeightDecayScheduler,
    WeightPruning,
    ZScoreGradientClipping,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo.models import Model

    from lightning_reg.custom import Regularizer


STEPS = 4
"""The number of steps of each fit, in two epochs."""


class Drops(TorchFunctionMode):
    """Records the dropout that runs, whichever module asks for it.

    Attributes:
        rates: The rate of each call of a function that drops, 0 if it was called to do nothing.
        zeros: The number of entries that ``torch.nn.functional.dropout`` set to 0.
        entries: The number of its other entries, and these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.zeros = self.entries = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        rate = _rate(function, args, kwargs or {})
        if rate is not None:
            self.rates.append(rate)
        if function is functional.dropout and rate:
            alive = args[0] != 0
            self.zeros += int((alive & (output == 0)).sum())
            self.entries += int(alive.sum())
        return output


def _rate(function: Any, args: Any, kwargs: Any) -> float | None:
    """Return the rate with which a function was called, or ``None`` if it drops nothing."""
    name = getattr(function, "__name__", "")
    if function in (functional.dropout, functional.multi_head_attention_forward):
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        rate = given.arguments["p" if function is functional.dropout else "dropout_p"]
        return rate if given.arguments["training"] else 0.0
    if name == "scaled_dot_product_attention":
        return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
    if name == "lstm":
        return args[5] if args[6] else 0.0
    return 1 - args[1] if name == "bernoulli_" else None  # of stochastic depth


@dataclass(frozen=True)
class Case:
    """A callback on any model, and what it must do there.

    Args:
        active: Returns the callback, for a strength and a model.
        effect: Returns the check for a strength. The check gets the module after each step, and raises an error if something
            is wrong.
        strength: The strength; ``None`` for a callback that has none.
        extra: An additional objective of the module's activations, whose gradients the check needs.
        options: Attributes of ``Watched``.
        changes_training: Whether it changes ordinary training.
        validates: Whether it needs validation data.
    """

    active: Callable[[Any, Model], Regularizer]
    effect: Callable[[Any], Callable[[Any], None]]
    strength: Any = None
    extra: Callable[[Watched], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    changes_training: bool = True
    validates: bool = False


class Watched(Recording):
    """Mixin for a model of another library, under plain SGD.

    Attributes:
        made, used: The outputs of the model's hidden modules in this step, before and after injected dropout, by name.
        drops: The dropout of this step.
        extra_gradients: The gradients of the additional objective, if there is one.
        changes: The relative change of gradients or weights by the callbacks, one per step.
        dropped: The number of hidden activations that injected dropout has set to 0, and of those that it could have, so far.
    """

    lr = LR
    weight_decay = 0.0
    poisoned: int | None = None  # the step whose loss is NaN
    factors = (1.0,) * STEPS  # of the losses

    def watch(self, model: Model, case: Case) -> None:
        weights, columns = (model.matching(pattern, self) for pattern in (model.weights, model.columns))
        self.record(case.effect(case.strength), weights, columns)
        self.model_entry, self.case = model, case
        self.changes: list[float] = []
        self.dropped = torch.zeros(2)
        self.plain_rates = rates_in_training(model)
        self.inner = {n: m for n, m in self.named_modules() if any(fnmatchcase(n, glob) for glob in model.hidden)}
        self.made: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}
        for name, value in case.options.items():
            setattr(self, name, value)

    def on_train_start(self) -> None:
        """Record activations. A hook of this time runs after those that callbacks have registered."""
        super().on_train_start()
        self.handles = []
        for name, module in self.inner.items():
            self.handles.append(module.register_forward_hook(_recorder(self.made, name), prepend=True))
            self.handles.append(module.register_forward_hook(_recorder(self.used, name)))

    def on_train_end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drops = Drops()
        with self.drops:
            loss = super().training_step(batch, batch_idx)
        if self.case.extra:
            self.extra_gradients = self.gradients_of(self.case.extra(self))
        return loss * math.nan if self.steps == self.poisoned else loss

    def loss_of(self, output: Any) -> Tensor:
        return super().loss_of(output) * self.factors[self.steps]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.changes.append(max(_change(self.gradients, self.data_gradients), _change(self.after, self.updated())))
        super().on_train_batch_end(outputs, batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Validated(Watched):
    """The same with a validation step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = type(self).__bases__[-1].training_step(self, batch, batch_idx)  # that of the model, unobserved
        self.log("val/loss", loss["loss"] if isinstance(loss, dict) else loss)


def rates_in_training(model: Model) -> list[float]:
    """Return the rate of each dropout in a forward pass of training."""
    with torch.no_grad(), Drops() as drops:
        model.build().predict_step(model.batch(), 0)
    return drops.rates


def _recorder(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    return record


def _change(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative change of tensors."""
    changes = {name: actual.get(name, torch.zeros(())) - tensor for name, tensor in expected.items()}
    return observed.norm_of(changes) / max(observed.norm_of(expected), 1e-30)


# What must hold after each step --------------------------------------------------------------------------------------


def activities_penalized(model: Watched) -> None:
    """The gradient is the data gradient plus that of the penalty on recorded activations."""
    for name, gradient in model.gradients.items():
        assert_close(gradient, model.data_gradients[name] + model.extra_gradients[name], rtol=1e-4, atol=1e-6)
    optimizer_alone_moves(model)


def activity_l1(strength: float) -> Callable[[Watched], Tensor]:
    return lambda model: strength * torch.stack([output.abs().sum() for output in model.used.values()]).sum() / BATCH


def share_is(p: float, zeros: float, entries: float) -> None:
    """A share of random zeros is within six standard errors of its probability."""
    assert abs(zeros / entries - p) < 6 * math.sqrt(p * (1 - p) / entries), zeros / entries


def dropped_after_hidden(p: float) -> Callable[[Watched], None]:
    """Some entries of the hidden outputs are 0, and the others are scaled by 1/(1 − p)."""

    def holds(model: Watched) -> None:
        made, used = (torch.cat([t.detach().flatten() for t in outputs.values()]) for outputs in (model.made, model.used))
        alive = made != 0
        dropped = alive & (used == 0)
        model.dropped += torch.tensor([float(dropped.sum()), float(alive.sum())])
        share_is(p, *model.dropped.tolist())  # so far, since a step of a small model says little
        assert_close(used[~dropped], made[~dropped] / (1 - p))
        optimizer_alone_moves(model)

    return holds


def all_dropout_runs_at(p: float) -> Callable[[Watched], None]:
    """Each dropout of the forward pass runs at this rate, in modules and in functions that read a rate."""

    def holds(model: Watched) -> None:
        assert model.drops.rates == [p] * len(model.plain_rates)
        if model.drops.entries:
            share_is(p, model.drops.zeros, model.drops.entries)
        optimizer_alone_moves(model)

    return holds


def skipped_when_poisoned(model: Watched) -> None:
    """A step whose loss is NaN does not happen. The others are not changed."""
    assert (not model.gradients) is (model.steps == model.poisoned)
    assert all(bool(p.isfinite().all()) for p in model.after.values())
    observed.unchanged(model)


def pruned(fraction: float) -> Callable[[Watched], None]:
    """From the end of the first epoch on, exactly this share of the weights except embeddings is 0, always the same ones."""

    def holds(model: Watched) -> None:
        if model.steps + 1 < STEPS // 2:
            optimizer_alone_moves(model)
            return
        names = [
            name for name in model.weight_names if name not in model.model_entry.matching(model.model_entry.embeddings, model)
        ]
        zeros = {name: model.after[name] == 0 for name in names}
        counts = {name: (int(zero.sum()), zero.numel()) for name, zero in zeros.items()}
        if model.model_entry.pruning == "layer":
            assert all(count == round(fraction * numel) for count, numel in counts.values()), counts
        else:
            assert sum(count for count, _ in counts.values()) == round(fraction * sum(numel for _, numel in counts.values()))
        model.zeros = getattr(model, "zeros", zeros)
        assert all(torch.equal(model.zeros[name], zeros[name]) for name in names)

    return holds


UNEVEN = {"factors": (1.0, 0.5, 20.0, 20.0)}
"""Options that make the norms of gradients fall and rise, whatever the model."""

CASES = {
    "ActivityPenalty": Case(
        lambda x, model: ActivityPenalty(x, modules=model.hidden),
        lambda x: activities_penalized,
        0.01,
        extra=activity_l1(0.01),
    ),
    "AdaptiveGradientClipping": Case(
        lambda x, model: AdaptiveGradientClipping(x), lambda x: observed.adaptive_clipped(x, eps=1e-3), 0.01
    ),
    "DropoutInjection": Case(lambda x, model: DropoutInjection(x, after=model.hidden), dropped_after_hidden, 0.4),
    "DropoutScheduler": Case(
        lambda x, model: DropoutScheduler(x, attributes=model.attributes or None), all_dropout_runs_at, 0.4
    ),
    "ElasticNetPenalty": Case(
        lambda x, model: ElasticNetPenalty(x, 10 * x),
        lambda x: penalized(of_matrices(lambda w: x * w.abs().sum() + 5 * x * w.pow(2).sum())),
        0.01,
    ),
    "GradientCentralization": Case(
        lambda x, model: GradientCentralization(), lambda x: observed.gradients_are(observed.centered)
    ),
    "GradientNoise": Case(lambda x, model: GradientNoise(x), lambda x: observed.noisy(x, decay=0.55), 0.1),
    "GradientNormClipping": Case(
        lambda x, model: GradientNormClipping(x), lambda x: observed.norm_clipped(lambda model: x), 0.01
    ),
    "GradientValueClipping": Case(lambda x, model: GradientValueClipping(x), observed.value_clipped, 1e-3),
    "GroupLassoPenalty": Case(
        lambda x, model: GroupLassoPenalty(x),
        lambda x: penalized(of_matrices(lambda w: x * w.shape[1] ** 0.5 * w.norm(dim=1).sum())),
        0.01,
    ),
    "GroupSoftThresholding": Case(lambda x, model: GroupSoftThresholding(x), observed.units_soft_thresholded, 0.02),
    "L1Penalty": Case(lambda x, model: L1Penalty(x), lambda x: penalized(of_matrices(lambda w: x * w.abs().sum())), 0.01),
    "L2Penalty": Case(lambda x, model: L2Penalty(x), lambda x: penalized(of_matrices(lambda w: x / 2 * w.pow(2).sum())), 0.1),
    "MaxNorm": Case(lambda x, model: MaxNorm(x), lambda x: observed.row_norms(0.0, x), 0.05),
    "MinMaxNorm": Case(lambda x, model: MinMaxNorm(x, x + 0.1), lambda x: observed.row_norms(x, x + 0.1), 0.8),
    "MonteCarloDropout": Case(
        lambda x, model: MonteCarloDropout(samples=3), lambda x: observed.unchanged, changes_training=False
    ),
    "NonFiniteGradientGuard": Case(
        lambda x, model: NonFiniteGradientGuard(), lambda x: skipped_when_poisoned, options={"poisoned": 1}
    ),
    "NonNegative": Case(lambda x, model: NonNegative(), lambda x: observed.clamped(0.0, math.inf)),
    "OrthogonalityPenalty": Case(
        lambda x, model: OrthogonalityPenalty(x),
        lambda x: penalized(of_matrices(lambda w: x * observed.half_gram_distance(w))),
        0.01,
    ),
    "OverfittingMonitor": Case(
        lambda x, model: OverfittingMonitor(metric="val/loss"),
        lambda x: observed.unchanged,
        changes_training=False,
        validates=True,
    ),
    "ParameterMonitor": Case(
        lambda x, model: ParameterMonitor(every_n_steps=1), lambda x: observed.unchanged, changes_training=False
    ),
    "PeakGradientDropping": Case(
        lambda x, model: PeakGradientDropping(x), lambda x: observed.gradients_are(observed.peak_dropped), 1
    ),
    "QuantileGradientClipping": Case(
        lambda x, model: QuantileGradientClipping(x),
        lambda x: observed.norm_clipped(observed.quantile_so_far(x)),
        0.01,
        options=UNEVEN,
    ),
    "RandomShrinkage": Case(lambda x, model: RandomShrinkage(x), observed.shrunk, 0.1),
    "SoftThresholding": Case(lambda x, model: SoftThresholding(x), observed.soft_thresholded, 0.05),
    "StartingPointPenalty": Case(
        lambda x, model: StartingPointPenalty(x),
        lambda x: penalized(lambda leaves, model: x * observed.distance_from_start(leaves, model)),
        1.0,
    ),
    "UnitNorm": Case(lambda x, model: UnitNorm(), lambda x: observed.row_norms(1.0, 1.0)),
    "WeightClipping": Case(lambda x, model: WeightClipping(x), lambda x: observed.clamped(-x, x), 0.01),
    "WeightDecay": Case(lambda x, model: WeightDecay(x), observed.decayed, 0.5),
    "WeightDecayScheduler": Case(
        lambda x, model: WeightDecayScheduler(x), observed.optimizer_decays, 0.2, options={"weight_decay": 0.01}
    ),
    "WeightPruning": Case(lambda x, model: WeightPruning(x, scope=model.pruning), pruned, 0.4),
    "ZScoreGradientClipping": Case(
        lambda x, model: ZScoreGradientClipping(x, warmup=1),
        lambda x: observed.norm_clipped(observed.z_score_so_far(x, decay=0.97)),
        1.0,
        options=UNEVEN,
    ),
}


def together(model: Model) -> list[Regularizer]:
    """Return callbacks of all classes that can hold on one model at once, each on as much of it as that allows."""
    own = [DropoutScheduler(0.4, attributes=model.attributes or None)] if model.drops else []
    return [
        *own,
        ActivityPenalty(1e-4, modules=model.hidden),
        AdaptiveGradientClipping(0.1),
        DropoutInjection(0.1, after=model.hidden),
        ElasticNetPenalty(1e-5, 1e-4),
        GradientCentralization(),
        GradientNoise(1e-4),
        GradientNormClipping(1.0),
        GradientValueClipping(0.1),
        GroupLassoPenalty(1e-5),
        GroupSoftThresholding(1e-5),
        L1Penalty(1e-5),
        L2Penalty(1e-4),
        MaxNorm(1.0),
        MinMaxNorm(0.5, 1.0),
        MonteCarloDropout(samples=3),
        NonFiniteGradientGuard(),
        NonNegative(params=["all", "!weights"]),
        OrthogonalityPenalty(1e-5),
        ParameterMonitor(every_n_steps=1),
        PeakGradientDropping(),
        QuantileGradientClipping(0.5),
        RandomShrinkage(0.01),
        SoftThresholding(1e-5),
        StartingPointPenalty(1e-4),
        UnitNorm(params=["weights", "!embeddings"]),
        WeightClipping(1.0),
        WeightDecay(0.01),
        WeightPruning(0.4, scope=model.pruning),
        ZScoreGradientClipping(warmup=1),
    ]


def all_bounds_hold(model: Watched) -> None:
    """At the end of the second epoch, norms and sparsity are those of :func:`together`."""
    if model.steps + 1 < STEPS:
        return
    embeddings = model.model_entry.matching(model.model_entry.embeddings, model)
    for name in model.weight_names:
        low = 0.5 if name in embeddings else 1.0
        norms = model.rows(name, model.after[name]).double().norm(dim=1)
        norms = norms[norms > 0]
        assert bool(((norms > low - 2e-5) & (norms < 1 + 2e-5)).all()), name
    others = [model.after[name] for name in model.data_gradients if name not in model.weight_names]
    assert all(bool((p >= 0).all()) for p in others)
    pruned_names = [name for name in model.weight_names if name not in embeddings]
    zeros = torch.cat([model.after[name].flatten() == 0 for name in pruned_names])
    assert abs(float(zeros.float().mean()) - 0.4) < 0.01  # soft thresholding may add some, and rounding in each layer
    assert all(bool(p.isfinite().all()) for p in model.after.values())


FREE = Case(lambda x, model: NonFiniteGradientGuard(), lambda x: lambda model: None)
"""Nothing to check after a step."""

TOGETHER = Case(lambda x, model: together(model), lambda x: all_bounds_hold)
