"""Modules that are saved, copied, or compiled for export in the middle of a fit are plain modules of torch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import QUIET, Classifier, fit, loader, same, traces
from lightning.pytorch import Callback, Trainer
from processes import run_script
from table import every_callback, everything, model
from torch import nn
from torch.testing import assert_close

from lightning_reg import ActivityPenalty, DropoutInjection, DropoutScheduler, Linear, MonteCarloDropout
from lightning_reg.dropout.rates import Rate

X = torch.linspace(0.0, 1.0, 4 * 64).view(4, 64)


def saved(module):
    """Return a module as ``torch.save`` writes it."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=False)


class InMidFit(Callback):
    """Calls a function with the model after the second batch of a fit, and before the first one."""

    def __init__(self, function):
        self.function, self.results = function, []

    def on_train_start(self, trainer, pl_module):
        self.results.append(self.function(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.results.append(self.function(pl_module))


def in_mid_fit(callbacks, function, classifier):
    """Return what a function returns in mid-fit; the fit must not notice it."""
    callback = InMidFit(function)
    plain = copy.deepcopy(classifier)
    assert same(fit([*callbacks(), callback], classifier, max_epochs=1), fit(callbacks(), plain, max_epochs=1))
    return callback.results


@every_callback
def test_copies_in_mid_fit_are_plain(row):
    """They have no hooks, the original classes and rates, and nothing of this package."""
    plain = traces(model(row).net)

    def check(pl_module):
        whole = [] if "validates" in row.options else [pl_module]  # the class of which cannot be pickled
        for module in (pl_module.net, *whole):
            data = saved(module)
            assert b"lightning_reg" not in data
            for made in (copy.deepcopy(module), loaded(data)):
                net = made if module is pl_module.net else made.net
                assert traces(net) == plain
                assert not any(hooks for key, hooks in vars(made).items() if key.endswith("_hooks"))
                assert same(net, pl_module.net)

    in_mid_fit(lambda: [row.active()], check, model(row))


LOAD = """
import sys
import torch
assert not any(name.startswith("lightning") for name in sys.modules)
sys.modules["lightning_reg"] = sys.modules["lightning"] = None
net = torch.load(sys.argv[1], weights_only=False)
x = torch.load(sys.argv[2])
torch.manual_seed(0)
print(net.train()(x).sum().item(), net.eval()(x).sum().item())
"""


@pytest.mark.slow
def test_saved_module_loads_without_the_package(tmp_path):
    """With every callback at once, it computes what the plain model with its weights does."""
    data = in_mid_fit(everything, lambda pl_module: saved(pl_module.net), Classifier())[-1]
    (tmp_path / "net.pt").write_bytes(data)
    torch.save(X, tmp_path / "x.pt")
    printed = run_script("-c", LOAD, str(tmp_path / "net.pt"), str(tmp_path / "x.pt"))
    plain = Classifier().net
    plain.load_state_dict(loaded(data).state_dict())
    torch.manual_seed(0)
    expected = [plain.train()(X).sum().item(), plain.eval()(X).sum().item()]
    assert list(map(float, printed.split())) == pytest.approx(expected)


class CustomCopies(nn.Module):
    """A module that defines itself what a copy contains."""

    def __init__(self):
        super().__init__()
        self.cache = [1]

    def __getstate__(self):
        return {**vars(self), "cache": []}

    def forward(self, x):
        return x


def test_modules_that_define_their_copies():
    classifier = Classifier()
    classifier.net[2] = CustomCopies()
    results = in_mid_fit(
        lambda: [DropoutInjection(0.5, after="CustomCopies")],
        lambda pl_module: (copy.deepcopy(pl_module.net[2]), loaded(saved(pl_module.net[2]))),
        classifier,
    )
    for made in results[-1]:
        assert type(made) is CustomCopies
        assert (made.cache, len(made._forward_hooks)) == ([], 0)


class Dropouts(Classifier):
    """A network with every dropout module of torch."""

    def __init__(self):
        super().__init__()
        view = nn.Unflatten(1, (16, 1, 1))
        drops = [nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1), nn.Dropout1d(0.1)]
        inner = [nn.Unflatten(1, (16, 1)), nn.Dropout1d(0.1), nn.Flatten(), view, nn.Dropout2d(0.1), nn.Flatten()]
        volume = [nn.Unflatten(1, (4, 2, 2, 1)), nn.Dropout3d(0.1), nn.Flatten()]
        self.net = nn.Sequential(*self.net[:3], *drops[:3], *inner, *volume, self.net[4])


EXPORTS = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, X),
    "export": lambda module: torch.export.export(module, (X,)).module(),
    "fx": torch.fx.symbolic_trace,
    "quantize": lambda module: torch.ao.quantization.quantize_dynamic(module, set(), inplace=False),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates most of these
