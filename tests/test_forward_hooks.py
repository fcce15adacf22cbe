"""Techniques that change weights for one forward and backward pass, and hide the change from everything else."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit, loader, same, weights
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing import assert_close

from lightning_reg import DropoutInjection, L2Penalty, NonFiniteGradientGuard, WeightClipping
from lightning_reg.custom import NON_NEGATIVE, ParameterRegularizer, Phase

LOG = []


class Shift(ParameterRegularizer):
    """Adds a constant to the weights for the forward and backward pass, and logs its calls."""

    phase = Phase.FORWARD
    valid_ranges = {"amount": NON_NEGATIVE}

    def __init__(self, amount, *, params="net.0.weight", name=None):
        self.amount = amount
        super().__init__(params, name)
        self.kept = {}

    def before_forward(self, params, step):
        LOG.append(("before", self.name))
        for p in params:
            self.kept[p] = p.detach().clone()
            p.add_(self.current["amount"])

    def after_backward(self, params):
        LOG.append(("after", self.name))
        for p in params:
            p.copy_(self.kept.pop(p))

    def route(self):
        return "forward pass"


@pytest.fixture(autouse=True)
def empty_log():
    LOG.clear()


class Recorder(Classifier):
    """Records the first entry of the first weight at several times, relative to the start of the batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def record(self, when):
        self.seen.append((when, round(self.net[0].weight[0, 0].item() - self.begin, 3)))

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.begin = self.net[0].weight[0, 0].item()

    def training_step(self, batch, batch_idx):
        self.record("forward")
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss):
        self.record("backward")

    def on_before_optimizer_step(self, optimizer):
        self.record("step")


def test_change_lasts_from_forward_to_backward_pass():
    model = fit([Shift(1.0)], Recorder(lr=0.0), max_epochs=1, limit_train_batches=1)
    assert model.seen == [("forward", 1.0), ("backward", 1.0), ("step", 0.0)]
    assert same(model, Classifier())


def test_changes_are_undone_in_reverse_order():
    fit([Shift(1.0, name="b"), Shift(2.0, name="a")], max_epochs=1, limit_train_batches=1)
    assert LOG == [("before", "a"), ("before", "b"), ("after", "b"), ("after", "a")]


def test_each_micro_batch_has_its_own_change():
    model = fit([Shift(1.0)], Recorder(lr=0.0), max_epochs=1, accumulate_grad_batches=2, limit_train_batches=2)
    both = [("forward", 1.0), ("backward", 1.0)]
    assert model.seen == [*both, *both, ("step", 0.0)]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_skipped_batch_leaves_no_change():
    class Skips(Recorder):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.record("end")

    model = fit([Shift(1.0)], Skips(lr=0.0), max_epochs=1, limit_train_batches=2)
    skipped = [("forward", 1.0), ("step", 0.0), ("end", 0.0)]
    assert model.seen == [*skipped, ("forward", 1.0), ("backward", 1.0), ("step", 0.0), ("end", 0.0)]


def test_exception_leaves_no_change_or_wrapper():
    class Fails(Recorder):
        def training_step(self, batch, batch_idx):
            self.strategy = self.trainer.strategy
            raise RuntimeError("stop")

    model = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        fit([Shift(1.0)], model)
    assert same(model, Classifier())
    assert "training_step" not in vars(model.strategy)


def test_fit_leaves_no_wrapper_or_hook():
    class Keeps(Classifier):
        def configure_optimizers(self):
            self.kept = super().configure_optimizers()
            return self.kept

        def on_fit_end(self):
            self.strategy = self.trainer.strategy

    model = fit([Shift(1.0)], Keeps())
    assert "training_step" not in vars(model.strategy)
    assert not model.kept._optimizer_step_pre_hooks


def test_validation_and_checkpoints_use_true_weights(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "model.ckpt")

    class Validates(Recorder):
        def val_dataloader(self):
            return loader(16)

        def validation_step(self, batch, batch_idx):
            self.record("validation")

    model = Validates(lr=0.0)
    fit([Shift(1.0), Saves()], model, max_epochs=1, val_check_interval=2, num_sanity_val_steps=0)
    assert [change for when, change in model.seen if when == "validation"] == [0.0, 0.0]
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.0.weight"], Classifier().net[0].weight)


def test_each_closure_evaluation_has_the_change():
    class Searches(Recorder):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1e-6, max_iter=3)

    model = fit([Shift(1.0)], Searches(), max_epochs=1, limit_train_batches=1)
    forwards = [change for when, change in model.seen if when == "forward"]
    assert len(forwards) > 1
    assert forwards == pytest.approx([1.0] * len(forwards), abs=1e-2)
    assert [kind for kind, _ in LOG] == ["before", "after"] * len(forwards)


