from __future__ import annotations

import copy

import pytest
import torch
from helpers import Classifier, fit, loader, parameter, same, weights
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from lightning_reg import L1Penalty, L2Penalty, Penalty
from lightning_reg.functional import add_l1_gradient_, add_l2_gradient_, l1_penalty, l2_penalty

NAIVE = {
    l1_penalty: lambda params: sum(p.abs().sum() for p in params),
    l2_penalty: lambda params: sum(p.pow(2).sum() for p in params) / 2,
}
CLOSED = {l1_penalty: add_l1_gradient_, l2_penalty: add_l2_gradient_}


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(3, 4), (7,), (), (0, 5), (2, 3, 2)]
    made = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    made[1].data[2] = 0.0
    return [*made, torch.randn(4, 3).to(dtype).t().requires_grad_()]


@pytest.mark.parametrize("penalty", [l1_penalty, l2_penalty])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_sum(penalty, dtype):
    fused, naive, added = tensors(dtype), tensors(dtype), tensors(dtype)
    value, reference = 3 * penalty(fused), 3 * NAIVE[penalty](naive)
    value.backward()
    reference.backward()
    CLOSED[penalty](added, 3.0)
    assert_close(value, reference)
    assert_close([p.grad for p in fused], [p.grad for p in naive])
    assert_close([p.grad for p in added], [p.grad for p in naive])


@pytest.mark.parametrize("penalty", [l1_penalty, l2_penalty])
def test_half_precision_is_summed_in_float32(penalty):
    layers = [torch.full((10, 10), 0.3).bfloat16() for _ in range(300)]
    truth = NAIVE[penalty]([layer.double() for layer in layers])
    assert_close(penalty(layers).double(), truth, rtol=1e-5, atol=0.0)
    assert abs(NAIVE[penalty](layers) - truth) > 0.05 * truth  # what a sum in bfloat16 comes to


@pytest.mark.parametrize("add", [add_l1_gradient_, add_l2_gradient_])
def test_a_gradient_is_added_to_what_there_is(add):
    theta, missing = parameter([1.0, -2.0], grad=[10.0, 10.0]), parameter([1.0, -2.0])
    add([theta, missing], 0.5)
    assert_close(theta.grad - 10, missing.grad)
    assert missing.grad.sign().tolist() == [1.0, -1.0]


def test_a_sparse_gradient_becomes_dense():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    add_l2_gradient_([embedding.weight], 0.5)
    expected = 0.5 * embedding.weight.detach()
    expected[1] += 1
    assert_close(embedding.weight.grad, expected)


def test_no_parameters_are_no_penalty():
    assert l1_penalty([]) == l2_penalty([]) == 0
    add_l1_gradient_([], 1.0)
    add_l2_gradient_([], 1.0)


def test_l2_on_the_gradient_route_is_weight_decay_to_the_last_bit():
    ours = fit([L2Penalty(0.01, params="all", inject="gradient")])
    assert same(ours, fit(model=Classifier(weight_decay=0.01)))


def test_l2_on_the_loss_route_is_weight_decay():
    ours, reference = fit([L2Penalty(0.01, params="all", inject="loss")]), fit(model=Classifier(weight_decay=0.01))
    assert_close(weights(ours), weights(reference))
    with pytest.raises(AssertionError):  # the mistake of leaving out the ½
        assert_close(weights(fit([L2Penalty(0.02, params="all", inject="loss")])), weights(reference))


class Regression(Classifier):
    """A linear model without bias whose gradient can be written down."""

    def __init__(self):
        super().__init__(lr=0.1, momentum=0.0)
        self.net = nn.Linear(64, 1, bias=False)
        nn.init.constant_(self.net.weight, 0.01)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return mse_loss(self.net(images).squeeze(1), labels.float())


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_one_step_of_l1_by_hand(route):
    model = Regression()
    images, labels = next(iter(loader()))
    w = model.net.weight.detach().double()
    gradient = 2 * ((images.double() @ w.t()).squeeze(1) - labels) @ images.double() / len(labels)
    fit([L1Penalty(0.3, inject=route)], model, max_epochs=1, limit_train_batches=1)
    assert_close(model.net.weight.double(), w - 0.1 * (gradient + 0.3 * w.sign()), rtol=1e-5, atol=1e-6)


class Naive(Callback):
    """What one writes first: the penalty added in every backward pass."""

    def on_before_backward(self, trainer, pl_module, loss):
        loss.add_(0.01 * NAIVE[l1_penalty]([p for p in pl_module.parameters() if p.ndim > 1]))


