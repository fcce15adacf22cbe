from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import UNITS, Classifier, Fused, Gan, Memory, distance, fit, identical, loader, parameter, same, weights
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from lightning_reg import (
    ActivityPenalty,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    OrthogonalityPenalty,
    Penalty,
    StartingPointPenalty,
)
from lightning_reg.functional import (
    Units,
    activity_penalty,
    add_distance_gradient_,
    add_group_lasso_gradient_,
    add_l1_gradient_,
    add_l2_gradient_,
    distance_penalty,
    group_lasso_penalty,
    l1_penalty,
    l2_penalty,
    orthogonality_penalty,
    units_of,
)

NAIVE = {
    l1_penalty: lambda params: sum(p.abs().sum() for p in params),
    l2_penalty: lambda params: sum(p.pow(2).sum() for p in params) / 2,
}
CLOSED = {l1_penalty: add_l1_gradient_, l2_penalty: add_l2_gradient_}


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(3, 4), (7,), (), (0, 5), (2, 3, 2)]
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    params[1].data[2] = 0.0
    return [*params, torch.randn(4, 3).to(dtype).t().requires_grad_()]


@pytest.mark.parametrize("penalty", [l1_penalty, l2_penalty])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_match_naive_sum(penalty, dtype):
    fused, naive, added = tensors(dtype), tensors(dtype), tensors(dtype)
    value, reference = 3 * penalty(fused), 3 * NAIVE[penalty](naive)
    value.backward()
    reference.backward()
    CLOSED[penalty](added, 3.0)
    assert_close(value, reference)
    assert_close([p.grad for p in fused], [p.grad for p in naive])
    assert_close([p.grad for p in added], [p.grad for p in naive])


@pytest.mark.parametrize("penalty", [l1_penalty, l2_penalty])
@pytest.mark.parametrize("others", [False, True])
def test_large_tensors_match_naive_sum(penalty, others):
    """More entries than a chunk holds, and not a multiple of it, in both memory layouts."""
    torch.manual_seed(0)
    start = [torch.randn(1100, 1000), torch.randn(1000, 1100).t(), torch.randn(1, 1_100_000), torch.randn(2, 1_200_000, 1).mT]
    start[0][5, 7] = 0.0
    start += [torch.randn(3, 4)] if others else []
    fused, naive, added = ([p.clone().requires_grad_() for p in start] for _ in range(3))
    (3 * penalty(fused)).backward()
    (3 * NAIVE[penalty](naive)).backward()
    CLOSED[penalty](added, 3.0)
    assert_close([p.grad for p in fused], [p.grad for p in naive])
    assert_close([p.grad for p in added], [p.grad for p in naive])


@pytest.mark.parametrize("penalty", [l1_penalty, l2_penalty])
def test_half_precision_is_summed_in_float32(penalty):
    layers = [torch.full((10, 10), 0.3).bfloat16() for _ in range(300)]
    truth = NAIVE[penalty]([layer.double() for layer in layers])
    assert_close(penalty(layers).double(), truth, rtol=1e-5, atol=0.0)
    assert abs(NAIVE[penalty](layers) - truth) > 0.05 * truth  # a sum in bfloat16 is wrong


@pytest.mark.parametrize("penalty", [l1_penalty, l2_penalty])
def test_large_tensors_have_exact_sums(penalty):
    large = torch.full((20, 1_000_000), 0.3)
    truth = NAIVE[penalty]([large.double()])
    assert_close(penalty([large]).double(), truth, rtol=1e-6, atol=0.0)
    norm = torch.linalg.vector_norm(large, 1)  # torch keeps one running sum
    assert abs(norm - NAIVE[l1_penalty]([large.double()])) > 1e-3 * norm


