"""``ParameterMonitor`` against norms that are computed by hand around each step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Classifier, Gan, Memory, fit, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing import assert_close

from lightning_reg import (
    ActivityPenalty,
    GradientNormClipping,
    L1Penalty,
    L2Penalty,
    MaxNorm,
    ParameterMonitor,
    Penalty,
    StartingPointPenalty,
    WeightDecay,
)
from lightning_reg.monitors import layout, sums
from lightning_reg.monitors.copies import Copies
from lightning_reg.monitors.layout import SMALL, Layout
from lightning_reg.monitors.watched import Watched

pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")


ROUTES = ["loss", "gradient"]


class ByHand(Callback):
    """Records what a step does."""

    def __init__(self):
        self.found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches in (1, 0):
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, p in pl_module.named_parameters():
            update = (p.detach() - self.before[name]).double().norm()
            self.found[name] = {
                "weight_norm": p.detach().norm(),
                "grad_norm": self.gradients[name].norm(),
                "update_ratio": update / self.before[name].double().norm(),
                "zeros": (p == 0).double().mean(),
            }


def monitored(callbacks, model=None, **options):
    """Train, and return the monitor's metrics after the last step."""
    if not any(isinstance(cb, ParameterMonitor) for cb in callbacks):
        callbacks = [*callbacks, ParameterMonitor(every_n_steps=1)]
    model = fit(callbacks, model, **options)
    found = {key: float(value) for key, value in model.trainer.callback_metrics.items() if "ParameterMonitor" in key}
    return found, model


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_norms_are_those_of_each_step(order):
    """The update has everything that the step did."""
    by_hand = ByHand()
    found, _ = monitored([by_hand, *[WeightDecay(0.5), MaxNorm(0.4), ParameterMonitor(every_n_steps=1)][::order]])
    for name, expected in by_hand.found.items():
        for key, value in expected.items():
            assert found[f"reg/ParameterMonitor/{name}/{key}"] == pytest.approx(float(value), rel=1e-4, abs=1e-7), (name, key)
    assert found["reg/ParameterMonitor/net.0.weight/update_ratio"] > 1e-4


def test_gradients_are_those_before_clipping():
    by_hand = ByHand()
    found, _ = monitored([GradientNormClipping(1e-3), by_hand])
    clipped = sum(float(values["grad_norm"]) ** 2 for values in by_hand.found.values()) ** 0.5
    measured = sum(value**2 for key, value in found.items() if key.endswith("/grad_norm")) ** 0.5
    assert clipped == pytest.approx(1e-3, rel=1e-2)
    assert measured > 0.1


