"""The example of a VAE in a short form, its loss, and what acts on its decoder."""

from __future__ import annotations

import re

import matplotlib.image
import pytest
import torch
from processes import ROOT, run_script
from torch.distributions import Bernoulli, Normal, kl_divergence

pytest.importorskip("mlxtend", reason="mlxtend needs Python 3.11")

import vae
from image_cnn import Images

from lightning_reg import sparsity


@pytest.mark.slow
def test_example_prints_tables_and_draws_figure(tmp_path):
    flags = ["--epochs=1", "--repeats=3"]
    printed = run_script(str(ROOT / "examples" / "vae.py"), *flags, folder=tmp_path, columns=80)
    names = list(vae.candidates())
    assert re.findall(rf"^ *({'|'.join(names)}) +[\d.]+ ±", printed, re.MULTILINE) == names
    assert re.findall(rf"^ *({'|'.join(names)}) +\d+% +\d+%", printed, re.MULTILINE) == names
    assert max(map(len, printed.splitlines())) <= 80
    assert "Warning" not in printed
    path = re.findall(r"^Figure: (.*)$", printed, re.MULTILINE)[0]
    assert matplotlib.image.imread(tmp_path / path)[..., :3].std() > 0.05


def test_loss_is_that_of_torch_distributions():
    torch.manual_seed(0)
    model, images, noise = vae.Vae(), torch.rand(5, 1, 28, 28).round(), torch.randn(5, vae.LATENT)
    model.requires_grad_(False)
    mean, log_variance = model.encoder(images).chunk(2, dim=1)
    code = Normal(mean, (log_variance / 2).exp())
    pixels = Bernoulli(logits=model.decoder(code.mean + code.stddev * noise))
    divergence = kl_divergence(code, Normal(0.0, 1.0)).sum(1)
    expected = (divergence - pixels.log_prob(images.flatten(1)).sum(1)).mean()
    torch.testing.assert_close(model.negative_elbo(images, noise), expected)
    assert abs(float(model.negative_elbo(images, noise) - (expected - divergence.mean()))) > 0.1


def test_only_soft_thresholding_sets_weights_of_the_decoder_to_zero():
    models = {name: vae.train(callbacks, epochs=2) for name, callbacks in vae.candidates().items()}
    zeros = {name: sparsity(model, params=vae.DECODER).fraction for name, model in models.items()}
    assert [name for name, fraction in zeros.items() if fraction] == ["soft threshold"]
    assert vae.small(models["strong L1"]) > vae.small(models["L1 penalty"]) > vae.small(models["plain"])
    assert sparsity(models["soft threshold"], params="weights:encoder.*").fraction == 0


def test_reconstructions_are_pixels():
    pixels = vae.Vae()(next(iter(Images(0).val_dataloader()))[0])
    assert pixels.shape == (250, 784)
    assert bool(((pixels >= 0) & (pixels <= 1)).all())
