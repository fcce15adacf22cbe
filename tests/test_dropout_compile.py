"""Dropout under ``torch.compile``: one graph for all rates, also if the model was compiled and run before the fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import QUIET, Classifier, digits, fit, same
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import DropoutInjection, DropoutScheduler, Linear, Steps
from lightning_reg.functional import Rate, alpha_dropout, dropout, find_dropout, inject_dropout

RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # twelve


@pytest.fixture(autouse=True)
def _reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twelve_batches():
    return DataLoader(TensorDataset(*digits(192)), batch_size=16)


class Body(nn.Module):
    """Only dropout, so that the output shows what was dropped."""

    def __init__(self, p):
        super().__init__()
        self.marker, self.dropout = nn.Identity(), nn.Dropout(p)

    def forward(self, x):
        return self.dropout(self.marker(x))


class RecordsZeros(Classifier):
    """A model that records the fraction of zeros in the output of its compiled part."""

    def __init__(self, counter, p=0.5, how="compile"):
        super().__init__()
        self.net[3].p = 0.0
        self.body = Body(p)
        if how == "in place":
            self.body.compile(backend=counter)
        elif how == "compile":
            self.body = torch.compile(self.body, backend=counter)
        self.fractions = []

    def training_step(self, batch, batch_idx):
        dropped = self.body(torch.ones(100, 64))
        self.fractions.append((dropped == 0).float().mean().item())
        return super().training_step((batch[0] * dropped[: len(batch[0])], batch[1]), batch_idx)


def match_rates(fractions, rates, n=6400):
    """Return whether each fraction is within five standard errors of its rate, which one run in 100,000 misses."""
    return all(abs(s - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-9 for s, p in zip(fractions, rates, strict=True))


class Rises:
    """Twelve rates, one per batch."""

    def __call__(self, progress):
        return RATES[round(progress * 12)]

    __name__ = "rises"


each_callback = pytest.mark.parametrize(
    ("callback", "own"),
    [
        (lambda: DropoutScheduler(Rises(), modules="body.*"), 0.5),
        (lambda: DropoutInjection(Rises(), after="body.marker"), 0.0),
    ],
    ids=["scheduled", "injected"],
)


@each_callback
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("how", ["compile", "in place"])
def test_all_rates_share_one_graph(callback, own, backend, how):
    counter = CompileCounterWithBackend(backend)
    model = fit([callback()], RecordsZeros(counter, own, how), twelve_batches(), max_epochs=1)
    assert counter.frame_count == 1
    assert match_rates(model.fractions, RATES)
    assert not match_rates(model.fractions[1:], RATES[:-1])  # detects a shift by one batch


@each_callback
def test_fit_after_compiled_run_adds_one_graph(callback, own):
    """A second fit reuses the graph of the first."""
    counter = CompileCounterWithBackend("aot_eager")
    model = RecordsZeros(counter, own)
    plain = model.body(torch.ones(100, 64))
    assert counter.frame_count == 1
    for graphs in (2, 2):
        model.fractions.clear()
        fit([callback()], model, twelve_batches(), max_epochs=1)
        assert match_rates(model.fractions, RATES)
        assert counter.frame_count == graphs
    after = model.body(torch.ones(100, 64))
    assert match_rates([(after == 0).float().mean().item()], [own])
    assert plain.shape == after.shape
    assert counter.frame_count == 2


def graphs_after_compiled_module(rate, ran_before):
    """Return how many graphs dropout after a compiled module needs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = RecordsZeros(counter, 0.0)
    if ran_before:
        model.body(torch.ones(100, 64))
    fit([DropoutInjection(rate, after="body")], model, twelve_batches(), max_epochs=1)
    assert match_rates(model.fractions, RATES if rate != 0.5 else [0.5] * 12)
    return counter.frame_count


@pytest.mark.parametrize("ran_before", [False, True])
def test_dropout_after_compiled_module(ran_before):
    assert graphs_after_compiled_module(Rises(), ran_before) == graphs_after_compiled_module(0.5, ran_before)