@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["cpu", "as on a GPU"])
def test_l1_of_many_small_tensors(as_on_gpu, monkeypatch):
    """More tensors of one shape than a batch holds, mixed with other shapes, dtypes, and memory layouts."""
    if as_on_gpu:
        monkeypatch.setattr("lightning_reg.penalties.norms.is_cpu", lambda tensor: False)
    torch.manual_seed(0)
    shapes = [(3, 4), (4, 3), (), (0, 2), (5,)] * 150
    start = [torch.randn(shape).to([torch.float32, torch.bfloat16][i % 7 == 0]) for i, shape in enumerate(shapes)]
    start += [torch.randn(4, 3).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.tensor(1e-45)]
    naive, added = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    (0.5 * NAIVE[l1_penalty](naive)).backward()
    for p in added:
        p.grad = torch.ones_like(p)
    add_l1_gradient_(added, 0.5)
    assert all(torch.equal(p.grad, expected.grad + 1) for p, expected in zip(added, naive, strict=True))
    assert_close(l1_penalty(start), NAIVE[l1_penalty]([p.double() for p in start]).float())


@pytest.mark.parametrize("add", [add_l1_gradient_, add_l2_gradient_])
def test_gradient_is_added_to_existing_gradient(add):
    theta, missing = parameter([1.0, -2.0], grad=[10.0, 10.0]), parameter([1.0, -2.0])
    add([theta, missing], 0.5)
    assert_close(theta.grad - 10, missing.grad)
    assert missing.grad.sign().tolist() == [1.0, -1.0]


def test_sparse_gradient_becomes_dense():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    add_l2_gradient_([embedding.weight], 0.5)
    expected = 0.5 * embedding.weight.detach()
    expected[1] += 1
    assert_close(embedding.weight.grad, expected)


def test_penalty_of_no_parameters_is_zero():
    assert l1_penalty([]) == l2_penalty([]) == 0
    add_l1_gradient_([], 1.0)
    add_l2_gradient_([], 1.0)


def test_strength_is_not_rounded_to_dtype_of_loss():
    """The loss is in bfloat16, where 0.1 is 0.1001; the weights are in float32."""

    class Half(Classifier):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx).bfloat16()

    trained = fit([L2Penalty(0.1)], Half(lr=1.0, momentum=0.0), max_epochs=1, limit_train_batches=1).net[0].weight
    start = Half().net[0].weight
    assert_close(trained, start - 0.1 * start, rtol=1e-6, atol=0.0)
    rounded = torch.tensor(0.1).bfloat16().float()
    assert not torch.allclose(trained, start - rounded * start, rtol=1e-6, atol=0.0)


def test_l2_on_gradient_route_equals_weight_decay():
    ours = fit([L2Penalty(0.01, params="all", inject="gradient")])
    assert same(ours, fit(model=Classifier(weight_decay=0.01)))


def test_l2_on_loss_route_matches_weight_decay():
    ours, reference = fit([L2Penalty(0.01, params="all", inject="loss")]), fit(model=Classifier(weight_decay=0.01))
    assert_close(weights(ours), weights(reference))
    with pytest.raises(AssertionError):  # detects a missing ½
        assert_close(weights(fit([L2Penalty(0.02, params="all", inject="loss")])), weights(reference))


class Regression(Classifier):
    """A linear model without bias, whose gradient has a closed form."""

    def __init__(self):
        super().__init__(lr=0.1, momentum=0.0)
        self.net = nn.Linear(64, 1, bias=False)
        nn.init.constant_(self.net.weight, 0.01)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return mse_loss(self.net(images).squeeze(1), labels.to(images.dtype))


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_l1_step_matches_formula(route):
    model = Regression()
    images, labels = next(iter(loader()))
    w = model.net.weight.detach().double()
    gradient = 2 * ((images.double() @ w.t()).squeeze(1) - labels) @ images.double() / len(labels)
    fit([L1Penalty(0.3, inject=route)], model, max_epochs=1, limit_train_batches=1)
    assert_close(model.net.weight.double(), w - 0.1 * (gradient + 0.3 * w.sign()), rtol=1e-5, atol=1e-6)


class Naive(Callback):
    """A naive penalty, added to the loss in every backward pass."""

    def on_before_backward(self, trainer, pl_module, loss):
        loss.add_(0.01 * NAIVE[l1_penalty]([p for p in pl_module.parameters() if p.ndim > 1]))