def test_groups_are_one_vector():
    single, _ = monitored([ParameterMonitor(every_n_steps=1)])
    grouped, _ = monitored([ParameterMonitor(every_n_steps=1, groups={"first": "net.0.*", "rest": ["net.1.*", "net.4.*"]})])
    parts = [single[f"reg/ParameterMonitor/net.0.{name}/weight_norm"] for name in ("weight", "bias")]
    assert grouped["reg/ParameterMonitor/first/weight_norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5)
    assert {key.split("/")[2] for key in grouped} == {"first", "rest"}


@pytest.mark.parametrize("inject", ["loss", "gradient"])
def test_penalties_are_relative_to_the_data(inject):
    """On both routes, several penalties at once, and under accumulation."""
    shares = {}

    class Reference(Classifier):
        def on_before_optimizer_step(self, optimizer):
            images, labels = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
            training = [module.training for module in self.modules()]
            self.eval()
            loss = torch.nn.functional.cross_entropy(self.net(images), labels)
            for module, mode in zip(self.modules(), training, strict=True):
                module.training = mode
            weights = [self.net[0].weight, self.net[4].weight]
            values = [w.detach() for w in weights]
            data = torch.stack([g.detach().norm() for g in torch.autograd.grad(loss, weights)]).norm()
            squares = torch.stack([(0.3 * w).norm() for w in values]).norm()
            signs = torch.stack([(0.02 * w.sign()).norm() for w in values]).norm()
            shares.update({"L2Penalty": float(squares / data), "L1Penalty": float(signs / data)})
            self.batches = []

        def training_step(self, batch, batch_idx):
            self.batches = [*getattr(self, "batches", []), batch]
            return super().training_step(batch, batch_idx)

    model = Reference()
    model.net[3].p = 0.0
    callbacks = [L2Penalty(0.3, inject=inject), L1Penalty(0.02, inject=inject)]
    found, _ = monitored(callbacks, model, data=loader(64, 8), accumulate_grad_batches=2)
    for name, share in shares.items():
        assert found[f"reg/ParameterMonitor/{name}/relative_norm"] == pytest.approx(share, rel=1e-3)
    assert len(shares) == 2


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_penalties_of_a_step_whose_loss_lacks_them():
    """If the last accumulated batch has no loss, penalties act on the gradients, and are not part of the data's gradient."""

    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    both = {inject: monitored([L2Penalty(0.3, inject=inject)], Skips(), accumulate_grad_batches=2) for inject in ROUTES}
    (loss, model), (gradient, other) = both["loss"], both["gradient"]
    assert same(model, other)
    assert loss == pytest.approx(gradient, rel=1e-6)


def test_it_changes_nothing_beside_penalties():
    for inject in ("loss", "gradient"):

        def penalties(inject=inject):
            return [L2Penalty(0.1, inject=inject), StartingPointPenalty(0.3, inject=inject), MaxNorm(0.5)]

        assert same(fit([*penalties(), ParameterMonitor(every_n_steps=1)]), fit(penalties()))


def test_only_every_nth_step(monkeypatch):
    logger = Memory()
    copied = []
    take = Copies.take
    monkeypatch.setattr(Copies, "take", lambda copies, tensors, *rest: copied.extend(tensors) or take(copies, tensors, *rest))
    fit([ParameterMonitor(every_n_steps=3)], logger=logger, log_every_n_steps=50)
    assert list(logger.steps) == [2, 5]
    assert len(copied) == 2 * len(list(Classifier().parameters()))
    keys = set(logger.steps[2])
    assert "reg/ParameterMonitor/net.0.weight/zeros" in keys
    assert "epoch" in keys


@pytest.mark.parametrize("skipped", [(1,), (2,), (1, 2), (3,)])
def test_steps_that_a_loss_scaler_skips(skipped):
    """Nothing is reported of them, and nothing of them at the next step."""

    class Overflows(Classifier):
        def training_step(self, batch, batch_idx):
            done = self.trainer.fit_loop.epoch_loop.total_batch_idx
            return super().training_step(batch, batch_idx) * (float("inf") if done in skipped else 1.0)

    logger = Memory()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    fit([ParameterMonitor(every_n_steps=2)], Overflows(), logger=logger, log_every_n_steps=50, plugins=[precision])
    assert list(logger.steps) == [step for step in (1, 3, 5, 7) if step not in skipped]
    assert all(map(math.isfinite, (value for row in logger.steps.values() for value in row.values())))


def test_several_optimizers():
    found, _ = monitored([L2Penalty(0.1)], Gan())
    shares = {key.rpartition("/")[2] for key in found if "L2Penalty" in key}
    assert shares == {"relative_norm_0", "relative_norm_1"}
    names = {key.split("/")[2] for key in found if "zeros" in key}
    assert names == {"net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias"}


def test_activity_penalties_are_left_out_and_named(capsys):
    callbacks = [ActivityPenalty(0.1, modules="ReLU"), ParameterMonitor(every_n_steps=1)]
    fit(callbacks, enable_model_summary=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "ParameterMonitor does not measure ActivityPenalty-ReLU, because its gradient needs a separate backward pass" in printed
    )


SHAPES = [(3, 4), (7,), (3, 4), (), (0,), (SMALL,), (SMALL + 1,), (2, 3, 4), (3, 4), (1100, 1000), (), (0,), (SMALL + 1,)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def test_sums_are_those_of_each_tensor():
    """Whatever their sizes, shapes, and dtypes, and in the order of the tensors."""
    after = [torch.randn(shape).to(dtype) for shape in SHAPES for dtype in DTYPES]
    after[0][0] = 0
    after[-2].zero_()
    after += [torch.randn(2048, 1024).t(), torch.randn(400_002)[::2]]  # not contiguous, and more than one part
    before = [tensor + torch.randn_like(tensor) for tensor in after]
    copies = Copies(before)
    (old,) = copies.take(before)
    assert all(map(torch.equal, copies.views, before))
    new, change, zeros = copies.changes(after)
    squares = lambda tensors: torch.stack([tensor.double().square().sum() for tensor in tensors])  # noqa: E731
    close = {"rtol": 2e-6, "atol": 0, "check_dtype": False}  # in float32
    assert_close(old, squares(before), **close)
    assert_close(new, squares(after), **close)
    assert_close(Layout(after).squares(after), squares(after), **close)
    assert_close(zeros, torch.stack([(tensor == 0).sum() for tensor in after]), **close)
    differences = [one - two for one, two in zip(before, after, strict=True)]
    assert_close(change, squares(differences), **close)
    copies.take(before)
    assert_close(copies.distances(after), squares(differences), **close)


def test_parameters_without_dimensions():
    """Several scalars, as models have for scales and temperatures, are measured together."""

    class Scales(Classifier):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Parameter(torch.tensor(value)) for value in (2.0, 0.0))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * (self.first + self.second)

    found, _ = monitored([], Scales())
    assert found["reg/ParameterMonitor/first/weight_norm"] == 2
    assert [found[f"reg/ParameterMonitor/{name}/zeros"] for name in ("first", "second")] == [0, 1]


@pytest.mark.parametrize("constant", [True, False])
def test_sums_of_tensors_in_different_orders(constant):
    """What is in one order in the weights and in another one in the gradients, or one constant for all, is as exact."""
    weights, gradients = torch.randn(2, 500_001), torch.randn(500_001, 2).t()

    class Constants:
        constants = ([torch.zeros(()).expand(2, 500_001)],) if constant else ()

        def of_part(self, batch, norms, known, *values):
            return [norms(values[0])]

    found = Copies([weights]).take([weights], [gradients], Constants())
    expected = [[tensor.double().square().sum()] for tensor in (weights, gradients, weights)]
    assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_parameters_without_entries():
    """Several, with more than one dimension, are stacked."""
    empty = [torch.empty(0, 3), torch.empty(0, 3), torch.empty(0), torch.empty(2, 0, 4)]
    copies = Copies(empty)
    assert copies.take(empty).tolist() == [[0] * 4]
    assert copies.changes(empty).tolist() == [[0] * 4] * 3


def test_list_batches_of_devices(monkeypatch):
    """What other devices do with all tensors but small ones of one shape, on the CPU."""
    monkeypatch.setattr(layout, "is_cpu", lambda tensor: False)
    for module in (layout, sums):
        monkeypatch.setattr(module, "EXACT", 80_000)
    after = [torch.randn(shape) for shape in [(SMALL + 1,), (300, 300), (5,), (SMALL + 1,), (5,), (), (0,), (2, 3)]]
    after[1][0, :7] = 0
    after[7][1] = 0
    before = [tensor + torch.randn_like(tensor) for tensor in after]
    assert Layout(before).batches == [[0, 2, 3, 4, 5, 6, 7], [1]]
    copies = Copies(before)
    (old,) = copies.take(before)
    new, change, zeros = copies.changes(after)
    differences = [one - two for one, two in zip(before, after, strict=True)]
    for found, tensors in ((old, before), (new, after), (change, differences), (Layout(after).squares(after), after)):
        expected = torch.stack([tensor.double().square().sum() for tensor in tensors])
        assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert zeros.tolist() == [0, 7, 0, 0, 0, 0, 0, 3]
    assert Layout([torch.ones(3)] * 16 + [torch.ones(5)]).batches == [list(range(16)), [16]]


def test_halves_in_lists_of_devices(monkeypatch):
    """The number of zeros of half-precision tensors is exact too."""
    monkeypatch.setattr(layout, "is_cpu", lambda tensor: False)
    tensors = [torch.randn(SMALL + 1 + index).to(torch.bfloat16) for index in range(2)]
    tensors[1][:5] = 0
    copies = Copies(tensors)
    copies.take(tensors)
    new, change, zeros = copies.changes(tensors)
    assert_close(new, torch.stack([tensor.float().square().sum() for tensor in tensors]), rtol=1e-4, atol=0)
    assert (change.tolist(), zeros.tolist()) == ([0, 0], [0, 5])


def test_missing_and_sparse_gradients():
    """A parameter without a gradient counts as zeros; the entries of equal indices of a sparse gradient are added."""
    embedding, unused = torch.nn.Embedding(5, 2, sparse=True), torch.nn.Parameter(torch.ones(3))
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    watched = Watched([embedding.weight, unused], [["one"], ["two"]], "")
    with torch.no_grad():
        before = watched.before_step([], torch.optim.SGD([unused], lr=0.1), [])
        found = dict(zip(watched.keys, watched.after_step(before).tolist(), strict=True))
    assert found["one/grad_norm"] == pytest.approx((2 * 2**2 + 2) ** 0.5)
    assert found["two/grad_norm"] == found["two/update_ratio"] == 0


@pytest.mark.parametrize("inject", ["loss", "gradient"])
def test_monitor_of_a_part_measures_penalties_of_all(inject):
    """The norms of a penalty are over what it penalizes, also where the monitor looks only at a part of that."""
    penalties = lambda: [L2Penalty(0.3, inject=inject), L1Penalty(0.02, params="net.4.*", inject=inject)]  # noqa: E731
    whole, _ = monitored(penalties())
    part, _ = monitored([*penalties(), ParameterMonitor(every_n_steps=1, params="net.0.*", name="ParameterMonitor")])
    for name in ("L2Penalty", L1Penalty(1, params="net.4.*").name):
        key = f"reg/ParameterMonitor/{name}/relative_norm"
        assert part[key] == pytest.approx(whole[key], rel=1e-5)
        assert part[key] > 0
    assert not any("net.4.weight" in key for key in part)


class Coupled(Penalty):
    """A penalty that is no sum over tensors: the norm of all of them as one vector."""

    def value(self, params):
        return sum(p.square().sum() for p in params).sqrt()


class Squared(L2Penalty):
    """Overrides the formula of a penalty that is a sum over tensors."""

    def value(self, params):
        return 0.5 * sum(p.square().sum() for p in params) ** 2

    def add_gradient_(self, params, strength):
        Penalty.add_gradient_(self, params, strength)


class Replacing(L2Penalty):
    """Puts another tensor in the place of the gradient."""

    def add_gradient_(self, params, strength):
        for p in params:
            p.grad = p.grad + strength * p.detach()


@pytest.mark.parametrize("kind", [Coupled, Squared, Replacing])
def test_penalties_with_formulas_of_their_own(kind):
    """On the gradients: the norm of λ∇R over the penalized parameters, relative to the gradient that the data gave."""
    found = {}

    class Reference(Classifier):
        def on_after_backward(self):
            weights = [self.net[0].weight, self.net[4].weight]
            data = torch.cat([w.grad.flatten() for w in weights]).norm()
            vector = torch.cat([w.detach().flatten() for w in weights])
            own = {Coupled: vector / vector.norm(), Squared: 2 * vector * vector.square().sum(), Replacing: vector}[kind]
            found["share"] = float((0.1 * own).norm() / data)

    measured, _ = monitored([kind(0.1, inject="gradient")], Reference())
    assert measured[f"reg/ParameterMonitor/{kind.__name__}/relative_norm"] == pytest.approx(found["share"], rel=1e-4)
    assert not kind.is_sum_over_tensors()


def test_edges():
    with pytest.raises(ValueError, match="ParameterMonitor: every_n_steps must be an integer ≥ 1, got 0"):
        ParameterMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match=r"no parameter has a name that matches 'nett\.\*'"):
        fit([ParameterMonitor(groups={"one": "nett.*"})])
    with pytest.raises(TypeError, match="ParameterMonitor: groups must map names to"):
        ParameterMonitor(groups=["net.*"])