def test_compiled_module_ignores_plain_hook():
    """The negative control: it shows why a fit replaces the class of a module with dropout."""
    counter = CompileCounterWithBackend("eager")
    model = RecordsZeros(counter, 0.0)
    model.body(torch.ones(100, 64))
    handle = model.body._orig_mod.marker.register_forward_hook(lambda module, args, output: dropout(output, 0.5))
    assert model.body(torch.ones(100, 64)).all()
    handle.remove()
    (injected,) = inject_dropout({"marker": model.body._orig_mod.marker}, 0.5)
    assert not model.body(torch.ones(100, 64)).all()
    injected.remove()
    assert model.body(torch.ones(100, 64)).all()


def test_setting_rate_directly_recompiles():
    counter = CompileCounterWithBackend("eager")
    model = RecordsZeros(counter)
    for p in RATES[1:8]:
        model.body.dropout.p = p
        model.body(torch.ones(2, 2))
    assert counter.frame_count == 7


class OneGraph(Classifier):
    """A model that compiles to one graph."""

    def on_train_batch_start(self, batch, batch_idx):
        pass


class SetsRate(Callback):
    """A naive scheduler."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[3].p = RATES[batch_idx]


def graphs_of(callback):
    """Return how many graphs a fit of a compiled LightningModule needs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(OneGraph(), backend=counter)
    Trainer(**QUIET, max_epochs=1, callbacks=[callback]).fit(model, twelve_batches())
    return counter.frame_count


@pytest.mark.filterwarnings("ignore:.*")  # dynamo warns about Lightning's own code
def test_compiled_lightning_module_needs_no_extra_graphs():
    graphs = graphs_of(DropoutScheduler(0.3))
    assert graphs_of(DropoutScheduler(Rises())) == graphs > 0
    assert graphs_of(DropoutInjection(Rises(), after="ReLU")) == graphs_of(DropoutInjection(0.3, after="ReLU"))
    assert graphs_of(SetsRate()) > graphs


def test_depth_profile_needs_one_graph():
    counter = CompileCounterWithBackend("eager")

    class Deep(RecordsZeros):
        def __init__(self):
            super().__init__(counter, how="not")
            self.body = torch.compile(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1)), backend=counter)

    profile = {"body.0": Linear(0.0, 1.0), "body.1": Linear(0.6, 0.0)}
    model = fit([DropoutScheduler(profile)], Deep(), twelve_batches(), max_epochs=1)
    assert counter.frame_count == 1
    combined = [1 - (1 - batch / 12) * (1 - 0.6 * (1 - batch / 12)) for batch in range(12)]
    assert match_rates(model.fractions, combined)


class Attention(RecordsZeros):
    def __init__(self):
        super().__init__(None, how="not")
        self.attention = torch.compile(nn.MultiheadAttention(8, 2, dropout=0.1), backend="eager")


@pytest.mark.parametrize(("schedule", "warns"), [(Linear(0.0, 0.5), True), (0.3, False)])
def test_rates_that_recompile_warn(schedule, warns, recwarn):
    fit([DropoutScheduler(schedule)], Attention())
    messages = [str(w.message) for w in recwarn if "recompiles the model" in str(w.message)]
    assert bool(messages) is warns
    assert all("MultiheadAttention 0.1: attention: torch recompiles" in message for message in messages)


def test_copies_during_fit_are_plain_modules():
    copies = []

    class Copies(Classifier):
        def training_step(self, batch, batch_idx):
            copies.extend([copy.deepcopy(self.net), pickle.loads(pickle.dumps(self.net))])
            assert type(self.net[3]) is not nn.Dropout
            assert isinstance(self.net[3], nn.Dropout)
            return super().training_step(batch, batch_idx)

    model = fit([DropoutScheduler(0.4), DropoutInjection(0.3, after=["ReLU", "net.3"])], Copies())
    for copied in copies:
        assert [type(layer) for layer in copied] == [type(layer) for layer in Classifier().net]
        assert copied[3].p == 0.1
        assert vars(copied[3]).keys() == vars(nn.Dropout()).keys()
        copied.train()
        torch.manual_seed(0)
        output = copied(torch.ones(4, 64))
        torch.manual_seed(0)
        plain = Classifier().net
        plain.load_state_dict(copied.state_dict())
        assert torch.equal(output, plain(torch.ones(4, 64)))
    assert model.net[3].p == 0.1


