"""The example of a GAN as a user runs it, shortened, its metric, and what bounds its critic."""

from __future__ import annotations

import re

import gan
import matplotlib.image
import pytest
import torch
from gan import CANDIDATES, Digits, Gan, lipschitz, sliced_wasserstein, train
from processes import ROOT, run_script
from scipy.stats import wasserstein_distance
from torch import nn

from lightning_reg.tuning import compare


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run the example with few epochs in a terminal of 80 columns; return the folder and the output."""
    folder = tmp_path_factory.mktemp("job")
    script = str(ROOT / "examples" / "gan.py")
    return folder, run_script(script, "--epochs", "2", "--repeats", "3", folder=folder, columns=80)


def test_candidates_have_rows(job):
    assert re.findall(r"^ *([a-z]+(?: [a-z]+)?)  +\d\.\d+ ± \d", job[1], re.MULTILINE) == list(CANDIDATES)
    assert max(map(len, job[1].splitlines())) <= 80


def test_real_digits_are_closest(job):
    """The generator has hardly learned, so the distance of real digits is far lower."""
    between_real = float(re.search(r"other real digits: (\d\.\d+)", job[1])[1])
    assert between_real < 0.1 < min(float(value) for value in re.findall(r"(\d\.\d+) ±", job[1]))


def test_figure_shows_digits(job):
    folder, printed = job
    figure = matplotlib.image.imread(folder / re.search("Figure: (.*)", printed)[1])[..., :3]
    rows = figure[:, figure.shape[1] // 3 :].mean(axis=(1, 2)) < 0.9
    assert (rows[1:] & ~rows[:-1]).sum() >= len(CANDIDATES) + 1  # a dark strip for each, below white


def test_distance_is_that_of_scipy():
    torch.manual_seed(1)
    a, b = torch.randn(50, 64), 0.5 + torch.rand(50, 64)
    along = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    along /= along.norm(dim=1, keepdim=True)
    expected = [wasserstein_distance(x, y) for x, y in zip((a @ along.T).T.tolist(), (b @ along.T).T.tolist(), strict=True)]
    assert float(sliced_wasserstein(a, b)) == pytest.approx(sum(expected) / 256, rel=1e-5)
    assert float(sliced_wasserstein(a, a[torch.randperm(50)])) == 0


@pytest.fixture(scope="module")
def models():
    """Train each candidate for a few epochs on the first split."""
    return {name: train(callbacks, epochs=4) for name, callbacks in CANDIDATES.items()}


@pytest.mark.filterwarnings("ignore")
def test_candidates_bound_the_critic(models):
    """Max norm bounds each row, but no singular value."""
    assert max(float(p.detach().abs().max()) for p in models["clipping"].critic.parameters()) <= 0.01
    assert max(float(p.detach().abs().max()) for p in models["clipping"].generator.parameters()) > 0.01
    layers = [layer for layer in models["max norm"].critic if isinstance(layer, nn.Linear)]
    assert max(float(layer.weight.detach().norm(dim=1).max()) for layer in layers) <= 1 + 1e-6
    found = {name: lipschitz(model) for name, model in models.items()}
    assert max(found["clipping"], found["spectral"], found["orthogonal"]) < 2.5
    assert min(found["max norm"], found["no bound"], found["grad norm"]) > 20


@pytest.mark.filterwarnings("ignore")
def test_lipschitz_bound_holds(models):
    """The critic changes by no more than it says, and by more than a hundredth of it."""
    torch.manual_seed(0)
    for model in models.values():
        images = Digits(0).held_out[:200].requires_grad_()
        slopes = torch.autograd.grad(model.critic(images).sum(), images)[0].norm(dim=1)
        assert lipschitz(model) / 100 < float(slopes.max()) <= lipschitz(model) * (1 + 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_metric_does_not_depend_on_the_critic():
    noise = torch.randn(len(Digits(0).held_out), gan.NOISE, generator=torch.Generator().manual_seed(0))
    candidates = {name: CANDIDATES[name] for name in ("clipping", "orthogonal")}
    options = {"max_epochs": 1, "accelerator": "cpu"}
    result = compare(Gan, Digits, candidates, metric="val/distance", repeats=3, trainer=options, progress=False)
    for name, runs in result.runs.items():
        generated = train(CANDIDATES[name], epochs=1)(noise)
        assert runs[0].value == pytest.approx(float(sliced_wasserstein(generated.detach(), Digits(0).held_out)), rel=1e-6)
