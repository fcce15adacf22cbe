"""Steps: closures that are evaluated several times, optimizers that change, steps that nobody sees, and skipped steps."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import optimizers as zoo
import pytest
import torch
from helpers import QUIET, Classifier, Gan, Unfreezes, distance, fit, loader, same, seed, weights
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from optimizers import CopyingSam, Polyak
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD, AdamW, optimizer as optimizer_module
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_reg import (
    ActivityPenalty,
    DropoutScheduler,
    ElasticNetPenalty,
    GradientNoise,
    GradientNormClipping,
    GroupLassoPenalty,
    GroupSoftThresholding,
    L1Penalty,
    L2Penalty,
    Linear,
    MinMaxNorm,
    NonFiniteGradientGuard,
    OrthogonalityPenalty,
    RandomShrinkage,
    SoftThresholding,
    StartingPointPenalty,
    UnitNorm,
    WeightClipping,
    WeightDecay,
    WeightDecayScheduler,
    WeightPruning,
    ZScoreGradientClipping,
    sparsity,
)

ONE = DataLoader([0], batch_size=None)
NO_GRADIENT = staticmethod(lambda w: 0 * w)


class Scalar(LightningModule):
    """One weight and a function of it.

    Args:
        make: Returns an optimizer.
        value: The weight at the start.
        function: The loss.
    """

    def __init__(self, make: Any, value: float, function: Any) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.net.weight, value)
        self.make, self.function = make, function

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.function(self.net.weight).sum()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def with_optimizer(make: Any, kind: type[Classifier] = Classifier, **methods: Any) -> Classifier:
    """Return a model with an optimizer, and with other methods."""
    return type("Changed", (kind,), {"configure_optimizers": lambda self: make(self.parameters()), **methods})()


def sam(params: Any, lr: float = 0.05) -> torch.optim.Optimizer:
    return CopyingSam(params, lr=lr)


def no_gradient(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
    """A training step whose gradients are zero."""
    return 0 * Classifier.training_step(self, batch, batch_idx)


def momentum(params: Any) -> torch.optim.Optimizer:
    return SGD(params, lr=0.05, momentum=0.9)


def scaled() -> list[Any]:
    """Return the plugins of a fit with a loss scaler."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))]


# One step, however often the closure is evaluated --------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda p: LBFGS(p, lr=0.1, max_iter=5), lambda p: sam(p, 0.1)], ids=["LBFGS", "SAM"])
def test_weights_without_gradient_decay_once(make):
    model = fit([WeightDecay(1.0)], Scalar(make, 1.0, lambda w: 0 * w), ONE, max_epochs=1)
    assert model.net.weight.item() == pytest.approx(0.9)
    assert abs(0.9**5 - 0.9) > 0.1


@pytest.mark.parametrize("kind", [zoo.CopyingSam, zoo.SubtractingSam])
def test_decay_with_sam_is_that_of_the_weights_before(kind):
    """By hand: θ ← SAM(θ) − η·w·θ in every step."""
    ours = fit([WeightDecay(1.0)], with_optimizer(lambda p: kind(p, lr=0.05)))
    plain = with_optimizer(
        lambda p: kind(p, lr=0.05),
        on_train_batch_end=lambda self, *args: None,
        optimizer_step=decaying_by_hand,
    )
    assert_close(weights(ours), weights(fit(model=plain)), rtol=1e-5, atol=1e-7)
    assert distance(ours, fit(model=with_optimizer(lambda p: kind(p, lr=0.05)))) > 0.1