def without_dropout():
    model = Classifier()
    model.net[3].p = 0.0
    return model


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_accumulation_does_not_change_penalty(route):
    def accumulated(callback):
        model = without_dropout()
        return weights(fit([callback], model, loader(64, batch_size=8), accumulate_grad_batches=4))

    reference = weights(fit([L1Penalty(0.01)], without_dropout(), loader(64, batch_size=32)))
    assert_close(accumulated(L1Penalty(0.01, inject=route)), reference)
    with pytest.raises(AssertionError):
        assert_close(accumulated(Naive()), reference)


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_loss_scale_does_not_change_penalty(route):
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
    """A model with a layer that the forward pass skips."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3, bias=False)
        nn.init.constant_(self.unused.weight, 1.0)


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_unused_parameter_is_penalized(route):
    model = fit([L2Penalty(0.1, inject=route)], Unused(), max_epochs=1, limit_train_batches=1)
    assert_close(model.unused.weight, torch.full((3, 3), 1 - 0.05 * 0.1))


class Skips(Classifier):
    """A model that returns no loss for some batches."""

    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


class AccumulatesByHand(Classifier):
    """A model that takes a step after every second batch, in automatic optimization."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[3].p = 0.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / 2

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


def test_module_that_accumulates_by_hand_is_penalized_once_per_step():
    reference = weights(fit([L2Penalty(0.1)], without_dropout(), loader(64, batch_size=32)))
    assert_close(weights(fit([L2Penalty(0.1)], AccumulatesByHand())), reference)
    with pytest.warns(UserWarning, match=r"L2Penalty is added to the loss of each batch, but AccumulatesByHand overrides"):
        by_loss = fit([L2Penalty(0.1, inject="loss")], AccumulatesByHand())
    with pytest.raises(AssertionError):
        assert_close(weights(by_loss), reference)


def test_overridden_step_keeps_the_loss_where_gradients_come_too_late():
    class Warms(Fused):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    penalty = L2Penalty(0.1)
    with pytest.warns(UserWarning, match=r"L2Penalty is added .* use fused=False in the optimizer"):
        fit([penalty], Warms(), plugins=[precision], max_epochs=1)
    assert penalty.adds_to_loss


