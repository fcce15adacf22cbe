"""The activity penalty in compiled models, and under activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from helpers import QUIET, Classifier, fit, loader, same, weights
from lightning.pytorch import Trainer
from table import ROWS
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_reg import ActivityPenalty, DropoutInjection, Linear

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own access

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Plain(Classifier):
    """The model without dropout, whose masks would differ in compiled code."""

    def __init__(self):
        super().__init__()
        self.net[3].p = 0.0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


class CompiledForward(Plain):
    forward = torch.compile(Plain.forward, backend=BACKEND)


class CompiledStep(Plain):
    training_step = torch.compile(Plain.training_step, backend=BACKEND)


class CompiledSequential(nn.Sequential):
    forward = torch.compile(nn.Sequential.forward, backend=BACKEND)


def compiled_part():
    model = Plain()
    model.net = torch.compile(model.net, backend=BACKEND)
    return model


def compiled_in_place():
    model = Plain()
    model.net.compile(backend=BACKEND)
    return model


def compiled_submodule():
    model = Plain()
    model.net[2] = torch.compile(model.net[2], backend=BACKEND)
    return model


def part_of_compiled_class():
    model = Plain()
    model.net = CompiledSequential(*model.net)
    return model


COMPILED = [
    CompiledForward,
    CompiledStep,
    compiled_part,
    compiled_in_place,
    compiled_submodule,
    part_of_compiled_class,
    lambda: torch.compile(Plain(), backend=BACKEND),
]
NAMES = ["forward of class", "step of class", "part", "in place", "submodule", "class of part", "whole model"]


def trained(model, *callbacks):
    """Train one epoch and return the weights, by their names in the plain model."""
    Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks)).fit(model, loader())
    return {name.replace("_orig_mod.", ""): p for name, p in weights(model).items()}


@pytest.mark.parametrize("ran_before", [True, False], ids=["ran", "new"])
@pytest.mark.parametrize("make", COMPILED, ids=NAMES)
def test_compiled_model_is_penalized(make, ran_before):
    """The graph of a model that ran before the fit has no penalty, and that of the first fit another one."""
    model = make()
    if ran_before:
        model.training_step(next(iter(loader())), 0)
    start = weights(model)
    for callbacks in (
        lambda: [ActivityPenalty(0.1, modules="ReLU")],
        lambda: [ActivityPenalty(Linear(0.0, 0.3), modules="ReLU", p=2), DropoutInjection(0.0, after="ReLU")],
        list,
    ):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        expected = trained(Plain(), *callbacks())
        assert_close(trained(model, *callbacks()), expected, rtol=1e-5, atol=1e-7)
        unpenalized = trained(Plain())
        assert callbacks is list or not torch.allclose(expected["net.0.weight"], unpenalized["net.0.weight"], atol=1e-3)


class Checkpointed(Plain):
    """The model, whose hidden part does not keep its activations."""

    reentrant = False

    def forward(self, x):
        return self.net[3:](checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class Teacher(Checkpointed):
    """A checkpointed model that also runs without gradients, as for pseudo-labels."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Checkpointed, Teacher])
def test_checkpointed_model_is_penalized(kind):
    callback = ROWS["ActivityPenalty"].active
    assert same(fit([callback()], kind()), fit([callback()], Plain()))
    assert not same(fit([callback()], kind()), fit(model=kind()))


def test_line_search_ignores_recomputed_activations():
    class Searches:
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    class Kept(Searches, Plain):
        pass

    class Recomputed(Searches, Checkpointed):
        pass

    callback = ROWS["ActivityPenalty"].active
    assert same(fit([callback()], Recomputed()), fit([callback()], Kept()))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_reentrant_checkpointing_raises(is_compiled):
    model = Reentrant()
    if is_compiled:
        model.training_step = torch.compile(model.training_step, backend=BACKEND)
    message = r"ActivityPenalty-ReLU: 'net.2' \(ReLU\) runs under activation checkpointing with use_reentrant=True"
    with pytest.raises(RuntimeError, match=message):
        fit([ActivityPenalty(0.1, modules="ReLU")], model)
    fit([ActivityPenalty(0.1, modules="net.4")], Reentrant())
    fit([ActivityPenalty(0.0, modules="ReLU")], Reentrant())