def decaying_by_hand(self, epoch, batch_idx, optimizer, closure):
    before = {name: p.detach().clone() for name, p in self.named_parameters()}
    optimizer.step(closure=closure)
    with torch.no_grad():
        for i in (0, 4):
            self.net[i].weight.sub_(0.05 * before[f"net.{i}.weight"])


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_polyak_sees_penalized_objective(route):
    """F = (w − 1)² and w² at w = 3: 4 + 9 = 13, and the gradient is 4 + 6 = 10. A full step is 10 · 13/100."""
    seen = []

    class Recorded(Polyak):
        def step(self, closure):
            loss = super().step(closure)
            seen.append((float(loss), self.param_groups[0]["params"][0].grad.item()))
            return loss

    model = Scalar(lambda p: Recorded(p, lr=0.05), 3.0, lambda w: (w - 1) ** 2)
    fit([L2Penalty(2.0, inject=route)], model, ONE, max_epochs=1)
    assert seen == [(13.0, 10.0)]
    assert 3 - model.net.weight.item() == pytest.approx(0.065, rel=1e-5)


def test_value_of_several_penalties_of_activations_and_weights():
    seen = []

    class Recorded(Polyak):
        def step(self, closure):
            seen.append(float(super().step(closure)))

    model = Scalar(lambda p: Recorded(p), 3.0, None)
    type(model).forward = lambda self, x: self.net(x)
    model.training_step = lambda batch, batch_idx: model.net(torch.ones(2, 1)).mean()
    fit(
        [L1Penalty(0.5), L2Penalty(2.0, inject="gradient"), ActivityPenalty(0.1, modules="Linear", p=2)],
        model,
        ONE,
        max_epochs=1,
    )
    assert seen == pytest.approx([3 + 0.5 * 3 + 9 + 0.1 * 4.5])