@pytest.mark.parametrize("make", [lambda: L1Penalty(0.1), lambda: ActivityPenalty(0.1, modules="ReLU")], ids=["L1", "activity"])
def test_loss_without_graph_raises(make):
    class Detaches(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    for callbacks in ([], [make()]):
        with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
            fit(callbacks, Detaches())


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_step_with_skipped_last_batch_is_penalized(route):
    model = fit([L2Penalty(0.01, params="all", inject=route)], Skips({1, 3}), accumulate_grad_batches=2)
    reference = fit(model=Skips({1, 3}), accumulate_grad_batches=2)
    decayed = Skips({1, 3})
    decayed.weight_decay = 0.01
    assert_close(weights(model), weights(fit(model=decayed, accumulate_grad_batches=2)))
    assert not same(model, reference)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_fully_skipped_step_is_not_penalized(route):
    start = Skips({0, 1, 2, 3})
    model = fit([L2Penalty(0.01, inject=route)], Skips({0, 1, 2, 3}))
    assert same(model, start)


class Custom(Penalty):
    """Σ log(1 + θ²), defined only by its value."""

    def value(self, params):
        return sum(p.square().log1p().sum() for p in params)


def overriding(base):
    """Return a class that overrides only the value of a penalty that has a closed form."""

    class Doubled(base):
        def value(self, params):
            return 2 * super().value(params)

    return Doubled


@pytest.mark.parametrize("base", [L1Penalty, L2Penalty, GroupLassoPenalty, StartingPointPenalty])
def test_a_new_value_replaces_the_closed_form(base):
    """Otherwise the gradient route would train with the formula of the base class."""
    doubled = fit([overriding(base)(0.3, inject="gradient")])
    assert distance(doubled, fit([base(0.6, inject="gradient")])) < 1e-4
    assert distance(doubled, fit([base(0.3, inject="gradient")])) > 1e-2

    class Both(overriding(base)):
        def add_gradient_(self, params, strength):
            base.add_gradient_(self, params, 2 * strength)

    assert same(fit([Both(0.3, inject="gradient")]), fit([base(0.6, inject="gradient")]))


def test_the_value_of_a_mixin_replaces_the_closed_form():
    class Doubling:
        def value(self, params):
            return 2 * super().value(params)

    class Mixed(Doubling, L2Penalty):
        """Overrides the value in a base class that is no penalty."""

    assert distance(fit([Mixed(0.3, inject="gradient")]), fit([L2Penalty(0.6, inject="gradient")])) < 1e-4


def test_custom_penalty_matches_on_both_routes():
    by_loss, by_gradient = (fit([Custom(0.01, inject=route)], Unused()) for route in ("loss", "gradient"))
    assert_close(weights(by_loss), weights(by_gradient))
    assert not same(by_loss, fit(model=Unused()))


def test_manual_optimization_uses_gradient_route():
    decayed = Gan()
    decayed.weight_decay = 0.01
    assert same(fit([L2Penalty(0.01, params=["net.0.*", "net.4.*"])], Gan()), fit(model=decayed))


def test_naive_penalty_fails_in_manual_optimization():
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit([Naive()], Gan())


class Tied(Classifier):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(64, 16, bias=False)
        self.again.weight = self.net[0].weight

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net[1:](self.net[0](images) + self.again(images)), labels)


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_tied_weight_is_penalized_once(route):
    class LayerByLayer(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            layers = [module for module in pl_module.modules() if isinstance(module, nn.Linear)]
            loss.add_(0.05 * sum(p.square().sum() for layer in layers for p in layer.parameters()))

    params = ["*.weight", "*.bias", "!net.1.*"]
    decayed = Tied()
    decayed.net[1].requires_grad_(False)
    decayed.weight_decay = 0.1
    reference = weights(fit(model=decayed))

    def trained(callback):
        model = Tied()
        model.net[1].requires_grad_(False)
        return weights(fit([callback], model))

    assert_close(trained(L2Penalty(0.1, params=params, inject=route)), reference)
    with pytest.raises(AssertionError):
        assert_close(trained(LayerByLayer()), reference)


@pytest.mark.parametrize(("route", "evaluations"), [("loss", 4), ("gradient", 0)])
def test_value_is_computed_only_when_needed(route, evaluations):
    class Counts(L1Penalty):
        count = 0
        add_gradient_ = L1Penalty.add_gradient_

        def value(self, params):
            self.count += 1
            return super().value(params)

    callback = Counts(0.01, inject=route)
    fit([callback], data=loader(64, batch_size=8), accumulate_grad_batches=4)
    assert callback.count == evaluations
    logged = Counts(0.01, inject=route)
    fit([logged], data=loader(64, batch_size=8), accumulate_grad_batches=4, logger=Memory(), log_every_n_steps=2)
    assert logged.count == max(evaluations, 2)


def test_inexact_loss_route_raises():
    with pytest.raises(ValueError, match=r"L1Penalty: inject='loss' is not exact in manual optimization.*inject='gradient'"):
        fit([L1Penalty(0.1, inject="loss")], Gan())


def test_gradient_route_with_fused_optimizer_raises():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"L1Penalty acts before .* the fused Adam unscales .* fused=False"):
        fit([L1Penalty(0.1, inject="gradient")], Fused(), plugins=[precision])


def test_l2_penalty_in_addition_to_weight_decay_warns():
    with pytest.warns(UserWarning, match=r"L2Penalty acts on parameters that the optimizer also decays \(weight_decay=0.1\)"):
        fit([L2Penalty(0.1)], Classifier(weight_decay=0.1))


@pytest.mark.parametrize("kind", [L1Penalty, L2Penalty])
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strength_out_of_range_raises(kind, strength):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: strength must be a number in \[0, inf\), got {strength}"):
        kind(strength)


@pytest.mark.parametrize("strength", ["0.1", True, None, [0.1]])
def test_strength_of_wrong_type_raises(strength):
    with pytest.raises(TypeError, match=r"L1Penalty: strength must be a number in \[0, inf\), got .* of type"):
        L1Penalty(strength)


def test_unknown_route_raises():
    with pytest.raises(ValueError, match="L1Penalty: inject must be 'auto', 'loss' or 'gradient', got 'grad'"):
        L1Penalty(0.1, inject="grad")


