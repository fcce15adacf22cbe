from __future__ import annotations

import re
import warnings

import pytest
import torch
from helpers import Classifier, fit, loader, same
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_reg import DropoutInjection, DropoutScheduler, Linear, Steps
from lightning_reg.functional import dropout, inject_dropout


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_mean_and_variance(p, channelwise):
    """All three are within four standard errors, which one sample in 16,000 misses."""
    torch.manual_seed(0)
    draws = dropout(torch.ones(100, 1000, dtype=torch.float64), p, channelwise).flatten()
    n = draws.numel()
    assert set(draws.tolist()) == {0.0, 1 / (1 - p)}
    assert abs((draws == 0).double().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    variance = p / (1 - p)
    assert abs(draws.mean() - 1) < 4 * (variance / n) ** 0.5
    fourth = (1 - p) * (p / (1 - p)) ** 4 + p
    assert abs(draws.var() - variance) < 4 * ((fourth - variance**2) / n) ** 0.5 + 1e-4


def test_channelwise_drops_whole_channels():
    torch.manual_seed(0)
    kept = dropout(torch.ones(8, 16, 5, 5), 0.5, channelwise=True).flatten(2)
    assert set(kept.sum(2).flatten().tolist()) == {0.0, 50.0}
    mixed = dropout(torch.ones(8, 16, 5, 5), 0.5).flatten(2).sum(2)
    assert len(set(mixed.flatten().tolist())) > 2


def test_dropout_equals_torch():
    x = torch.randn(20, 30)
    torch.manual_seed(1)
    ours = dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(ours, nn.functional.dropout(x, 0.3))
    assert dropout(x, 0.0) is x


class Plain(Classifier):
    """A model without dropout."""

    def __init__(self):
        super().__init__()
        self.net[3].p = 0.0


def test_injected_dropout_equals_layer():
    """Bit-identical, and the state-dict keys are those of the plain model."""
    injected = fit([DropoutInjection(0.3, after="net.2")], Plain())
    layer = Plain()
    layer.net[3].p = 0.3
    assert same(injected, fit(model=layer))
    assert list(injected.state_dict()) == list(Plain().state_dict())
    assert not any(module._forward_hooks for module in injected.modules())


def test_no_dropout_in_validation():
    class Validates(Plain):
        def val_dataloader(self):
            return loader()

        def validation_step(self, batch, batch_idx):
            outputs = [self.net(batch[0]) for _ in range(2)]
            self.equal = torch.equal(*outputs)

    assert fit([DropoutInjection(0.5, after="ReLU")], Validates()).equal


def test_injected_dropout_is_off_in_eval_mode():
    layer = nn.Linear(4, 4)
    x = torch.ones(2, 4)
    before = layer(x)
    handles = inject_dropout({"layer": layer}, 0.9)
    assert torch.equal(layer.eval()(x), before)
    layer.train()
    assert not torch.equal(layer(x), before)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(x), before)


def rates(callback, model=None, **kwargs):
    """Return the rate of the model's dropout layer in each training batch."""
    seen = []
    model = model or Classifier()
    layer = model.net[3]
    layer.register_forward_hook(lambda module, args, output: seen.append(module.p))
    fit([callback], model, **kwargs)
    assert layer.p == 0.1  # restored
    return seen


def test_scheduler_sets_and_restores_rate():
    assert rates(DropoutScheduler(0.4), max_epochs=1) == [0.4] * 4
    assert rates(DropoutScheduler(Linear(0.0, 0.8)), max_epochs=1) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert rates(DropoutScheduler(Steps([0.5, 0.0], at=["1ep"])), max_epochs=2) == [0.5] * 4 + [0.0] * 4
    assert rates(DropoutScheduler(Steps([0.5, 0.0], at=["3st"])), max_epochs=1) == [0.5] * 3 + [0.0]


def test_rate_is_constant_within_step():
    seen = rates(DropoutScheduler(Linear(0.0, 0.8)), max_epochs=1, accumulate_grad_batches=2)
    assert seen == pytest.approx([0.0, 0.0, 0.4, 0.4])


def test_rate_is_restored_after_exception():
    class Fails(Classifier):
        def on_train_epoch_end(self):
            raise RuntimeError("stop")

    model = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        fit([DropoutScheduler(0.4), DropoutInjection(0.3, after="ReLU")], model)
    assert model.net[3].p == 0.1
    assert not any(module._forward_hooks for module in model.modules())


def test_scheduler_supports_dropout_variants():
    class Variants(Classifier):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Sequential(nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.2), nn.Dropout1d(0.3))

        def training_step(self, batch, batch_idx):
            self.seen = [module.p for module in self.net[3]]
            return super().training_step(batch, batch_idx)

    model = fit([DropoutScheduler(0.05, modules="net.3.*")], Variants())
    assert model.seen == [0.05] * 3
    assert [module.p for module in model.net[3]] == [0.1, 0.2, 0.3]


def test_scheduler_without_dropout_suggests_injection():
    model = Classifier()
    model.net[3] = nn.Identity()
    with pytest.raises(ValueError, match=r"DropoutScheduler: the model has no dropout to schedule; .* use DropoutInjection"):
        fit([DropoutScheduler(0.1)], model)