def test_change_works_with_loss_scaling():
    def trained(**options):
        return fit([Shift(0.1)], Classifier(), max_epochs=1, **options)

    scaled = trained(plugins=[MixedPrecision("bf16-mixed", "cpu")])
    assert_close(weights(scaled), weights(trained()), rtol=0.05, atol=0.02)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    assert not same(trained(plugins=[plugin]), Classifier())
    assert [kind for kind, _ in LOG] == ["before", "after"] * (len(LOG) // 2)


class Manual(Recorder):
    """The recorder in manual optimization."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False


class TwoLosses(Manual):
    """One forward pass with two backward passes and a step, then another forward pass and step."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss / 2, retain_graph=True)
        self.manual_backward(loss / 2)
        optimizer.step()
        self.record("between")
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.record("end")


def test_change_lasts_until_step_in_manual_optimization():
    model = fit([Shift(1.0)], TwoLosses(lr=0.0), max_epochs=1, limit_train_batches=1)
    first = [("forward", 1.0), ("backward", 1.0), ("backward", 1.0), ("step", 0.0)]
    assert model.seen == [*first, ("between", 1.0), ("forward", 1.0), ("backward", 1.0), ("step", 0.0), ("end", 0.0)]
    assert same(model, Classifier())


class Closure(Manual):
    """A closure that the optimizer evaluates."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = super(Closure, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def test_a_closure_in_manual_optimization_has_the_change():
    model = fit([Shift(1.0)], Closure(lr=0.0), max_epochs=1, limit_train_batches=1)
    assert model.seen == [("forward", 1.0), ("backward", 1.0), ("step", 0.0)]
    assert same(model, Classifier())


@pytest.mark.filterwarnings("ignore:NonFiniteGradientGuard.*infinite or NaN gradients")
@pytest.mark.parametrize("how", ["guard", "scaler"])
def test_the_change_is_back_after_a_skipped_step(how):
    class Skipped(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss * float("nan"))
            optimizer.step()
            self.record("between")

    callbacks = [Shift(1.0), *([NonFiniteGradientGuard()] if how == "guard" else [])]
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if how == "scaler" else []
    model = fit(callbacks, Skipped(), max_epochs=1, limit_train_batches=1, plugins=plugins)
    assert model.seen[-1] == ("between", 1.0)
    assert same(model, Classifier())


def test_a_step_of_one_optimizer_leaves_the_graph_of_another_alone():
    """A GAN's generator and discriminator share a forward pass, with one technique on both."""

    class Gan(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            generator, discriminator = self.optimizers()
            fake = self.net[:2](batch[0])
            discriminator.zero_grad()
            self.manual_backward(self.net[2:](fake.detach()).square().mean())
            discriminator.step()
            generator.zero_grad()
            self.manual_backward(-self.net[2:](fake).square().mean())
            generator.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net[:2], self.net[2:])]

    shifted = fit([Shift(0.1, params="weights")], Gan(), max_epochs=1)
    plain = fit([], Gan(), max_epochs=1)
    assert not same(shifted, plain)
    assert (shifted.net[0].weight - plain.net[0].weight).abs().max() < 0.05  # the change of 0.1 itself is gone


def test_an_error_in_a_technique_leaves_nothing_behind():
    class Fails(Shift):
        def before_forward(self, params, step):
            if step.number == 1:
                raise RuntimeError("stop")
            super().before_forward(params, step)

    class Keeps(Classifier):
        def on_train_start(self):
            self.strategy = self.trainer.strategy

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.after = self.net[0].weight.detach().clone()

    model = Keeps()
    with pytest.raises(RuntimeError, match="stop"):
        fit([Shift(1.0, name="a"), Fails(1.0, name="b")], model)
    assert torch.equal(model.net[0].weight, model.after)
    assert not {"training_step", "optimizer_step"} & set(vars(model.strategy))


def test_an_error_while_undoing_does_not_keep_the_rest_from_being_undone():
    class Fails(Shift):
        def after_backward(self, params):
            raise RuntimeError("cannot undo")

    class Keeps(Classifier):
        def configure_optimizers(self):
            self.kept = super().configure_optimizers()
            return self.kept

    model = Keeps()
    with pytest.raises(RuntimeError, match="cannot undo"):
        fit([Fails(1.0), DropoutInjection(0.1, after="ReLU")], model)
    assert not model.kept._optimizer_step_post_hooks
    assert not model.net[2]._forward_hooks


def test_penalties_take_the_gradient_route_beside_such_a_technique():
    """On the loss they would be evaluated at the changed weights."""
    penalty = L2Penalty(0.1)
    automatic = fit([Shift(1.0), penalty], max_epochs=1)
    assert not penalty.adds_to_loss
    assert same(automatic, fit([Shift(1.0), L2Penalty(0.1, inject="gradient")], max_epochs=1))
    with pytest.raises(ValueError, match="inject='loss' is not exact together with Shift, which changes the weights"):
        fit([Shift(1.0), L2Penalty(0.1, inject="loss")])


def test_other_techniques_act_on_true_weights():
    """A penalty on the gradient route and clipping after the step act on the true weights."""
    others = lambda: [L2Penalty(0.1, inject="gradient"), WeightClipping(0.05)]  # noqa: E731
    model = fit([Shift(0.0), *others()], max_epochs=1)
    assert same(model, fit(others(), max_epochs=1))
    shifted = fit([Shift(1.0), *others()], max_epochs=1)
    assert shifted.net[0].weight.abs().max() <= 0.05
    assert not same(shifted, model)


def test_no_wrapper_without_forward_technique():
    class Checks(Callback):
        def on_train_start(self, trainer, pl_module):
            assert "training_step" not in vars(trainer.strategy)

    fit([L2Penalty(0.1), Checks()], data=loader(16), max_epochs=1)