def test_logged_loss_excludes_penalty():
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


@pytest.mark.parametrize("layer", UNITS, ids=repr)
def test_group_lasso_sums_over_output_units(layer):
    by_hand = layer.weight.detach().clone().requires_grad_()
    reference = sum(unit.numel() ** 0.5 * unit.norm() for unit in UNITS[layer](by_hand))
    (2 * reference).backward()
    fused, added = (layer.weight.detach().clone().requires_grad_() for _ in range(2))
    value = group_lasso_penalty([fused], [units_of(layer)])
    (2 * value).backward()
    add_group_lasso_gradient_([added], 2.0, [units_of(layer)])
    assert_close(value, reference)
    assert_close(fused.grad, by_hand.grad)
    assert_close(added.grad, by_hand.grad)


def test_group_lasso_of_zeros_vectors_and_scalars():
    zero = torch.zeros(2, 3, requires_grad=True)
    group_lasso_penalty([zero]).backward()
    assert zero.grad.tolist() == [[0.0] * 3] * 2
    vector, scalar = torch.tensor([3.0, -4.0], requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    value = group_lasso_penalty([vector, scalar])
    value.backward()
    assert value == 9.0
    assert vector.grad.tolist() == [1.0, -1.0]
    assert scalar.grad == -1.0
    assert Units() == (0, 1)


def test_group_lasso_of_zero_unit_has_zero_gradient():
    zeros = torch.zeros(4, 4608, requires_grad=True)
    (2.0**60 * group_lasso_penalty([zeros])).backward()
    assert not zeros.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_lasso_of_tiny_weights(dtype):
    single = torch.tensor([1e-35, -1e-35], dtype=dtype, requires_grad=True)
    group_lasso_penalty([single]).backward()
    assert_close(single.grad, torch.tensor([1.0, -1.0], dtype=dtype))


def test_group_lasso_at_both_ends_of_the_range():
    start = torch.tensor([[3e19, 4e19], [3e-24, 4e-24], [0.0, 0.0]])
    fused, added = (start.clone().requires_grad_() for _ in range(2))
    value = group_lasso_penalty([fused])
    value.backward()
    add_group_lasso_gradient_([added], 1.0)
    expected = 2**0.5 * torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    assert_close(value, torch.tensor(2**0.5 * 5e19))
    assert_close(fused.grad, expected)
    assert_close(added.grad, expected)


def test_group_lasso_of_tiny_half_precision_weights():
    """Their factor, 1 / ‖w‖, is beyond the range of float16."""
    start = torch.tensor([[0.0, 0.0], [6e-8, 6e-8]], dtype=torch.float16)
    fused, added = (start.clone().requires_grad_() for _ in range(2))
    group_lasso_penalty([fused]).backward()
    add_group_lasso_gradient_([added], 1.0)
    assert fused.grad.tolist() == added.grad.tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 3, 3), (20, 2, 3, 3)])
def test_orthogonality_uses_smaller_gram_matrix(shape):
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    matrix = w.detach().flatten(1).numpy()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    value = orthogonality_penalty([w])
    assert value.item() == pytest.approx(((gram - np.eye(len(gram))) ** 2).sum() / 2)
    assert torch.autograd.gradcheck(lambda w: orthogonality_penalty([w]), w)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 4)))
    assert orthogonality_penalty([torch.tensor(q)]).item() == pytest.approx(0.0, abs=1e-20)


def test_orthogonality_of_vector_raises():
    with pytest.raises(ValueError, match=r"needs tensors with two or more dimensions, got shape \(3,\)"):
        orthogonality_penalty([torch.ones(3)])
    with pytest.raises(ValueError, match=r"with two or more dimensions, got net.0.bias, .*: exclude them"):
        fit([OrthogonalityPenalty(0.1, params="all")])


def test_distance_and_its_gradient():
    params, references = tensors(), [p.detach() + 1 for p in tensors()]
    value = distance_penalty(params, references)
    value.backward()
    added = tensors()
    add_distance_gradient_(added, references, 1.0)
    assert_close([p.grad for p in params], [torch.full_like(p, -1.0).detach() for p in params])
    assert_close([p.grad for p in added], [p.grad for p in params])
    assert value.item() == pytest.approx(sum(p.numel() for p in params) / 2)


