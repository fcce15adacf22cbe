"""Every kind of technique with every kind of optimizer: a matrix, in which each cell has an expected value or error.

The reference is a plain loop without Lightning and without this package, which drives an optimizer of the same class. What
belongs to a step happens once in it, however often the optimizer evaluates its closure.
"""

from __future__ import annotations

import itertools
import re
import warnings
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import optimizers as zoo
import pytest
import torch
from helpers import fit, seed, weights
from lightning.pytorch import LightningModule
from table import ROWS
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_reg import (
    DropoutScheduler,
    GradientNoise,
    GradientNormClipping,
    GradientValueClipping,
    L2Penalty,
    Linear,
    MaxNorm,
    NonFiniteGradientGuard,
    RandomShrinkage,
    SoftThresholding,
    Steps,
    UnitNorm,
    WeightClipping,
    WeightDecay,
    WeightDecayScheduler,
    WeightPruning,
    ZScoreGradientClipping,
)
from lightning_reg._tensors.random import generator_for

if TYPE_CHECKING:
    from collections.abc import Callable

BATCHES, EPOCH, BAD = 6, 3, 1  # the number of batches, in an epoch, and the one that a guard finds bad
LR = 0.05


class Regression(LightningModule):
    """A linear map with dropout, in double precision. In one batch, a gradient may have a NaN though the loss is finite.

    Args:
        make: Returns an optimizer of the parameters.
        bad: The numbers of the bad batches.
    """

    def __init__(self, make: Callable[[Any], Any], bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.make, self.bad = make, bad
        generator = torch.Generator().manual_seed(1)
        self.drop = nn.Dropout(0.0)
        self.linear = nn.Linear(3, 2).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def loss(self, number: int) -> torch.Tensor:
        """Return the loss of a batch."""
        generator = torch.Generator().manual_seed(100 + number)
        x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (3, 2))
        loss = (self.linear(self.drop(x)) - y).square().mean()
        return loss + (self.linear.weight[0, 0] * 0).sqrt() if number in self.bad else loss

    @property
    def number(self) -> int:
        """The number of the current batch in the fit."""
        return self.trainer.fit_loop.total_batch_idx

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed(self.number)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(self.number)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class ByHand(Regression):
    """The same in manual optimization, for SAM in two steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(self.number))
        optimizer.first_step()
        self.manual_backward(self.loss(self.number))
        optimizer.second_step()


DATA = DataLoader(range(EPOCH), batch_size=None)


# The phases, each with its own arithmetic ----------------------------------------------------------------------------


@dataclass
class Phase:
    """A kind of technique: a callback, and its formula.

    Args:
        callback: Returns the callback.
        penalty: Returns what is added to the loss.
        before_step: Sets what is scheduled.
        gradients: Changes the gradients of one evaluation.
        weights: Changes the weights after a step.
        decay: Is the decoupled decay per unit of learning rate.
        bad: The numbers of the batches with NaN gradients.
        skipped: The numbers of the batches that are left out.
    """

    callback: Callable[[], Any]
    penalty: Callable[[Regression], Any] = lambda model: 0.0
    before_step: Callable[[Regression, Any, int], None] = lambda model, optimizer, step: None
    gradients: Callable[[Regression, int, int, dict[Any, Any]], None] = lambda model, step, evaluation, memory: None
    weights: Callable[[torch.Tensor, int, dict[Any, Any], Any], None] = lambda weight, *_: None
    decay: float = 0.0
    bad: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()


def half_of_squares(model: Regression) -> torch.Tensor:
    return 0.3 * model.linear.weight.square().sum() / 2


def norm_of_gradients(model: Regression) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm()


def clip_norm(model: Regression, step: int, evaluation: int, memory: dict[Any, Any]) -> None:
    scale_to(model, 0.5)


def scale_to(model: Regression, bound: float) -> None:
    norm = float(norm_of_gradients(model))
    if norm > bound:
        for p in model.parameters():
            p.grad *= bound / (norm + 1e-6)


def clip_values(model: Regression, step: int, evaluation: int, memory: dict[Any, Any]) -> None:
    for p in model.parameters():
        p.grad.clamp_(-0.1, 0.1)


def clip_by_z_score(model: Regression, step: int, evaluation: int, memory: dict[Any, Any]) -> None:
    """The rule of the z-score for a warmup of one step. The first evaluation of a step decides."""
    norm = float(norm_of_gradients(model))
    if evaluation == 0:
        if "mean" not in memory:
            memory.update(mean=norm, variance=0.0, bound=float("inf"))
        else:
            mean, deviation = memory["mean"], memory["variance"] ** 0.5
            score = (norm - mean) / (deviation + 1e-6)
            memory["bound"] = mean + 0.3 * deviation * 0.3 / score if score > 0.3 else float("inf")
            clipped = min(norm, memory["bound"])
            memory["mean"] = 0.5 * mean + 0.5 * clipped
            memory["variance"] = 0.5 * memory["variance"] + 0.5 * (clipped - memory["mean"]) ** 2
    scale_to(model, memory["bound"])


def add_noise(model: Regression, step: int, evaluation: int, memory: dict[Any, Any]) -> None:
    """Noise of the step: the same in all of its evaluations."""
    generator = generator_for("cpu", 3, "GradientNoise", step, 0)
    for p in model.parameters():
        p.grad += 0.1 / (1 + step) ** 0.275 * torch.randn(p.shape, generator=generator).double()


def zero_nan(model: Regression, step: int, evaluation: int, memory: dict[Any, Any]) -> None:
    for p in model.parameters():
        p.grad.nan_to_num_(nan=0.0)


def set_decay(model: Regression, optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 2.0 * step / BATCHES


def set_dropout(model: Regression, optimizer: Any, step: int) -> None:
    model.drop.p = 0.5 if step >= 2 else 0.0


def threshold(weight: torch.Tensor, step: int, memory: dict[Any, Any], optimizer: Any) -> None:
    weight.copy_(weight.sign() * (weight.abs() - LR * 0.4).clamp(min=0))


def shrink(weight: torch.Tensor, step: int, memory: dict[Any, Any], optimizer: Any) -> None:
    weight.mul_(1 - 0.2 * torch.rand(weight.shape, generator=generator_for("cpu", 5, "RandomShrinkage", step, 0)))


def clip_rows(weight: torch.Tensor, step: int, memory: dict[Any, Any], optimizer: Any) -> None:
    weight.mul_((0.5 / weight.norm(dim=1, keepdim=True)).clamp(max=1))


def mask_gradient(model: Regression, step: int, evaluation: int, memory: dict[Any, Any]) -> None:
    if "kept" in memory:
        model.linear.weight.grad.mul_(memory["kept"])


def prune(weight: torch.Tensor, step: int, memory: dict[Any, Any], optimizer: Any) -> None:
    """After the first epoch, the three smallest of six weights are zero. What LBFGS has learned belongs to other weights."""
    if step == EPOCH - 1:
        memory["kept"] = weight.abs() >= weight.abs().flatten().sort().values[3]
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()
    if "kept" in memory:
        weight.mul_(memory["kept"])


PHASES = {
    "penalty by loss": Phase(lambda: L2Penalty(0.3, inject="loss"), penalty=half_of_squares),
    "penalty by gradient": Phase(lambda: L2Penalty(0.3, inject="gradient"), penalty=half_of_squares),
    "norm clipping": Phase(lambda: GradientNormClipping(0.5), gradients=clip_norm),
    "value clipping": Phase(lambda: GradientValueClipping(0.1), gradients=clip_values),
    "statistical clipping": Phase(lambda: ZScoreGradientClipping(0.3, decay=0.5, warmup=1), gradients=clip_by_z_score),
    "noise": Phase(lambda: GradientNoise(0.1, seed=3), gradients=add_noise),
    "decay": Phase(lambda: WeightDecay(1.0), decay=1.0),
    "decay schedule": Phase(lambda: WeightDecayScheduler(Linear(0.0, 2.0)), before_step=set_decay),
    "soft threshold": Phase(lambda: SoftThresholding(0.4), weights=threshold),
    "random shrinkage": Phase(lambda: RandomShrinkage(0.2, seed=5), weights=shrink),
    "weight clipping": Phase(lambda: WeightClipping(0.3), weights=lambda weight, *_: weight.clamp_(-0.3, 0.3)),
    "maximum norm": Phase(lambda: MaxNorm(0.5), weights=clip_rows),
    "unit norm": Phase(lambda: UnitNorm(), weights=lambda weight, *_: weight.div_(weight.norm(dim=1, keepdim=True))),
    "pruning": Phase(lambda: WeightPruning(0.5), gradients=mask_gradient, weights=prune),
    "guard: skip": Phase(lambda: NonFiniteGradientGuard("skip"), bad=(BAD,), skipped=(BAD,)),
    "guard: zero": Phase(lambda: NonFiniteGradientGuard("zero"), bad=(BAD,), gradients=zero_nan),
    "guard: raise": Phase(lambda: NonFiniteGradientGuard("raise"), bad=(BAD,)),
    "dropout": Phase(lambda: DropoutScheduler(Steps([0.0, 0.5], at=[1 / 3])), before_step=set_dropout),
}


# The optimizers ------------------------------------------------------------------------------------------------------


def sgd(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.01, **options)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": sgd,
    "AdamW": lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.01),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=LR, max_iter=3),
    "LBFGS with line search": lambda params: torch.optim.LBFGS(params, lr=LR, max_iter=3, line_search_fn="strong_wolfe"),
    "SAM by copy": lambda params: zoo.CopyingSam(params, lr=LR),
    "SAM by subtraction": lambda params: zoo.SubtractingSam(params, lr=LR),
    "SAM in two steps": lambda params: zoo.TwoStepSam(params, lr=LR, weight_decay=0.01),
    "Polyak": lambda params: zoo.Polyak(params, lr=LR),
    "timm's Lookahead": lambda params: zoo.TimmLookahead(sgd(params)),
    "torch_optimizer's Lookahead": lambda params: zoo.ClassicLookahead(sgd(params)),
    "schedule-free": lambda params: zoo.ScheduleFree(params, lr=LR),
    "fused into backward": lambda params: zoo.FusedIntoBackward(params, lr=LR),
    "plain wrapper": lambda params: zoo.PlainWrapper(sgd(params)),
}


def reference(phase: Phase, name: str) -> dict[str, torch.Tensor]:
    """Return the weights after training in a plain loop."""
    model = Regression(OPTIMIZERS[name], phase.bad)
    optimizer = model.configure_optimizers()
    memory: dict[Any, Any] = {}
    for step in range(BATCHES):
        if step not in phase.skipped:
            seed(step)
            phase.before_step(model, optimizer, step)
            take_step(phase, name, model, optimizer, step, memory)
    return weights(model)


DECAYS_BEFORE = ("SGD", "AdamW")  # as AdamW does: between the backward pass and the update


def take_step(phase: Phase, name: str, model: Regression, optimizer: Any, step: int, memory: dict[Any, Any]) -> None:
    weight, evaluations = model.linear.weight, itertools.count()
    before = weight.detach().clone()

    def closure() -> torch.Tensor:
        objective = model.loss(step) + phase.penalty(model)
        optimizer.zero_grad()
        objective.backward()
        if weight.grad is not None and name != "SAM in two steps":  # in which nobody sees the gradients
            phase.gradients(model, step, next(evaluations), memory)
        if name in DECAYS_BEFORE:
            weight.data.mul_(1 - LR * phase.decay)
        return objective.detach()

    if name == "SAM in two steps":
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()
    else:
        optimizer.step(closure)
    with torch.no_grad():
        if name not in DECAYS_BEFORE:
            weight.sub_(before, alpha=LR * phase.decay)
        phase.weights(weight, step, memory, optimizer)


ALONE = {field.name: field.default for field in fields(Phase) if field.name not in ("callback", "bad")}

# The table of expectations, written before the code ------------------------------------------------------------------

ACTS = "acts"  # the result is that of the reference
NONE = "none"  # the result is that of the optimizer alone, and a warning names the callback
NO_DECAY = "no parameter group has a nonzero weight_decay to schedule"
RAISES = "infinite or NaN gradients at step 1 in linear.weight"
MANUAL = "inject='loss' is not exact in manual optimization"

UNSEEN = "did not act in"
OTHER_WEIGHTS = "evaluates different weights from those that it trains"

COMMON = dict.fromkeys(PHASES, ACTS) | {"guard: raise": RAISES}
BARE = COMMON | {"decay schedule": NO_DECAY}  # the optimizer has no decay of its own
GRADIENTS_UNSEEN = dict.fromkeys(
    (
        "penalty by gradient",
        "norm clipping",
        "value clipping",
        "statistical clipping",
        "noise",
        "decay",
        "guard: skip",
        "guard: zero",
        "guard: raise",
    ),
    NONE,
)

EXPECTED = {
    "SGD": COMMON,
    "AdamW": COMMON,
    "LBFGS": BARE,
    "LBFGS with line search": BARE,
    "SAM by copy": BARE,
    "SAM by subtraction": BARE,
    "SAM in two steps": COMMON | GRADIENTS_UNSEEN | {"penalty by loss": MANUAL},
    "Polyak": BARE,
    "timm's Lookahead": COMMON,
    "torch_optimizer's Lookahead": COMMON,
    "schedule-free": BARE,
    "fused into backward": BARE | GRADIENTS_UNSEEN,
    "plain wrapper": COMMON,
}

WARNINGS = {
    ("schedule-free", name): OTHER_WEIGHTS
    for name in ("decay", "soft threshold", "random shrinkage", "weight clipping", "maximum norm", "unit norm", "pruning")
}

PHASES_OF = {
    "ActivityPenalty": ["penalty by loss"],
    "AdaptiveGradientClipping": ["value clipping"],
    "DropoutInjection": ["dropout"],
    "DropoutScheduler": ["dropout"],
    "ElasticNetPenalty": ["penalty by loss", "penalty by gradient"],
    "GradientCentralization": ["value clipping"],
    "GradientNoise": ["noise"],
    "GradientNormClipping": ["norm clipping"],
    "GradientValueClipping": ["value clipping"],
    "GroupLassoPenalty": ["penalty by loss", "penalty by gradient"],
    "GroupSoftThresholding": ["soft threshold"],
    "L1Penalty": ["penalty by loss", "penalty by gradient"],
    "L2Penalty": ["penalty by loss", "penalty by gradient"],
    "MaxNorm": ["maximum norm"],
    "MinMaxNorm": ["maximum norm", "unit norm"],
    "NonFiniteGradientGuard": ["guard: skip", "guard: zero", "guard: raise"],
    "NonNegative": ["weight clipping"],
    "OrthogonalityPenalty": ["penalty by loss", "penalty by gradient"],
    "PeakGradientDropping": ["value clipping"],
    "QuantileGradientClipping": ["statistical clipping"],
    "RandomShrinkage": ["random shrinkage"],
    "SoftThresholding": ["soft threshold"],
    "StartingPointPenalty": ["penalty by loss", "penalty by gradient"],
    "UnitNorm": ["unit norm"],
    "WeightClipping": ["weight clipping"],
    "WeightDecay": ["decay"],
    "WeightDecayScheduler": ["decay schedule"],
    "WeightPruning": ["pruning"],
    "ZScoreGradientClipping": ["statistical clipping"],
}


def test_matrix_has_no_empty_cell():
    assert list(EXPECTED) == list(OPTIMIZERS)
    for name, cells in EXPECTED.items():
        assert list(cells) == list(PHASES), name
        assert all(cells.values()), name
    watching = {"OverfittingMonitor", "ParameterMonitor"}
    assert set(PHASES_OF) == set(ROWS) - watching - {"MonteCarloDropout"}  # which acts in predict
    assert {phase for phases in PHASES_OF.values() for phase in phases} == set(PHASES)


def trained(phase: Phase, name: str) -> dict[str, torch.Tensor]:
    """Return the weights after a fit with the phase's callback."""
    kind = ByHand if name == "SAM in two steps" else Regression
    return weights(fit([phase.callback()], kind(OPTIMIZERS[name], phase.bad), DATA, max_epochs=2))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_technique_with_optimizer(name, phase):
    expected, alone = EXPECTED[name][phase], replace(PHASES[phase], **ALONE)
    if expected not in (ACTS, NONE):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(expected)):
            trained(PHASES[phase], name)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(PHASES[phase], name)
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    texts = [text for text in texts if not re.search("NaN gradients at step|the optimizer also decays", text)]  # as always
    assert len(texts) == ((name, phase) in WARNINGS or expected == NONE), texts
    if expected == NONE:
        assert f"{type(PHASES[phase].callback()).__name__} {UNSEEN}" in texts[0]
    elif texts:
        assert WARNINGS[name, phase] in texts[0]
    truth = reference(PHASES[phase] if expected == ACTS else alone, name)
    assert_close(found, truth, rtol=1e-9, atol=1e-11, equal_nan=True)
    if expected == ACTS:
        with pytest.raises(AssertionError):  # the numbers are such that it matters
            assert_close(found, reference(alone, name), rtol=1e-5, atol=1e-7, equal_nan=True)