def test_closure_in_manual_optimization_equals_automatic():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                loss = Classifier.training_step(self, batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    def callbacks():
        gradient = [L2Penalty(0.1, inject="gradient"), GradientNormClipping(0.5), GradientNoise(0.01)]
        return [*gradient, WeightDecay(0.1), RandomShrinkage(0.1), WeightClipping(0.2)]

    for make in (sam, lambda p: Polyak(p, maximum=0.05)):
        manual = fit(callbacks(), with_optimizer(make, Manual))
        assert same(manual, fit(callbacks(), with_optimizer(make)))
        assert not same(manual, fit(model=with_optimizer(make)))


def test_accumulation_with_sam_decays_once_per_step():
    model = with_optimizer(sam, training_step=no_gradient)
    fit([WeightDecay(2.0)], model, accumulate_grad_batches=2, max_epochs=1)
    assert_close(model.net[4].weight, Classifier().net[4].weight * 0.9**2)


# Optimizers that change ----------------------------------------------------------------------------------------------

PLACES = ["on_train_epoch_start", "on_train_batch_start", "training_step", "on_train_batch_end"]


def swaps(place: str, how: str, make: Any) -> Classifier:
    """Return a model that replaces its optimizer once in the second of two epochs of two batches."""

    class Swaps(Classifier):
        largest: list[float]

        def swap(self, here: str) -> None:
            if here == place and self.trainer.current_epoch == 1 and not self.swapped:
                self.swapped = True
                owner = self.trainer.strategy if how == "strategy" else self.trainer
                owner.optimizers = [make(self.parameters())]

        def on_train_start(self):
            self.swapped, self.largest = False, []

        def on_train_epoch_start(self):
            self.swap("on_train_epoch_start")

        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.swap("on_train_batch_start")

        def training_step(self, batch, batch_idx):
            self.swap("training_step")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            self.largest.append(self.net[0].weight.abs().max().item())
            self.swap("on_train_batch_end")

    return Swaps()


@pytest.mark.parametrize("how", ["strategy", "trainer"])
@pytest.mark.parametrize("place", PLACES)
def test_replaced_optimizer_is_followed(place, how):
    callbacks = [WeightClipping(0.05), DropoutScheduler(0.2), L2Penalty(0.1), WeightDecay(0.1)]
    model = fit([*callbacks, GradientNormClipping(0.1)], swaps(place, how, lambda p: SGD(p, lr=0.5)), loader(32))
    assert model.swapped
    assert model.largest == [pytest.approx(0.05)] * 4


def test_replaced_optimizer_is_followed_in_last_epoch_of_one_batch():
    model = fit([WeightClipping(0.05)], swaps("on_train_epoch_start", "strategy", lambda p: SGD(p, lr=0.5)), loader(16))
    assert model.largest == [pytest.approx(0.05)] * 2


@pytest.mark.parametrize("make", [sam, lambda p: zoo.PlainWrapper(SGD(p, lr=0.1))], ids=["SAM", "wrapper"])
def test_replacement_of_another_class_keeps_statistics(make):
    callback = ZScoreGradientClipping(0.1, warmup=1)
    model = swaps("on_train_epoch_start", "strategy", make)
    fit([callback, WeightDecay(0.5), NonFiniteGradientGuard(), WeightClipping(0.05)], model, loader(32))
    assert model.largest == [pytest.approx(0.05)] * 4
    ((count, _, _),) = callback.state["memory"].values()
    assert int(count) == 4


def test_added_group_with_new_module_is_regularized():
    class Grows(Classifier):
        def on_train_epoch_start(self):
            if self.trainer.current_epoch == 1:
                self.extra = nn.Linear(10, 10)
                nn.init.constant_(self.extra.weight, 0.5)
                with torch.no_grad():
                    self.extra.weight[0, :5] = 0.001
                self.optimizers().add_param_group({"params": list(self.extra.parameters()), "lr": 0.05})

        def training_step(self, batch, batch_idx):
            images, labels = batch
            out = self.net(images)
            return cross_entropy(self.extra(out) if hasattr(self, "extra") else out, labels)

    grown = fit([WeightClipping(0.05), WeightPruning(0.5)], Grows())
    assert grown.extra.weight.abs().max() == torch.tensor(0.05)
    assert (grown.extra.weight == 0).any()
    zeros, total = sparsity(grown).total
    assert zeros == total / 2
    for route in ("loss", "gradient"):
        model = with_optimizer(lambda p: SGD(p, lr=0.05), Grows, training_step=Classifier.training_step)
        model.loss_weight = 0.0
        fit([L2Penalty(1.0, inject=route)], model)
        assert_close(model.extra.weight[1], torch.full((10,), 0.5 * 0.95**4))


def test_group_replaced_by_one_of_equal_size_is_followed():
    class Replaces(Classifier):
        def on_train_epoch_start(self):
            if self.trainer.current_epoch == 1:
                held = self.optimizers().param_groups[0]["params"]
                for layer in (self.net[0], self.net[4]):
                    index = next(i for i, p in enumerate(held) if p is layer.weight)
                    layer.weight = held[index] = nn.Parameter(torch.ones_like(layer.weight))

    model = fit([WeightClipping(0.05)], Replaces())
    assert [model.net[i].weight.abs().max().item() for i in (0, 4)] == pytest.approx([0.05, 0.05])


class Decaying(Classifier):
    """Records the weight decay of each group in each step."""

    def on_train_start(self):
        self.seen = []

    def on_train_batch_end(self, *args):
        self.seen.append([group["weight_decay"] for group in self.optimizers().param_groups])

    def configure_optimizers(self):
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_decay_of_added_group_is_scheduled_also_after_resume(tmp_path):
    schedule = Linear(0.0, 1.2)
    expected = [[0.1 * step] * (1 if step < 4 else 2) for step in range(12)]
    assert_close(fit([WeightDecayScheduler(schedule), Unfreezes()], Decaying(), max_epochs=3).seen, expected)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1)
    options = {"max_epochs": 3, "enable_checkpointing": True}
    fit([WeightDecayScheduler(schedule), Unfreezes(), checkpoint], Decaying(), **options)
    model = Decaying()
    path = next(path for path in tmp_path.iterdir() if "epoch=1" in path.name)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        **options, max_epochs=3, enable_checkpointing=False, callbacks=[WeightDecayScheduler(schedule), Unfreezes()]
    )
    trainer.fit(model, loader(), ckpt_path=path, weights_only=False)
    assert_close(model.seen, expected[8:])


# Steps that are not seen, or not taken -------------------------------------------------------------------------------


