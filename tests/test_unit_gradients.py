"""Adaptive clipping and centralization of the gradient of each output unit."""

from __future__ import annotations

import pytest
import torch
from helpers import UNITS, Classifier, fit, parameter, same
from torch import nn
from torch.testing import assert_close

from lightning_reg import AdaptiveGradientClipping, GradientCentralization
from lightning_reg.functional import centralize_gradients_, clip_unit_gradients_, units_of

each_layer = pytest.mark.parametrize(
    ("layer", "units"), [pytest.param(layer, units, id=type(layer).__name__) for layer, units in UNITS.items()]
)


def with_gradient(shape, scale=1.0):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape) * scale
    return p


def clipped_by_hand(w, g, clip_factor, eps):
    """Return the clipped gradient of one unit by the published rule, in float64."""
    w, g = w.double(), g.double()
    bound = clip_factor * max(w.norm().item(), eps)
    return g * (bound / g.norm()) if g.norm() > bound else g


@each_layer
@pytest.mark.parametrize("clip_factor", [0.01, 1.0, 1e6])
def test_clip_unit_gradients_matches_formula(layer, units, clip_factor):
    p = with_gradient(layer.weight.shape)
    expected = [clipped_by_hand(w, g, clip_factor, 1e-3) for w, g in zip(units(p.detach()), units(p.grad.clone()), strict=True)]
    before = p.grad.clone()
    smallest = clip_unit_gradients_([p], clip_factor, units=[units_of(layer)])
    assert_close([g.double() for g in units(p.grad)], expected, rtol=1e-5, atol=0.0)
    factors = [after.norm() / g.norm() for after, g in zip(units(p.grad), units(before), strict=True)]
    assert_close(smallest, torch.stack(factors).min().clamp(max=1.0))
    if clip_factor == 1e6:
        assert torch.equal(p.grad, before)


def test_units_of_transposed_convolutions_matter():
    """The negative control: units in dimension 0, as in other layers, give another result."""
    layer = nn.ConvTranspose2d(4, 6, 3)
    right, wrong = with_gradient(layer.weight.shape), with_gradient(layer.weight.shape)
    clip_unit_gradients_([right], 0.01, units=[units_of(layer)])
    clip_unit_gradients_([wrong], 0.01)
    assert not torch.allclose(right.grad, wrong.grad)


def test_vectors_and_scalars_are_one_unit():
    for shape in [(6,), ()]:
        p = with_gradient(shape)
        expected = clipped_by_hand(p.detach(), p.grad, 0.01, 1e-3)
        clip_unit_gradients_([p], 0.01)
        assert_close(p.grad.double(), expected)


def test_zero_weights_learn_only_with_eps():
    learns, stuck = (parameter([[0.0, 0.0]], grad=[[3.0, 4.0]]) for _ in range(2))
    clip_unit_gradients_([learns], clip_factor=0.1, eps=1e-3)
    clip_unit_gradients_([stuck], clip_factor=0.1, eps=1e-30)
    assert_close(learns.grad, torch.tensor([[6e-5, 8e-5]]))
    assert stuck.grad.norm() < 1e-29


def test_nonfinite_unit_does_not_affect_others():
    p = parameter([[1.0, 0.0], [1.0, 0.0]], grad=[[float("nan"), 1.0], [10.0, 0.0]])
    assert clip_unit_gradients_([p], 0.1).isnan()
    assert p.grad[0].isnan().all()
    assert_close(p.grad[1], torch.tensor([0.1, 0.0]))
    q = parameter([[1.0, 0.0]], grad=[[float("inf"), 1.0]])
    assert clip_unit_gradients_([q], 0.1) == 0


def test_norms_of_units_do_not_overflow_or_underflow():
    """Large gradients are clipped and not lost, and large weights allow large gradients."""
    p = parameter([[0.3, 0.4], [3e30, 4e30], [0.3, 0.4]], grad=[[3e30, 4e30], [0.3, 0.4], [3e-30, 4e-30]])
    clip_unit_gradients_([p], 0.1)
    assert_close(p.grad, torch.tensor([[0.03, 0.04], [0.3, 0.4], [3e-30, 4e-30]]))
    vector = parameter([0.3, 0.4], grad=[3e30, 4e30])
    clip_unit_gradients_([vector], 0.1)
    assert_close(vector.grad, torch.tensor([0.03, 0.04]))


def test_half_precision_uses_float32_norms():
    half, full = parameter([[1.0] * 4096], [[0.01] * 4096], torch.bfloat16), parameter([[1.0] * 4096], [[0.01] * 4096])
    for p in (half, full):
        clip_unit_gradients_([p], 1e-3)
    assert_close(half.grad.float(), full.grad, rtol=1e-2, atol=0.0)
    assert half.grad.dtype == torch.bfloat16


def test_missing_and_empty_gradients_are_skipped():
    none, empty = nn.Parameter(torch.ones(2, 2)), with_gradient((0, 4))
    assert clip_unit_gradients_([none, empty], 0.1) == 1
    centralize_gradients_([none, empty])
    assert none.grad is None
    assert clip_unit_gradients_([], 0.1) == 1


@pytest.mark.parametrize(
    "act", [lambda p: clip_unit_gradients_([p], 0.1), lambda p: centralize_gradients_([p])], ids=["clip", "centralize"]
)
def test_sparse_gradient_raises(act):
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="needs a dense gradient, got a sparse one: create the embedding with sparse=False"):
        act(layer.weight)


@each_layer
def test_centralization_removes_mean_of_each_unit(layer, units):
    p = with_gradient(layer.weight.shape)
    expected = [g.double() - g.double().mean() for g in units(p.grad.clone())]
    centralize_gradients_([p], [units_of(layer)])
    assert_close([g.double() for g in units(p.grad)], expected, rtol=1e-5, atol=1e-6)


def test_centralization_skips_vectors():
    p = with_gradient((6,))
    before = p.grad.clone()
    centralize_gradients_([p])
    assert torch.equal(p.grad, before)


def test_centralized_training_keeps_mean_of_each_unit():
    trained, plain, start = fit([GradientCentralization()]), fit(), Classifier()
    for index in (0, 4):
        assert_close(trained.net[index].weight.mean(1), start.net[index].weight.mean(1))
        assert not torch.allclose(plain.net[index].weight.mean(1), start.net[index].weight.mean(1))


def test_adaptive_clipping_matches_manual_hook():
    class ByHand(Classifier):
        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                unit_of = [(p[i], p.grad[i]) for i in range(len(p))] if p.ndim > 1 else [(p, p.grad)]
                for w, g in unit_of:
                    g.mul_((0.01 * w.detach().norm().clamp(min=1e-3) / g.norm()).clamp(max=1.0))

    ours, theirs = fit([AdaptiveGradientClipping(0.01)]), fit(model=ByHand())
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert not same(ours, fit())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AdaptiveGradientClipping(0.0),
            r"AdaptiveGradientClipping: clip_factor must be a number in \(0, inf\], got 0.0",
        ),
        (lambda: AdaptiveGradientClipping(eps=0.0), r"AdaptiveGradientClipping: eps must be a number in \(0, inf\], got 0.0"),
    ],
    ids=["clip_factor of 0", "eps of 0"],
)
def test_bounds_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