def test_starting_point_penalty_limits_movement():
    start, free, held = Classifier(), fit(max_epochs=4), fit([StartingPointPenalty(5.0)], max_epochs=4)

    def moved(model):
        return (model.net[0].weight - start.net[0].weight).norm()

    assert moved(held) < 0.3 * moved(free)


@pytest.mark.parametrize("p", [1, 2])
def test_activity_penalty_is_mean_over_batch(p):
    h = torch.randn(6, 3, 4)
    norms = [sample.abs().sum() if p == 1 else sample.square().sum() / 2 for sample in h]
    assert_close(activity_penalty(h, p), torch.stack(norms).mean())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_activity_penalty_matches_manual_term(accumulate):
    class ByHand(Classifier):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            hidden = self.net[:3](images)
            term = 0.1 * hidden.abs().sum() / len(hidden)
            return nn.functional.cross_entropy(self.net[3:](hidden), labels) + term

    ours = fit([ActivityPenalty(0.1, modules="ReLU")], accumulate_grad_batches=accumulate)
    assert_close(weights(ours), weights(fit(model=ByHand(), accumulate_grad_batches=accumulate)))
    assert not same(ours, fit(accumulate_grad_batches=accumulate))


class InPlace(Classifier):
    """The model, in which the ReLU overwrites the output of the normalization."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.ReLU(inplace=True)


@pytest.mark.parametrize("p", [1, 2])
def test_activities_can_be_changed_in_place(p):
    changed, kept = (fit([ActivityPenalty(0.1, modules="net.1", p=p)], kind()) for kind in (InPlace, Classifier))
    assert same(changed, kept)
    assert not same(changed, fit())


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_activities_of_skipped_batch_are_discarded():
    class SkipsLate(Skips):
        def training_step(self, batch, batch_idx):
            loss = Classifier.training_step(self, batch, batch_idx)
            return None if batch_idx in self.skipped else loss

    early, late = (fit([ActivityPenalty(0.1, modules="ReLU")], kind({1, 3})) for kind in (Skips, SkipsLate))
    assert same(early, late)


def test_elastic_net_equals_l1_plus_l2():
    for route in ("loss", "gradient"):
        both = fit([L1Penalty(0.01, inject=route), L2Penalty(0.1, inject=route)])
        assert_close(weights(fit([ElasticNetPenalty(0.01, 0.1, inject=route)])), weights(both))


ROUTED = [L1Penalty(0.01), L2Penalty(0.1), ElasticNetPenalty(0.01, 0.1), GroupLassoPenalty(0.01), OrthogonalityPenalty(0.02)]
ROUTED += [StartingPointPenalty(1.0), Custom(0.01)]


@pytest.mark.parametrize("penalty", ROUTED, ids=repr)
def test_both_routes_match(penalty):
    by_loss, by_gradient = copy.deepcopy(penalty), copy.deepcopy(penalty)
    by_loss.inject, by_gradient.inject = "loss", "gradient"
    first, second = fit([by_loss], Unused()), fit([by_gradient], Unused())
    assert_close(weights(first), weights(second))
    assert not same(second, fit(model=Unused()))


class Searches(Regression):
    """The linear model with an optimizer that uses a line search."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-9)


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_line_search_sees_penalized_objective(route):
    """Compared with ridge in closed form. The naive penalty misses it, since the search sees only its gradient."""
    images, labels = (part.double() for part in next(iter(loader(64, batch_size=64))))
    gram = images.T @ images / 32 + 0.5 * torch.eye(64)
    truth = torch.linalg.solve(gram, images.T @ labels / 32)

    class NaiveRidge(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            loss.add_(0.25 * pl_module.net.weight.square().sum())

    def solved(callback):
        model = fit([callback], Searches(), loader(64, batch_size=64), max_epochs=4, precision="64-true")
        return ((model.net.weight.detach()[0] - truth).norm() / truth.norm()).item()

    assert solved(L2Penalty(0.5, inject=route)) < 1e-4
    assert solved(NaiveRidge()) > 1e-3


class Wrong(Penalty):
    """A penalty whose value is a function argument."""

    def __init__(self, strength, *, make, inject="auto"):
        self.make = make
        super().__init__(strength, inject=inject)

    def value(self, params):
        return self.make(params)


@pytest.mark.parametrize("route", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda params: 1.0, TypeError, "must return a differentiable scalar tensor, got 1.0 of type float"),
        (lambda params: params[0].abs(), ValueError, r"got a tensor of shape \(16, 64\): sum over all entries"),
        (lambda params: params[0].data.sum(), ValueError, r"got a tensor without a graph: compute it from params"),
        (lambda params: (params[0] - params[0]).sum() / 0.0, ValueError, "got NaN for finite parameters"),
    ],
    ids=["float", "matrix", "no graph", "NaN"],
)
def test_invalid_penalty_value_raises(make, error, message, route):
    with pytest.raises(error, match=message):
        fit([Wrong(0.1, make=make, inject=route)])