def test_modules_in_eval_mode_warn():
    model = Classifier()
    model.net[2].eval()
    model.net[3].eval()
    with pytest.warns(UserWarning, match="eval mode") as caught:  # includes Lightning's own, less specific warning
        fit([DropoutInjection(0.1, after="ReLU"), DropoutScheduler(0.1)], model)
    messages = " ".join(str(warning.message) for warning in caught)
    assert re.search(r"DropoutInjection-ReLU: net.2 will not drop anything, .* call model.train\(\)", messages)
    assert re.search(r"DropoutScheduler: net.3, net.2 will not drop anything, .* call model.train\(\)", messages)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Recurrent(Classifier):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.rnn = nn.GRU(8, 64, batch_first=True)
        self.ids = nn.Identity()

    def training_step(self, batch, batch_idx):
        self.ids(batch[1])
        self.pair(batch[0])
        states, _ = self.rnn(batch[0].view(-1, 8, 8))
        return super().training_step((states[:, -1], batch[1]), batch_idx)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            DropoutInjection(0.1, after="pair"),
            r"cannot apply dropout to the output of 'pair' \(Pair\): it returns tuple, expected one float tensor; "
            "select a module inside it, or exclude it with '!pair'",
        ),
        (
            DropoutInjection(0.1, after="ids"),
            r"cannot apply dropout to the output of 'ids' \(Identity\): it returns a tensor of torch.int64, expected a float "
            "tensor; exclude it with '!ids'",
        ),
    ],
)
def test_unsupported_outputs_raise(callback, message):
    with pytest.raises(TypeError, match=message):
        fit([callback], Recurrent())


def test_channelwise_without_channels_raises():
    layer = nn.Identity()
    inject_dropout({"layer": layer}, 0.5, channelwise=True)
    with pytest.raises(TypeError, match=r"'layer' \(Identity\): channels are in dimension 1, but the output has shape \(3,\)"):
        layer(torch.ones(3))


class HeadFirst(nn.Module):
    """Defines its output layer, and what follows it, before the layers that it calls first."""

    def __init__(self, last=None):
        super().__init__()
        self.head = nn.Linear(16, 10)
        self.last = nn.Identity() if last is None else last
        self.body = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x):
        return self.last(self.head(self.body(x))).squeeze(-1)


class TwoHeads(nn.Module):
    """Returns the outputs of two layers by name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 16)
        self.one, self.two = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        hidden = self.body(x).relu()
        return {"one": self.one(hidden), "others": [self.two(hidden)]}


class Wrapped(Classifier):
    """Trains a network of any kind, in its forward pass or directly, with a metric beside it."""

    def __init__(self, network, calls_itself):
        super().__init__()
        self.net, self.scale, self.calls_itself = network, nn.Identity(), calls_itself

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0]) if self.calls_itself else self.net(batch[0])
        return sum(leaf.square().mean() for leaf in tree_leaves(outputs))


def modules_named(caught):
    return [re.search("after (.*), whose output the model returns", str(w.message)).group(1) for w in caught]


@pytest.mark.parametrize("calls_itself", [True, False], ids=["self(x)", "self.net(x)"])
@pytest.mark.parametrize(
    ("network", "names"),
    [
        (HeadFirst, ["net.head, net.last"]),
        (lambda: HeadFirst(nn.Softmax(-1)), ["net.head, net.last"]),
        (lambda: HeadFirst(nn.ReLU(inplace=True)), ["net.head, net.last"]),
        (TwoHeads, ["net.one"]),
        (lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), []),
        (lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10), nn.Softmax(-1), nn.Identity()), []),
    ],
    ids=["head first", "softmax first", "relu first", "two heads", "head last", "softmax last"],
)
def test_a_star_that_reaches_an_output_is_warned_of_once(network, names, calls_itself):
    model = Wrapped(network(), calls_itself)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([DropoutInjection(0.1, after="*")], model)
    found = [w for w in caught if "whose output the model returns" in str(w.message)]
    assert modules_named(found) == names
    assert not any(module._forward_hooks for module in model.modules())
    excluded = ["!" + name for name in ", ".join(names).split(", ") if name]
    if excluded:
        assert f"exclude it, as in after={['*', *excluded]}" in str(found[0].message)
    fit([DropoutInjection(0.1, after=["*", *excluded])], model)  # a warning is an error


def test_an_output_that_is_named_is_dropped_without_a_warning():
    fit([DropoutInjection(0.1, after=["net.head", "ReLU"])], Wrapped(HeadFirst(), calls_itself=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropoutInjection(1.5, after="ReLU"), r"DropoutInjection: p must be a number in \[0, 1\], got 1.5"),
        (lambda: DropoutScheduler(-0.1), r"DropoutScheduler: p must be a number in \[0, 1\], got -0.1"),
        (
            lambda: DropoutScheduler(Linear(0.0, 2.0)),
            r"DropoutScheduler: p=Linear\(0.0, 2.0\) must be a number in \[0, 1\], got 2.0",
        ),
        (lambda: DropoutInjection(0.1, after=[]), r"DropoutInjection: after must name modules or classes, .* got nothing"),
        (
            lambda: fit([DropoutInjection(0.1, after="Relu")]),
            "DropoutInjection: no module has a name or class that matches 'Relu'",
        ),
        (
            lambda: fit([DropoutScheduler(0.1, modules="nett.*")]),
            r"DropoutScheduler: no module with dropout has a name or class that matches 'nett.\*'; close matches: net.3",
        ),
    ],
    ids=["rate above 1", "negative rate", "schedule above 1", "no modules", "unknown modules", "no dropout"],
)
def test_bad_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