def without_dropout():
    model = Classifier()
    model.net[3].p = 0.0
    return model


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_accumulation_does_not_change_the_penalty(route):
    def accumulated(callback):
        model = without_dropout()
        return weights(fit([callback], model, loader(64, batch_size=8), accumulate_grad_batches=4))

    reference = weights(fit([L1Penalty(0.01)], without_dropout(), loader(64, batch_size=32)))
    assert_close(accumulated(L1Penalty(0.01, inject=route)), reference)
    with pytest.raises(AssertionError):
        assert_close(accumulated(Naive()), reference)


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_the_loss_scale_does_not_change_the_penalty(route):
    def scaled(callback):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        model = without_dropout()
        start = weights(model)
        fit([callback], model, plugins=[precision], max_epochs=1)
        return {name: p - start[name] for name, p in weights(model).items()}

    def plain(callback):
        model = without_dropout()
        start = weights(model)
        fit([callback], model, max_epochs=1)
        return {name: p - start[name] for name, p in weights(model).items()}

    reference = plain(L1Penalty(0.01))
    assert_close(scaled(L1Penalty(0.01, inject=route)), reference, rtol=0.02, atol=1e-3)
    with pytest.raises(AssertionError):
        assert_close(scaled(Naive()), reference, rtol=0.02, atol=1e-3)


class Unused(Classifier):
    """A model with a layer that the forward pass leaves out."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3, bias=False)
        nn.init.constant_(self.unused.weight, 1.0)


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_a_parameter_that_is_not_used_is_penalised_too(route):
    model = fit([L2Penalty(0.1, inject=route)], Unused(), max_epochs=1, limit_train_batches=1)
    assert_close(model.unused.weight, torch.full((3, 3), 1 - 0.05 * 0.1))


class Skips(Classifier):
    """A model that has nothing to say about some batches."""

    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_a_step_whose_last_batch_is_skipped_has_its_penalty(route):
    model = fit([L2Penalty(0.01, params="all", inject=route)], Skips({1, 3}), accumulate_grad_batches=2)
    reference = fit(model=Skips({1, 3}), accumulate_grad_batches=2)
    decayed = Skips({1, 3})
    decayed.weight_decay = 0.01
    assert_close(weights(model), weights(fit(model=decayed, accumulate_grad_batches=2)))
    assert not same(model, reference)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_a_step_that_is_skipped_altogether_is_no_step(route):
    start = Skips({0, 1, 2, 3})
    model = fit([L2Penalty(0.01, inject=route)], Skips({0, 1, 2, 3}))
    assert same(model, start)


class Custom(Penalty):
    """Σ log(1 + θ²), given by its value alone."""

    def value(self, params):
        return sum(p.square().log1p().sum() for p in params)


def test_a_penalty_of_ones_own_is_the_same_on_both_routes():
    by_loss, by_gradient = (fit([Custom(0.01, inject=route)], Unused()) for route in ("loss", "gradient"))
    assert_close(weights(by_loss), weights(by_gradient))
    assert not same(by_loss, fit(model=Unused()))


class Manual(Classifier):
    """Two optimizers in manual optimization, with a loss that forbids changes in place."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx).sigmoid())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1, weight_decay=self.weight_decay) for i in (0, 4)]


def test_manual_optimization_takes_the_gradient_route_for_the_optimizer_that_steps():
    decayed = Manual()
    decayed.weight_decay = 0.01
    assert same(fit([L2Penalty(0.01, params=["net.0.*", "net.4.*"])], Manual()), fit(model=decayed))


def test_a_loss_route_that_cannot_be_exact_is_refused():
    with pytest.raises(ValueError, match=r"L1Penalty: inject='loss' is not exact in manual optimization.*inject='gradient'"):
        fit([L1Penalty(0.1, inject="loss")], Manual())


class Fused(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


def test_the_gradient_route_is_refused_where_gradients_stay_scaled():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"L1Penalty acts before .* the fused SGD unscales .* fused=False"):
        fit([L1Penalty(0.1, inject="gradient")], Fused(), plugins=[precision])


def test_a_second_decay_is_said():
    with pytest.warns(UserWarning, match=r"L2Penalty acts on parameters that the optimizer decays too \(weight_decay=0.1\)"):
        fit([L2Penalty(0.1)], Classifier(weight_decay=0.1))


@pytest.mark.parametrize("kind", [L1Penalty, L2Penalty])
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_out_of_range_are_refused(kind, strength):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: strength must be a number in \[0, inf\), got {strength}"):
        kind(strength)


@pytest.mark.parametrize("strength", ["0.1", True, None, [0.1]])
def test_strengths_of_another_type_are_refused(strength):
    with pytest.raises(TypeError, match=r"L1Penalty: strength must be a number in \[0, inf\), got .* of type"):
        L1Penalty(strength)


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="L1Penalty: inject must be 'auto', 'loss' or 'gradient', got 'grad'"):
        L1Penalty(0.1, inject="grad")


def test_the_logged_loss_has_no_penalty():
    class Logs(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    losses = []
    for callbacks in ([], [L2Penalty(10.0)]):
        trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
        trainer.fit(copy.deepcopy(Logs()), loader())
        losses.append(trainer.callback_metrics["loss"])
    assert_close(losses[0], losses[1], rtol=0.0, atol=0.0)