DROPS = {
    nn.Dropout: (lambda x, p: dropout(x, p), (200, 500)),
    nn.Dropout1d: (lambda x, p: dropout(x, p, True), (200, 500, 2)),
    nn.Dropout2d: (lambda x, p: dropout(x, p, True), (200, 500, 2, 1)),
    nn.Dropout3d: (lambda x, p: dropout(x, p, True), (200, 500, 2, 1, 1)),
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("kind", DROPS)
def test_compiled_dropout_rate_mean_and_variance(kind, backend):
    """All three are within five standard errors, which one value in 1.7 million misses."""
    torch.manual_seed(0)
    layer, rate = kind(0.5), Rate(0.5)
    (site,) = find_dropout(layer)
    site.use(rate)
    compiled = torch.compile(layer, backend=backend)
    x = torch.ones(DROPS[kind][1])
    for p in (0.02, 0.3, 0.9):
        rate.set(p)
        draws = compiled(x).flatten(2).double() if x.ndim > 2 else compiled(x).double()
        if x.ndim > 2:
            assert (draws == draws[..., :1]).all()  # whole channels
            draws = draws[..., 0]
        n, variance = draws.numel(), p / (1 - p)
        assert draws.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-6)
        assert abs((draws == 0).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
        if p > 0.1:
            assert abs((draws == 0).double().mean() - 1.05 * p) > 5 * (p * (1 - p) / n) ** 0.5  # detects a 5% error
        assert abs(draws.mean() - 1) < 5 * (variance / n) ** 0.5
        fourth = (1 - p) * (p / (1 - p)) ** 4 + p
        assert abs(draws.var() - variance) < 5 * ((fourth - variance**2) / n) ** 0.5 + 1e-4
    site.restore()


@pytest.mark.parametrize(("kind", "shape"), [(nn.AlphaDropout, (400, 500)), (nn.FeatureAlphaDropout, (400, 500, 1))])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_alpha_dropout_keeps_mean_variance_and_values(kind, shape, p):
    """Kept and replacement values match torch's kernel; mean and variance are within five standard errors."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    channelwise = kind is nn.FeatureAlphaDropout
    ours, theirs = alpha_dropout(x, torch.tensor(p), channelwise).flatten(), kind(p)(x).flatten()
    x = x.flatten()
    n = x.numel()

    def parts(y):
        constant = y.mode().values  # the replacement value
        replaced = y == constant
        slope = (y - constant)[~replaced]
        return constant, replaced.double().mean(), slope, x[~replaced]

    (at, fraction, _, _), (at_theirs, _, _, _) = parts(ours), parts(theirs)
    assert_close(at, at_theirs, rtol=1e-6, atol=1e-6)
    assert abs(fraction - p) < 5 * (p * (1 - p) / n) ** 0.5
    both = (ours != at) & (theirs != at_theirs)
    assert_close(ours[both], theirs[both], rtol=1e-5, atol=1e-6)
    assert abs(ours.mean()) < 5 / n**0.5
    assert abs(ours.var() - 1) < 5 * ((ours**4).mean().item() / n) ** 0.5


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_rates_0_and_1_match_torch(kind):
    x = torch.randn(6, 5, 4)
    for p in (0.0, 1.0):
        layer = kind(p)
        results = []
        for replaced in (False, True):
            leaf = x.clone().requires_grad_()
            if replaced:
                (site,) = find_dropout(layer)
                site.use(Rate(p))
            y = torch.compile(layer, backend="aot_eager")(leaf) if replaced else layer(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        for theirs, ours in zip(*results, strict=True):
            assert_close(ours, theirs)


def test_half_precision_does_not_round_rate():
    """A bfloat16 draw has 256 values, so p = 0.001 would drop one entry in 256."""
    torch.manual_seed(0)
    n, p = 1_000_000, 0.001
    fraction = (dropout(torch.ones(n, dtype=torch.bfloat16), torch.tensor(p)) == 0).double().mean()
    assert abs(fraction - p) < 5 * (p * (1 - p) / n) ** 0.5
    rounded = (torch.rand(n, dtype=torch.bfloat16) < p).double().mean()
    assert abs(rounded - p) > 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("p", [0.3, torch.tensor(0.3)])
def test_samplewise_drops_whole_samples(p):
    torch.manual_seed(0)
    kept = dropout(torch.ones(5000, 3, 2), p, samplewise=True).flatten(1)
    assert (kept == kept[:, :1]).all()
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs((kept[:, 0] == 0).double().mean() - 0.3) < 5 * (0.21 / 5000) ** 0.5


@pytest.mark.parametrize(("kind", "shape"), [(nn.Dropout1d, (500, 3)), (nn.Dropout3d, (500, 3, 2, 2))])
def test_unbatched_input_has_channels_first(kind, shape):
    layer = kind(0.5)
    (site,) = find_dropout(layer)
    site.use(Rate(0.5))
    y = torch.compile(layer, backend="eager")(torch.ones(shape)).flatten(1)
    assert (y == y[:, :1]).all()
    assert 200 < (y[:, 0] == 0).sum() < 300


def test_in_place_dropout_stays_in_place():
    layer = nn.Dropout(0.5, inplace=True)
    (site,) = find_dropout(layer)
    site.use(Rate(0.5))
    x = torch.ones(100)
    y = torch.compile(layer, backend="aot_eager")(x)
    assert torch.equal(x, y)
    assert not x.all()


def test_subclass_keeps_its_own_forward():
    class Doubles(nn.Dropout):
        def forward(self, x):
            return x * 2

    layer = Doubles(0.5)
    (site,) = find_dropout(layer)
    site.use(Rate(1.0))
    assert torch.equal(torch.compile(layer, backend="eager")(torch.ones(3)), torch.full((3,), 2.0))


def test_eager_scheduler_equals_torch_dropout():
    """Bit-identical: the masks are those of nn.Dropout."""
    plain = Classifier()
    plain.net[3].p = 0.4
    assert same(fit([DropoutScheduler(Steps([0.4, 0.4], at=[0.5]))]), fit(model=plain))


KINDS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]


WRONG_INPUTS = {
    "dropout1d: Expected 2D or 3D input": "dimensions",
    "Feature dropout requires at least 2 dimensions": "dimensions",
    "can't be cast to the desired output type": "integers",
    "Promotion of int.add/sub_(float)": "integers",
}
"""What is wrong with an input, by the text of torch's error."""


def outcome(layer, x):
    """Return the shape and the dtype of the result, or what is wrong with the input."""
    torch._dynamo.reset()
    try:
        y = layer(x)
    except RuntimeError as error:  # of which torch.compile has a class of its own
        return next(what for text, what in WRONG_INPUTS.items() if text in str(error))
    return y.shape, y.dtype


@pytest.mark.filterwarnings("ignore")  # torch warns of what it will refuse
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_checked_as_torch_does(kind, compiled):
    """For each number of dimensions and for integers: the same result or error with a driven rate as without."""
    for x in [*(torch.ones([2] * ndim) for ndim in range(7)), torch.ones(2, 2, 2, dtype=torch.int64), torch.ones(0)]:
        outcomes = []
        for driven in (False, True):
            layer = kind(0.5)
            if driven:
                (site,) = find_dropout(layer)
                site.use(Rate(0.5))
            outcomes.append(outcome(torch.compile(layer, backend="eager") if compiled else layer, x))
        assert outcomes[0] == outcomes[1], (x.shape, x.dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "ndim"), [(nn.Dropout1d, 2), (nn.Dropout2d, 3), (nn.Dropout3d, 3), (nn.Dropout3d, 6)])
def test_channels_of_unusual_inputs_are_those_of_torch(kind, ndim):
    """The dimensions along which a whole slice is dropped together."""
    x = torch.ones([9] * min(ndim, 4) + [3] * (ndim - 4))

    def shared(y):
        return [dim for dim in range(y.ndim) if (y == y.select(dim, 0).unsqueeze(dim)).all()]

    layer = kind(0.5)
    expected = shared(layer(x))
    (site,) = find_dropout(layer)
    site.use(Rate(0.5))
    assert shared(torch.compile(layer, backend="eager")(x)) == expected
