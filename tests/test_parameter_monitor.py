"""``ParameterMonitor`` against norms that are computed by hand around each step."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, Gan, Memory, fit, loader, same
from lightning.pytorch import Callback
from torch.testing import assert_close

from lightning_reg import (
    ActivityPenalty,
    GradientNormClipping,
    L1Penalty,
    L2Penalty,
    MaxNorm,
    ParameterMonitor,
    StartingPointPenalty,
    WeightDecay,
)
from lightning_reg.monitors import parameters
from lightning_reg.monitors.measures import SMALL, copy_with_squares, squares_of_each, update_sums, update_sums_of_each

pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")


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


def test_it_changes_nothing_beside_penalties():
    for inject in ("loss", "gradient"):

        def penalties(inject=inject):
            return [L2Penalty(0.1, inject=inject), StartingPointPenalty(0.3, inject=inject), MaxNorm(0.5)]

        assert same(fit([*penalties(), ParameterMonitor(every_n_steps=1)]), fit(penalties()))


def test_only_every_nth_step(monkeypatch):
    logger = Memory()
    copies = []
    measure = lambda before, after: copies.extend(before) or update_sums_of_each(before, after)  # noqa: E731
    monkeypatch.setattr(parameters, "update_sums_of_each", measure)
    fit([ParameterMonitor(every_n_steps=3)], logger=logger, log_every_n_steps=50)
    assert list(logger.steps) == [2, 5]
    assert len(copies) == 2 * len(list(Classifier().parameters()))
    keys = set(logger.steps[2])
    assert "reg/ParameterMonitor/net.0.weight/zeros" in keys
    assert "epoch" in keys


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
        "ParameterMonitor does not measure ActivityPenalty-ReLU, because its gradient needs a backward pass of its own"
        in printed
    )


def test_tensors_that_are_measured_together():
    """As each by itself, whatever their sizes, shapes, and dtypes."""
    shapes = [(3, 4), (3, 4), (7,), (), (0,), (SMALL,), (SMALL + 1,), (2, 3, 4)]
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    after = [torch.randn(shape).to(dtype) for shape in shapes for dtype in dtypes]
    after[0][0] = 0
    before = [tensor + torch.randn_like(tensor) for tensor in after]
    expected = [torch.stack(update_sums(one.clone(), other)).float() for one, other in zip(before, after, strict=True)]
    squares = [tensor.double().square().sum() for tensor in after]
    assert_close(torch.stack([square.double() for square in squares_of_each(after)]), torch.stack(squares), rtol=1e-5, atol=0)
    copies = [torch.empty_like(tensor) for tensor in before]
    assert_close(
        [square.double() for square in copy_with_squares(copies, before)],
        [one.double().square().sum() for one in before],
        rtol=1e-5,
        atol=0,
    )
    assert all(map(torch.equal, copies, before))
    found = update_sums_of_each(before, after)
    assert_close(torch.stack([row.float() for row in found]), torch.stack(expected), rtol=1e-5, atol=0)


def test_edges():
    assert [float(total) for total in update_sums(torch.zeros(0), torch.zeros(0))] == [0.0] * 3
    with pytest.raises(ValueError, match="ParameterMonitor: every_n_steps must be an integer ≥ 1, got 0"):
        ParameterMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match=r"no parameter has a name that matches 'nett\.\*'"):
        fit([ParameterMonitor(groups={"one": "nett.*"})])
    with pytest.raises(TypeError, match="ParameterMonitor: groups must map names to"):
        ParameterMonitor(groups=["net.*"])