@pytest.mark.parametrize("name", EXPORTS)
def test_driven_dropout_is_exported(name):
    """The result computes what the module does in eval mode."""

    def check(pl_module):
        net = pl_module.net.eval()
        expected = net(X)
        exported = EXPORTS[name](net)
        assert_close(exported(X), net.eval()(X))
        assert_close(exported(X), expected)
        net.train()

    kind = Dropouts if name != "fx" else Classifier
    in_mid_fit(lambda: [DropoutScheduler(Linear(0.1, 0.5))], check, kind())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("callback", [DropoutInjection(0.5, after="ReLU"), ActivityPenalty(0.1, modules="ReLU")])
def test_hooks_are_exported_or_say_what_to_do(callback):
    def check(pl_module):
        with pytest.raises(AttributeError, match=r"compile a copy, .* torch.jit.script\(copy.deepcopy\(model\)\)"):
            torch.jit.script(pl_module.net)
        assert_close(torch.jit.script(copy.deepcopy(pl_module.net)).eval()(X), pl_module.net.eval()(X))
        for name in ("trace", "export", "quantize"):
            assert_close(EXPORTS[name](pl_module.net)(X), pl_module.net(X))
        pl_module.net.train()

    in_mid_fit(lambda: [copy.deepcopy(callback)], check, Classifier())


@pytest.mark.filterwarnings("ignore")
def test_scripted_module_drops_at_the_rate_in_force():
    def check(pl_module):
        return torch.jit.script(pl_module.net[3])(torch.ones(10_000)).count_nonzero().item() / 10_000

    rates = in_mid_fit(lambda: [DropoutScheduler(Linear(0.8, 0.0))], check, Classifier())
    assert rates == pytest.approx([0.9, 0.4], abs=0.03)  # its own before the first batch, then that of the second


def test_an_exported_program_keeps_its_rate():
    """It is independent of the fit that goes on."""

    def check(pl_module):
        return torch.export.export(pl_module.net[3], (torch.ones(10_000),))

    programs = in_mid_fit(lambda: [DropoutScheduler(Linear(0.8, 0.0))], check, Classifier())
    assert [program.constants for program in programs] == [{}, {}]
    assert Rate(0.5).p == 0.5


class InPredictions(Callback):
    """Copies and saves the network before the first predicted batch, and after each."""

    def __init__(self):
        self.copies = []

    def on_predict_start(self, trainer, pl_module):
        data = saved(pl_module.net)
        assert b"lightning_reg" not in data
        self.copies += [copy.deepcopy(pl_module.net), loaded(data)]

    def on_predict_batch_end(self, trainer, pl_module, *args):
        self.on_predict_start(trainer, pl_module)


class Predicts(Classifier):
    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


def test_copies_in_predictions_need_no_package():
    """``MonteCarloDropout`` watches the first batch, by hooks that do nothing in copies."""
    probe, trained = InPredictions(), Predicts()
    callbacks = [MonteCarloDropout(2), DropoutInjection(0.3, after="ReLU"), probe]
    Trainer(**QUIET, inference_mode=False, callbacks=callbacks).predict(trained, loader())
    assert len(probe.copies) == 10
    for made in probe.copies:
        assert_close(made.eval()(X), trained.net.eval()(X))