class SamByHand(Classifier):
    """SAM in two steps in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))
            step()

    def configure_optimizers(self):
        return zoo.TwoStepSam(self.parameters(), lr=0.05)


class Fused(Classifier):
    def configure_optimizers(self):
        return zoo.FusedIntoBackward(self.parameters(), lr=0.05)


SIX = [
    lambda: GradientNormClipping(0.1),
    lambda: L2Penalty(0.1, inject="gradient"),
    lambda: WeightDecay(0.1),
    lambda: GradientNoise(0.1),
    lambda: NonFiniteGradientGuard(),
    lambda: ZScoreGradientClipping(),
]


@pytest.mark.parametrize("kind", [SamByHand, Fused])
def test_steps_without_gradients_warn_and_name_what_did_not_act(kind):
    """Constraints act."""
    clipping = "GradientNormClipping, ZScoreGradientClipping"
    names = f"NonFiniteGradientGuard, L2Penalty, GradientNoise, {clipping}, WeightDecay"
    with pytest.warns(UserWarning, match=f"^{names} did not act in "):
        model = fit([make() for make in SIX] + [WeightClipping(0.05)], kind())
    assert model.net[0].weight.abs().max() == torch.tensor(0.05)


class NeverSteps(Classifier):
    """Steps with code of its own that no hook sees."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        with torch.no_grad():
            for p in self.parameters():
                p -= 0.05 * p.grad


def test_epoch_without_steps_warns():
    with pytest.warns(UserWarning, match=r"^WeightClipping did not act in 4 batches, because Lightning took no step"):
        fit([WeightClipping(0.05)], NeverSteps(), max_epochs=1)


def test_hundred_batches_without_steps_warn():
    class Counts(NeverSteps):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.batches = batch_idx + 1

    model = Counts()
    with pytest.warns(UserWarning, match="WeightClipping did not act in 100 batches"):
        fit([WeightClipping(0.05)], model, loader(64 * 3, 1), max_epochs=1)


def test_known_step_among_unknown_ones_does_not_warn():
    fit([WeightClipping(0.05)], Gan(stepping=(0,)), max_epochs=1)
    fit([DropoutScheduler(0.2), L2Penalty(0.1)], Fused(), max_epochs=1)


def test_steps_of_learning_rate_finder_within_a_fit_are_left_alone(tmp_path):
    """They are taken without callbacks, so nothing is added to the values of its closures."""
    seen = []

    class Watched(L2Penalty):
        def objective(self, optimizer):
            seen.append(finder.is_running)
            return super().objective(optimizer)

    class Finder(LearningRateFinder):
        is_running, batches = False, 0

        def on_fit_start(self, trainer, pl_module):
            """Does nothing: it runs later."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.is_running = True
                self.lr_find(trainer, pl_module)
                self.is_running = False

    class Counts(Classifier):
        def training_step(self, batch, batch_idx):
            finder.batches += finder.is_running
            return super().training_step(batch, batch_idx)

    finder = Finder(num_training_steps=20)
    model = with_optimizer(sam, Counts)
    fit([Watched(0.1), WeightClipping(0.05), finder], model, default_root_dir=tmp_path, max_epochs=5)
    assert finder.batches
    assert seen
    assert not any(seen)


# Loss scalers --------------------------------------------------------------------------------------------------------


class OwnArithmetic(zoo.PlainWrapper):
    """SGD without step hooks, neither its own nor those of an inner optimizer."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)
        return loss


SCALED = {
    "SGD": momentum,
    "timm's Lookahead": lambda p: zoo.TimmLookahead(momentum(p)),
    "torch_optimizer's Lookahead": lambda p: zoo.ClassicLookahead(momentum(p)),
    "wrapper": lambda p: zoo.PlainWrapper(momentum(p)),
    "own arithmetic": lambda p: OwnArithmetic(momentum(p)),
}


