"""Complex parameters, as Fourier neural operators have them: |θ| is the magnitude, and z a pair of real numbers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Classifier, fit
from lightning.pytorch.callbacks import BaseFinetuning
from table import ROWS
from torch import nn

from lightning_reg import (
    ElasticNetPenalty,
    GradientNormClipping,
    L1Penalty,
    L2Penalty,
    MaxNorm,
    NonFiniteGradientGuard,
    QuantileGradientClipping,
    StartingPointPenalty,
    WeightClipping,
    WeightDecay,
    ZScoreGradientClipping,
    select_parameters,
)
from lightning_reg.functional import (
    add_l1_gradient_,
    add_l2_gradient_,
    clip_gradient_norm_,
    clip_gradient_norm_per_tensor_,
    l1_penalty,
    l2_penalty,
    zero_nonfinite_gradients_,
)


class Spectral(Classifier):
    """A classifier with a complex weight, which its loss uses."""

    def __init__(self, trained=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.spectrum = nn.Parameter(torch.randn(4, 33, dtype=torch.complex64, generator=generator), requires_grad=trained)

    def training_step(self, batch, batch_idx):
        modes = torch.fft.rfft(batch[0]) @ self.spectrum.t()
        return super().training_step(batch, batch_idx) + 0.001 * modes.abs().square().mean()

    @property
    def pairs(self):
        return torch.view_as_real(self.spectrum.detach())


def theta(*shape, grad=False):
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(*shape, dtype=torch.complex64, generator=generator).requires_grad_()
    if grad:
        p.grad = torch.randn(*shape, dtype=torch.complex64, generator=generator)
    return p


@pytest.mark.parametrize(
    ("penalty", "add", "by_hand"),
    [
        (l1_penalty, add_l1_gradient_, lambda r: r.norm(dim=-1).sum()),
        (l2_penalty, add_l2_gradient_, lambda r: r.square().sum() / 2),
    ],
    ids=["l1", "l2"],
)
@pytest.mark.parametrize("shape", [(3, 4), (1100, 1000)], ids=["small", "large"])
def test_penalties_are_those_of_pairs(penalty, add, by_hand, shape):
    p, real = theta(*shape), torch.ones(2, requires_grad=True)
    pairs = torch.view_as_real(p.detach().to(torch.complex128)).requires_grad_()
    value, expected = penalty([p, real]), by_hand(pairs)
    torch.testing.assert_close(value.double(), expected + penalty([real]).double(), rtol=1e-6, atol=0)
    value.backward()
    expected.backward()
    torch.testing.assert_close(torch.view_as_real(p.grad).double(), pairs.grad)
    p.grad, real.grad = None, torch.zeros(2)
    add([p, real], 0.5)
    torch.testing.assert_close(torch.view_as_real(p.grad).double(), pairs.grad / 2)
    assert torch.equal(real.grad, torch.full((2,), 0.5))


def test_the_subgradient_at_zero_is_zero():
    p = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    l1_penalty([p]).backward()
    assert not p.grad.count_nonzero()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_the_norm_of_gradients_is_that_of_magnitudes(norm_type):
    complex_ones, real = [theta(3, 4, grad=True), theta(5, grad=True)], torch.ones(2, requires_grad=True)
    for params in (complex_ones, [*complex_ones, real]):
        real.grad = torch.ones(2)
        magnitudes = torch.cat([p.grad.abs().flatten() for p in params])
        before = [p.grad.clone() for p in params]
        norm = clip_gradient_norm_(params, 0.5, norm_type)
        torch.testing.assert_close(norm, magnitudes.norm(norm_type))
        for p, grad in zip(params, before, strict=True):
            torch.testing.assert_close(p.grad, grad * 0.5 / norm)
    norms = clip_gradient_norm_per_tensor_([*complex_ones, real], 0.1, norm_type)
    assert norms.shape == (3,)
    for p in complex_ones:
        assert p.grad.abs().norm(norm_type) <= 0.1 + 1e-6


def test_bad_entries_become_zero():
    p = theta(3, grad=True)
    p.grad[1] = complex(math.nan, 1.0)
    zero_nonfinite_gradients_([p])
    assert p.grad[1] == 1j
    assert p.grad.isfinite().all()


SUPPORTED = {
    "L1Penalty": lambda: L1Penalty(0.01),
    "L1Penalty in gradients": lambda: L1Penalty(0.01, inject="gradient"),
    "L2Penalty": lambda: L2Penalty(0.1),
    "L2Penalty in gradients": lambda: L2Penalty(0.1, inject="gradient"),
    "ElasticNetPenalty": lambda: ElasticNetPenalty(0.01, 0.1),
    "StartingPointPenalty": lambda: StartingPointPenalty(1.0),
    "WeightDecay": lambda: WeightDecay(0.5),
    "GradientNormClipping": lambda: GradientNormClipping(0.01),
    "GradientNormClipping per tensor": lambda: GradientNormClipping(0.001, scope="tensor"),
    "QuantileGradientClipping": lambda: QuantileGradientClipping(0.1),
    "ZScoreGradientClipping": lambda: ZScoreGradientClipping(0.1, warmup=1),
    "NonFiniteGradientGuard": lambda: NonFiniteGradientGuard("zero"),
}


class Pairs(Classifier):
    """The same model with pairs of real numbers."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(Spectral().pairs.clone())

    def training_step(self, batch, batch_idx):
        modes = torch.fft.rfft(batch[0]) @ torch.view_as_complex(self.spectrum).t()
        return super().training_step(batch, batch_idx) + 0.001 * modes.abs().square().mean()

    @property
    def pairs(self):
        return self.spectrum.detach()


@pytest.mark.parametrize("name", SUPPORTED)
def test_training_equals_that_of_pairs(name):
    """Except where the magnitude of each number counts, and not that of its parts."""
    model, plain = fit([SUPPORTED[name]()], Spectral()), fit([], Spectral())
    if name != "NonFiniteGradientGuard":
        assert not torch.equal(model.pairs, plain.pairs)
    if not name.startswith(("L1", "Elastic")):
        torch.testing.assert_close(model.pairs, fit([SUPPORTED[name]()], Pairs()).pairs)


def test_complex_weights_count_as_weights():
    assert "spectrum" in select_parameters(Spectral())


@pytest.mark.parametrize("name", ROWS)
def test_a_frozen_complex_parameter_disturbs_nobody(name):
    model = Spectral(trained=False)
    model.extra = nn.Dropout(0.1)
    before = model.pairs.clone()
    fit([ROWS[name].active()], model, max_epochs=1) if not ROWS[name].options else None
    assert torch.equal(model.pairs, before)


@pytest.mark.parametrize("make", [lambda: WeightClipping(0.1), lambda: MaxNorm(1.0)], ids=["WeightClipping", "MaxNorm"])
def test_what_is_not_defined_is_refused_by_name(make):
    with pytest.raises(ValueError, match=r"complex spectrum: exclude them, as in params=\[…, '!spectrum'\]"):
        fit([make()], Spectral())


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pl_module.spectrum.requires_grad_(False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            pl_module.spectrum.requires_grad_(True)


def test_one_that_is_unfrozen_later_is_refused_then():
    with pytest.raises(ValueError, match="WeightClipping needs real parameters, got complex spectrum"):
        fit([WeightClipping(0.1), Unfreezes()], Spectral())