def test_starting_point_of_changed_model_raises():
    callback, model = StartingPointPenalty(0.1), Classifier()
    fit([callback], model)
    model.net[4] = nn.Linear(16, 11)
    with pytest.raises(ValueError, match=r"the starting point has shape \(10, 16\) for 'net.4.weight' of shape \(11, 16\)"):
        fit([callback], model)


def moved_from(model, start):
    return max((p - start[name]).abs().max().item() for name, p in weights(model).items())


def test_each_model_has_its_own_starting_point():
    """With a strong penalty, a model stays where it started."""
    callback = StartingPointPenalty(10.0, params="all")
    for factor in (1.0, -3.0):
        model = Classifier()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        start = weights(model)
        fit([callback], model)
        assert moved_from(model, start) < 0.3


def test_later_fits_of_a_model_keep_its_starting_point(tmp_path):
    """Also after a resume. A copy, and a model from a checkpoint without its callbacks, start anew."""

    def start_of(callback):
        return {name: value.clone() for name, value in callback.state["start"].items()}

    model, callback = Classifier(), StartingPointPenalty(0.1, params="all")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, callbacks=[callback])
    first = weights(model)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    second = weights(model)
    fit([callback], model)
    assert identical(start_of(callback), first)
    resumed = StartingPointPenalty(0.1, params="all")
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    for used in (resumed, callback):
        Trainer(**options, callbacks=[used]).fit(Classifier(), loader(), ckpt_path=tmp_path / "model.ckpt")
        assert identical(start_of(used), first)
    for other in (copy.deepcopy(model), Classifier.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")):
        expected = weights(other)
        fit([callback], other)
        assert identical(start_of(callback), expected)
    assert identical(weights(other), second) is False
    fit([copy.deepcopy(callback)], other)
    callback.reset()
    expected = weights(other)
    fit([callback], other)
    assert identical(start_of(callback), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticNetPenalty(-0.1, 0.1), r"ElasticNetPenalty: l1 must be a number in \[0, inf\), got -0.1"),
        (lambda: ActivityPenalty(0.1, modules="ReLU", p=3), "ActivityPenalty: p must be 1 or 2, got 3"),
        (lambda: ActivityPenalty(0.1, modules=[]), r"ActivityPenalty: modules must name modules or classes, .* got nothing"),
        (
            lambda: fit([ActivityPenalty(0.1, modules="Relu")]),
            r"ActivityPenalty: no module has a name or class .* close matches: ReLU",
        ),
        (lambda: fit([ActivityPenalty(0.1, modules="ReLU")], Gan()), "ActivityPenalty adds to the loss, but in manual"),
    ],
    ids=["negative strength", "unknown p", "no modules", "unknown modules", "manual optimization"],
)
def test_bad_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_activities_of_wrong_type_raise():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = Classifier()
    model.net[0] = nn.Sequential(model.net[0], Pair())
    message = r"ActivityPenalty: 'net.0.1' \(Pair\) returns tuple, expected one float tensor; .* exclude it with '!net.0.1'"
    with pytest.raises(TypeError, match=message):
        fit([ActivityPenalty(0.1, modules="*")], model)