@pytest.mark.parametrize("name", SCALED)
def test_loss_scale_does_not_matter(name):
    def callbacks():
        return [GradientNormClipping(0.5), WeightDecay(0.5), L2Penalty(0.1), NonFiniteGradientGuard(), WeightClipping(0.2)]

    with_scaler = fit(callbacks(), with_optimizer(SCALED[name]), plugins=scaled())
    assert distance(with_scaler, fit(callbacks(), with_optimizer(SCALED[name]))) < 2e-3
    assert distance(with_scaler, fit(callbacks()[:1], with_optimizer(SCALED[name]))) > 0.1


def overflows(self, batch, batch_idx):
    return Classifier.training_step(self, batch, batch_idx) * math.inf


@pytest.mark.parametrize("name", [*SCALED, "fused"])
def test_step_that_scaler_skips_is_no_step(name):
    make = SCALED.get(name, lambda p: AdamW(p, lr=0.01, fused=True))
    callbacks = [SoftThresholding(0.5), RandomShrinkage(0.1), *([WeightDecay(0.5)] if name != "fused" else [])]
    assert same(fit(callbacks, with_optimizer(make, training_step=overflows), plugins=scaled(), max_epochs=1), Classifier())


# The guard -----------------------------------------------------------------------------------------------------------

SKIPPING = {
    **{name: make for name, make in SCALED.items() if name != "own arithmetic"},
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.0),
    "LBFGS": lambda p: LBFGS(p, lr=0.1, max_iter=3),
    "SAM by copy": sam,
    "SAM by subtraction": lambda p: zoo.SubtractingSam(p, lr=0.05),
}


class Skipping(Classifier):
    """The third batch gives NaN. Records everything that a step may change."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 2 else 1.0)

    def everything(self):
        outer = self.trainer.optimizers[0]
        inner = next((vars(outer)[name] for name in ("_base_optimizer", "optimizer", "inner") if name in vars(outer)), outer)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in outer.param_groups]
        states = [list(optimizer.state.values()) for optimizer in (outer, inner)]
        return copy.deepcopy([list(self.state_dict().values()), states, groups])

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.before = self.everything()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert equal(self.before, self.everything()) is (batch_idx == 2), batch_idx


def equal(first: Any, second: Any) -> bool:
    """Return whether nested values are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return first == second


@pytest.mark.filterwarnings("ignore:.*infinite or NaN gradients at step 2")
@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_step_leaves_no_trace(name):
    callbacks = [NonFiniteGradientGuard(), WeightDecay(0.1), RandomShrinkage(0.1), WeightClipping(0.2), L2Penalty(0.1)]
    fit([*callbacks, ZScoreGradientClipping(1.0, warmup=1)], with_optimizer(SKIPPING[name], Skipping), max_epochs=1)


class BadSecond(Classifier):
    """NaN at the second evaluation of the second step."""

    evaluations = 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 1
        return super().training_step(batch, batch_idx) * (math.nan if self.evaluations == 4 else 1.0)


@pytest.mark.filterwarnings("ignore:.*infinite or NaN gradients at step 1")
def test_skip_at_second_evaluation_raises():
    message = "cannot skip this step of CopyingSam at evaluation 2 of its closure, because the weights have moved"
    with pytest.raises(RuntimeError, match=message):
        fit([NonFiniteGradientGuard()], with_optimizer(sam, BadSecond))
    assert_finite(fit([NonFiniteGradientGuard("zero")], with_optimizer(sam, BadSecond)))


def assert_finite(model: nn.Module) -> None:
    assert all(p.isfinite().all() for p in model.parameters())


