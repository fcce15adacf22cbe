"""Weights that a module computes from other parameters: parametrizations, older hooks, and torch's own pruning."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import Classifier, Memory, fit, same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_reg import (
    AdaptiveGradientClipping,
    GradientNormClipping,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    MaxNorm,
    SoftThresholding,
    UnitNorm,
    WeightClipping,
    WeightDecay,
    WeightPruning,
    decay_groups,
    select_parameters,
    sparsity,
)
from lightning_reg._engine.computed import computed_tensors
from lightning_reg._engine.selection import selection_mask


def hooked(wrap):
    """Wrap a layer with one of torch's older functions, which warn that they are old."""

    def wrapped(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return wrap(layer)

    return wrapped


class Symmetric(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.shift


def with_own_parameters(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


ORIGINALS = {
    "weight_norm": (parametrizations.weight_norm, ["original0", "original1"]),
    "spectral_norm": (parametrizations.spectral_norm, ["original"]),
    "orthogonal": (parametrizations.orthogonal, ["original"]),
    "own": (with_own_parameters, ["original", "0.shift"]),
    "old weight_norm": (hooked(nn.utils.weight_norm), ["weight_g", "weight_v"]),
    "old spectral_norm": (hooked(nn.utils.spectral_norm), ["weight_orig"]),
}
WRAPPERS = {name: wrap for name, (wrap, _) in ORIGINALS.items()}


class Wrapped(Classifier):
    """A classifier whose first layer computes its weight."""

    def __init__(self, wrap):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net[0] = wrap(self.net[0])


@pytest.mark.parametrize("kind", ORIGINALS)
def test_originals_are_no_weights_but_a_glob_reaches_them(kind):
    wrap, names = ORIGINALS[kind]
    layer = wrap(nn.Linear(4, 4))
    originals = [name if name.startswith("weight") else f"parametrizations.weight.{name}" for name in names]
    assert {name for name, p in layer.named_parameters() if id(p) in computed_tensors(layer)} == set(originals)
    assert not any(selection_mask(layer, "weights").values())
    assert set(select_parameters(layer, ["bias", originals[-1]])) == {"bias", originals[-1]}
    with pytest.raises(ValueError, match=r"'weights' leaves out .*parametrized \(.*"):
        select_parameters(layer)
    assert list(select_parameters(layer, "biases")) == ["bias"]


@pytest.mark.parametrize("kind", ORIGINALS)
@pytest.mark.filterwarnings("ignore:'weights' leaves out")
def test_what_acts_on_weights_leaves_the_layer_to_the_loss(kind):
    """Its weight is what the same penalty on the other layer alone gives."""
    for make in (
        lambda params: L2Penalty(0.1, params=params),
        lambda params: WeightDecay(1.0, params=params),
        lambda params: WeightClipping(0.05, params=params),
        lambda params: WeightPruning(0.5, params=params, name="pruning"),
    ):
        assert same(fit([make("weights")], Wrapped(WRAPPERS[kind])), fit([make("net.4.weight")], Wrapped(WRAPPERS[kind])))


def test_an_orthogonal_layer_stays_orthogonal():
    with pytest.warns(UserWarning, match="'weights' leaves out net.0.weight"):
        model = fit([L2Penalty(1.0)], Wrapped(parametrizations.orthogonal))
    torch.testing.assert_close(model.net[0].weight @ model.net[0].weight.t(), torch.eye(16), atol=1e-5, rtol=0)
    broken = fit([L2Penalty(1.0, params="*.original")], Wrapped(parametrizations.orthogonal), max_epochs=8)  # the control
    assert (broken.net[0].weight @ broken.net[0].weight.t() - torch.eye(16)).abs().max() > 0.1


def test_one_warning_names_them():
    message = (
        r"^'weights' leaves out net.0.weight, which the model computes from net.0.parametrizations.weight.original0, "
        r"net.0.parametrizations.weight.original1: .* as in params=\['weights', 'net.0.parametrizations.weight.original0'\]"
    )
    callbacks = [L2Penalty(0.1, params="net.4.weight"), L1Penalty(0.1), WeightDecay(0.1), GradientNormClipping(1.0)]
    with pytest.warns(UserWarning, match=message) as caught:
        fit(callbacks, Wrapped(parametrizations.weight_norm))
    assert sum("leaves out" in str(warning.message) for warning in caught) == 1
    with pytest.warns(UserWarning, match=r"^select_parameters: 'weights' leaves out net.0.weight"):
        decay_groups(Wrapped(parametrizations.weight_norm), 0.1)


@pytest.mark.parametrize(
    "params",
    ["all", "net.4.weight", ["weights", "!net.0.*"], ["weights", "net.0.parametrizations.*"], "weights:net.4.*"],
    ids=str,
)
def test_no_warning_where_the_user_has_decided(params):
    fit([L2Penalty(0.1, params=params)], Wrapped(parametrizations.weight_norm))


def test_a_parametrized_bias_is_no_weight_anyway():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", Symmetric())
    assert list(select_parameters(layer)) == ["weight"]
    assert len(select_parameters(layer, "biases")) == 2


# torch.nn.utils.prune -----------------------------------------------------------------------------------------------


class Pruned(Classifier):
    """A classifier of which torch has pruned a fraction of the weights, at random."""

    def __init__(self, amount=0.5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for layer in (self.net[0], self.net[4]):
                prune.random_unstructured(layer, "weight", amount)

    @property
    def effective(self):
        return [layer.weight_orig.detach() * layer.weight_mask for layer in (self.net[0], self.net[4])]


def zeros(model):
    weights = torch.cat([weight.flatten() for weight in model.effective])
    return (weights == 0).float().mean().item()


def plain(model=None):
    """Return a classifier with the effective weights of a pruned one, in plain layers."""
    model = model or Pruned()
    for layer in (model.net[0], model.net[4]):
        prune.remove(layer, "weight")
    return model


def test_masked_originals_are_weights():
    assert list(select_parameters(Pruned())) == ["net.0.weight_orig", "net.4.weight_orig"]
    assert list(select_parameters(Pruned(), "weights:net.0.*")) == ["net.0.weight_orig"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: L1Penalty(0.1),
        lambda: L1Penalty(0.1, inject="gradient"),
        lambda: GroupLassoPenalty(0.1),
    ],
    ids=["loss", "gradient", "groups"],
)
def test_a_penalty_counts_effective_weights(make):
    memories = []
    for model in (Pruned(), plain()):
        memories.append(Memory())
        fit([make()], model, logger=memories[-1], log_every_n_steps=1, max_epochs=1, limit_train_batches=1)
    masked, unmasked = ([values["reg/" + make().name + "/penalty"] for values in m.steps.values()] for m in memories)
    assert masked == pytest.approx(unmasked, rel=1e-6)
    if isinstance(make(), L1Penalty):
        originals = sum(layer.weight_orig.abs().sum().item() for layer in (Pruned().net[0], Pruned().net[4]))
        assert masked[0] < 0.06 * originals  # half of 0.1 times the originals


@pytest.mark.parametrize("criterion", ["magnitude", "random", lambda name, p: torch.ones_like(p)], ids=["m", "r", "own"])
@pytest.mark.parametrize(("sparsity", "fraction"), [(0.5, 0.5), (0.75, 0.75)])
def test_pruning_counts_what_torch_has_pruned(criterion, sparsity, fraction):
    assert zeros(fit([WeightPruning(sparsity, criterion=criterion)], Pruned())) == pytest.approx(fraction, abs=1e-3)


def test_pruned_units_are_those_with_the_smallest_effective_norms():
    model = Pruned()
    expected = [weight.norm(dim=1).argsort()[: len(weight) // 2].sort().values for weight in model.effective]
    model.lr = 0.0
    fit([WeightPruning(0.5, structure="unit", scope="layer", params="weights")], model, max_epochs=1)
    for weight, units in zip(model.effective, expected, strict=True):
        assert torch.equal((weight == 0).all(dim=1).nonzero().flatten(), units)


@pytest.mark.parametrize(
    ("make", "holds"),
    [
        (lambda: WeightClipping(0.05), lambda w: w.abs().max() <= 0.05),
        (lambda: MaxNorm(0.3), lambda w: w.norm(dim=1).max() <= 0.3 + 1e-6),
        (lambda: UnitNorm(), lambda w: (w.norm(dim=1) - 1).abs().max() < 1e-6),
        (lambda: SoftThresholding(1.0), lambda w: (w == 0).float().mean() > 0.6),
    ],
    ids=["clip", "max norm", "unit norm", "soft threshold"],
)
def test_constraints_hold_for_effective_weights(make, holds):
    model = fit([make()], Pruned())
    assert all(holds(weight) for weight in model.effective)
    assert zeros(model) >= 0.5 - 1e-6
    assert not all(holds(weight) for weight in Pruned().effective)  # the negative control


@pytest.mark.parametrize("make", [lambda: L2Penalty(0.1), lambda: WeightDecay(0.5), lambda: AdaptiveGradientClipping(0.01)])
def test_training_under_masks_is_training_what_is_left(make):
    """The masked model and plain layers whose gradients are masked by hand give the same weights."""
    masked = fit([make()], Pruned())

    class ByHand(Classifier):
        def on_after_backward(self):
            for layer, mask in zip((self.net[0], self.net[4]), self.masks, strict=True):
                layer.weight.grad.mul_(mask)

    model = ByHand()
    source = Pruned()
    model.masks = [source.net[0].weight_mask, source.net[4].weight_mask]
    model.load_state_dict(plain(source).state_dict())
    fit([make()], model)
    for weight, layer in zip(masked.effective, (model.net[0], model.net[4]), strict=True):
        torch.testing.assert_close(weight, layer.weight)


def test_masks_that_change_during_the_fit_are_followed():
    class Growing(Pruned):
        def on_train_epoch_end(self):
            prune.random_unstructured(self.net[0], "weight", 0.5)

    model = fit([UnitNorm()], Growing())
    prune.remove(model.net[4], "weight")
    assert zeros_of(model.net[0]) > 0.7
    callback = UnitNorm()
    fit([callback], model, max_epochs=1)
    norms = (model.net[0].weight_orig * model.net[0].weight_mask).norm(dim=1)
    assert norms.max() <= 1 + 1e-6


def zeros_of(layer):
    return (layer.weight_mask == 0).float().mean()


def test_what_only_reads_gradients_leaves_the_originals_alone():
    model = Pruned()
    before = model.net[0].weight_orig.detach().clone()
    fit([GradientNormClipping(1.0)], model, max_epochs=1)
    hidden = model.net[0].weight_mask == 0
    assert torch.equal(model.net[0].weight_orig[hidden], before[hidden])
    assert before[hidden].count_nonzero() == hidden.sum()


def test_a_mask_that_is_not_of_zeros_and_ones_is_a_parametrization():
    layer = nn.Linear(4, 4)
    prune.custom_from_mask(layer, "weight", torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match=r"parametrized \(weight_orig\)"):
        select_parameters(layer)


# Sparsity -----------------------------------------------------------------------------------------------------------


def test_sparsity_counts_effective_weights():
    found = sparsity(Pruned(0.75))
    assert list(found.parameters) == ["net.0.weight", "net.4.weight"]
    assert found.fraction == pytest.approx(0.75, abs=1e-3)
    assert sparsity(plain(Pruned(0.75))).fraction == found.fraction
    assert sparsity(Pruned(), "net.0.weight").total.total == 1024
    assert list(sparsity(Pruned(), "net.0.*").parameters) == ["net.0.bias", "net.0.weight"]


@pytest.mark.parametrize("kind", ORIGINALS)
def test_sparsity_computes_the_weight_and_changes_nothing(kind):
    layer = WRAPPERS[kind](nn.Linear(4, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found = sparsity(layer)
    assert list(found.parameters) == ["weight"]
    assert found.total.total == 16
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(m.training for m in layer.modules())
    assert sum(count.total for count in sparsity(layer, "all").parameters.values()) == 20


def test_sparsity_sees_zeros_that_a_parametrization_makes():
    class Halved(nn.Module):
        def forward(self, x):
            return x.tril()

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Halved())
    assert sparsity(layer).fraction == 6 / 16