class MovesFirst(SGD):
    """Moves the weights before it evaluates its closure, as some schedule-free optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mul_(1.001)
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


@pytest.mark.filterwarnings("ignore:.*infinite or NaN gradients at step 2")
def test_skip_after_weights_have_moved_raises():
    message = "cannot skip this step of MovesFirst at evaluation 1 of its closure, because the weights have moved"
    with pytest.raises(RuntimeError, match=message):
        fit([NonFiniteGradientGuard()], with_optimizer(lambda p: MovesFirst(p, lr=0.05), Skipping))


# Averages and other weights ------------------------------------------------------------------------------------------


class Validated(Classifier):
    """Records the norms of the rows of its first layer in each validation."""

    def on_validation_start(self):
        self.norms = [] if self.trainer.sanity_checking else [*self.norms, self.net[0].weight.norm(dim=1)]

    def validation_step(self, batch, batch_idx):
        pass


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.7),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("make", [UnitNorm, lambda: MinMaxNorm(1.0, 1.0)], ids=["UnitNorm", "MinMaxNorm"])
@pytest.mark.parametrize("order", [1, -1])
def test_averages_have_unit_norms(name, make, order, tmp_path):
    """In the model that is validated, saved and returned."""
    model = Validated()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    callbacks = [make(), AVERAGES[name]()][::order]
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 4}
    Trainer(**options, callbacks=[*callbacks, checkpoint]).fit(model, loader(), loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    for norms in (*model.norms, model.net[0].weight.norm(dim=1), saved["net.0.weight"].norm(dim=1)):
        assert_close(norms, torch.ones(16), rtol=1e-5, atol=0.0)
    assert len(model.norms) == 4


def test_average_without_projection_is_no_unit_vector():
    """The negative control: averages of unit vectors are shorter."""

    class Forgets(UnitNorm):
        def reproject_copy(self, copy):
            pass

    assert fit([Forgets(), EMAWeightAveraging(decay=0.7)]).net[0].weight.norm(dim=1).min() < 0.995


def test_schedule_free_optimizer_warns_by_name():
    model = with_optimizer(lambda p: zoo.ScheduleFree(p, lr=0.5))
    with pytest.warns(UserWarning, match=r"^ScheduleFree evaluates different weights .* UnitNorm, WeightClipping changes"):
        fit([WeightClipping(0.2), UnitNorm(), L2Penalty(0.1), GradientNormClipping(1.0)], model, max_epochs=1)


# Maximizing, and learning rates that are not known -------------------------------------------------------------------

PENALTIES = {
    "L1": lambda route: L1Penalty(0.5, inject=route),
    "L2": lambda route: L2Penalty(0.5, inject=route),
    "elastic net": lambda route: ElasticNetPenalty(0.5, 0.5, inject=route),
    "group lasso": lambda route: GroupLassoPenalty(0.5, inject=route),
    "orthogonality": lambda route: OrthogonalityPenalty(0.05, inject=route),
}


@pytest.mark.parametrize("route", ["loss", "gradient"])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_shrink_weights_of_optimizers_that_maximize(name, route):
    def after(maximize):
        model = Scalar(lambda p: SGD(p, lr=0.1, maximize=maximize), 3.0, lambda w: 0 * w)
        return fit([PENALTIES[name](route)], model, ONE, max_epochs=1).net.weight.item()

    assert after(True) == after(False) < 3.0


def test_penalty_of_activations_and_of_starting_point_with_maximize():
    class Output(Scalar):
        def training_step(self, batch, batch_idx):
            return 0 * self.net(torch.ones(1, 1)).sum()

    model = Output(lambda p: SGD(p, lr=0.1, maximize=True), 3.0, None)
    assert fit([ActivityPenalty(0.5, modules="Linear")], model, ONE, max_epochs=1).net.weight.item() == pytest.approx(2.95)
    away = Scalar(lambda p: SGD(p, lr=0.1, maximize=True), 3.0, lambda w: w)
    assert fit([StartingPointPenalty(1.0)], away, ONE, max_epochs=200).net.weight.item() == pytest.approx(4.0, rel=1e-4)


class Mixed(Classifier):
    """One group is maximized. Without gradients of the loss, only the penalty moves the weights."""

    training_step = no_gradient

    def configure_optimizers(self):
        return SGD([{"params": self.net[0].parameters(), "maximize": True}, {"params": self.net[4].parameters()}], lr=0.1)


def test_penalty_with_groups_of_which_one_maximizes():
    model = fit([L2Penalty(1.0)], Mixed(), max_steps=1)
    for i in (0, 4):
        assert_close(model.net[i].weight, Classifier().net[i].weight * 0.9)
    with pytest.raises(ValueError, match="inject='loss' is not exact with an optimizer that maximizes only some"):
        fit([L2Penalty(1.0, inject="loss")], Mixed())
    with pytest.raises(ValueError, match="ActivityPenalty-Linear adds one term to the loss, but the optimizer maximizes only"):
        fit([ActivityPenalty(1.0, modules="Linear")], Mixed())


def test_objective_with_groups_of_which_one_maximizes_is_finite():
    class Reads(SGD):
        def step(self, closure=None):
            self.value = float(super().step(closure))

    class MixedReads(Mixed):
        def configure_optimizers(self):
            self.optimizer = Reads(super().configure_optimizers().param_groups, lr=0.1)
            return self.optimizer

    model = MixedReads()
    first, last = (model.net[i].weight.square().sum().item() / 2 for i in (0, 4))
    fit([L2Penalty(1.0)], model, max_steps=1)
    assert model.optimizer.value == pytest.approx(last - first, rel=1e-5)


RATES = {
    "RelativeStep has no learning rate (lr)": zoo.RelativeStep,
    "Prodigy multiplies the learning rate by its own factor d": zoo.Prodigy,
}


@pytest.mark.parametrize("message", RATES)
def test_unknown_learning_rate_raises(message):
    for callback, other in (
        (WeightDecay(0.1), "use the optimizer's own weight_decay, which WeightDecayScheduler can schedule"),
        (SoftThresholding(0.1), "use L1Penalty, or GroupLassoPenalty for whole units"),
        (GroupSoftThresholding(0.1), "use L1Penalty, or GroupLassoPenalty for whole units"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"proportion to the learning rate, but {message}: {other}")):
            fit([callback], with_optimizer(RATES[message]))
    fit([L2Penalty(0.1), WeightClipping(0.2)], with_optimizer(RATES[message]), max_epochs=1)


def test_decay_with_adafactor_of_torch():
    """Its d is no factor of the learning rate."""

    def make(decay):
        return with_optimizer(lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=decay), training_step=no_gradient)

    ours = fit([WeightDecay(0.5, params="all")], make(0.0))
    assert_close(weights(ours), weights(fit(model=make(0.5))), rtol=1e-5, atol=1e-6)
    assert_close(ours.net[4].weight, Classifier().net[4].weight * 0.995**8)


# What else people do -------------------------------------------------------------------------------------------------


def test_module_that_accumulates_by_hand_is_penalized_once_per_step():
    """With ``"auto"``, since the loss of every batch would contain the penalty."""

    class ByHand(Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if batch_idx % 2:
                optimizer.step(closure=closure)
            else:
                closure()

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            if batch_idx % 2 == 0:
                optimizer.zero_grad()

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) / 2

    by_hand = fit([L2Penalty(1.0)], ByHand())
    assert_close(weights(by_hand), weights(fit([L2Penalty(1.0)], accumulate_grad_batches=2)), rtol=1e-5, atol=1e-6)


def test_closure_called_by_hand_in_optimizer_step():
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()
        optimizer.step()

    def callbacks():
        return [GradientNormClipping(0.1), L2Penalty(0.1, inject="gradient"), WeightDecay(0.1), WeightClipping(0.2)]

    assert same(fit(callbacks(), with_optimizer(momentum, optimizer_step=optimizer_step)), fit(callbacks()))


def test_warmup_in_optimizer_step():
    """θ ← θ (1 − η·w) with the learning rate that the module sets right before the step."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (batch_idx + 1)
        optimizer.step(closure=closure)

    methods = {"optimizer_step": optimizer_step, "training_step": no_gradient}
    for make in (lambda p: SGD(p, lr=1.0), lambda p: CopyingSam(p, lr=1.0)):
        model = fit([WeightDecay(0.5)], with_optimizer(make, **methods), loader(32), max_epochs=1)
        assert_close(model.net[4].weight, Classifier().net[4].weight * 0.95 * 0.9)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}], ids=str)
def test_decay_equals_adamw_for_other_implementations(options):
    ours = fit([WeightDecay(0.1, params="all")], with_optimizer(lambda p: AdamW(p, lr=0.01, weight_decay=0.0, **options)))
    assert same(ours, fit(model=with_optimizer(lambda p: AdamW(p, lr=0.01, weight_decay=0.1, **options))))


def test_subclass_of_adamw_with_its_own_step_decays_after_it():
    class Mine(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    ours = fit([WeightDecay(0.1, params="all")], with_optimizer(lambda p: Mine(p, lr=0.01, weight_decay=0.0)))
    theirs = fit(model=with_optimizer(lambda p: AdamW(p, lr=0.01, weight_decay=0.1)))
    assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)
    assert distance(ours, fit(model=with_optimizer(lambda p: AdamW(p, lr=0.01, weight_decay=0.0)))) > 1e-3


def test_wrappers_beside_other_optimizers():
    class Wrapped(Gan):
        def configure_optimizers(self):
            first, second = super().configure_optimizers()
            return [zoo.PlainWrapper(first), zoo.ClassicLookahead(second)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(Classifier.training_step(self, batch, batch_idx))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    callbacks = [WeightClipping(0.05), WeightDecay(0.1), L2Penalty(0.1), ZScoreGradientClipping(1.0, warmup=1)]
    model = fit([*callbacks, GradientNormClipping(0.1), NonFiniteGradientGuard()], Wrapped())
    assert [model.net[i].weight.abs().max().item() for i in (0, 4)] == pytest.approx([0.05, 0.05])
    assert sorted(callbacks[3].state["memory"]) == [0, 1]


def test_nested_fit_in_training_step():
    """Each fit follows its own optimizers."""

    class Nests(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                fit([WeightClipping(0.01), GradientNormClipping(0.1), WeightDecay(0.1)], Classifier(), max_epochs=1)
                seed(self.trainer.fit_loop.total_batch_idx)
            return super().training_step(batch, batch_idx)

    def callbacks():
        return [WeightClipping(0.1), GradientNormClipping(0.5), WeightDecay(0.1), L2Penalty(0.1)]

    assert same(fit(callbacks(), Nests()), fit(callbacks()))


def test_error_in_step_leaves_nothing_behind():
    class Fails(SGD):
        def step(self, closure=None):
            raise KeyError("out of luck")

    callbacks = [WeightClipping(0.05), WeightDecay(0.1), NonFiniteGradientGuard()]
    hooks = optimizer_module._global_optimizer_post_hooks
    with pytest.raises(KeyError, match="out of luck"):
        fit(callbacks, with_optimizer(lambda p: Fails(p, lr=0.1)))
    assert not hooks
    assert fit(callbacks).net[0].weight.abs().max() == torch.tensor(0.05)
    assert not hooks


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_zero_redundancy_optimizer_in_one_process():
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        callbacks = [GradientNormClipping(0.5), WeightDecay(0.1), L2Penalty(0.1), NonFiniteGradientGuard(), WeightClipping(0.2)]
        zero = fit(callbacks, with_optimizer(lambda p: ZeroRedundancyOptimizer(p, SGD, lr=0.05, momentum=0.9)))
    finally:
        torch.distributed.destroy_process_group()
    assert_close(weights(zero), weights(fit(callbacks)), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_compiled_step():
    def make(params):
        optimizer = momentum(params)
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer

    def callbacks():
        return [WeightClipping(0.05), WeightDecay(0.1)]

    compiled, eager, plain = fit(callbacks(), with_optimizer(make)), fit(callbacks()), fit([])
    assert distance(compiled, eager) < 1e-5 * distance(plain, eager)  # torch 2.10 rounds differently in compiled steps
