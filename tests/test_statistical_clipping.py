"""Bounds learned from earlier gradient norms, and metrics that survive a checkpoint."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import QUIET, Classifier, Gan, Memory, fit, loader, parameter, same
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_worker import Resumable
from torch.testing import assert_close

from lightning_reg import GradientNormClipping, QuantileGradientClipping, ZScoreGradientClipping
from lightning_reg.functional import quantile_bound, update_norm_history, update_norm_statistics, z_score_bound

NORMS = [1.0, 1.2, 0.9, math.nan, 1.1, 9.0, math.inf, 1.05, 0.8, 1.3, 20.0, 1.0, 0.95, 1.15]


def finite(norms):
    return [norm for norm in norms if math.isfinite(norm)]


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.93])
def test_quantile_bound_matches_numpy(window, quantile):
    history = torch.full((window,), math.nan)
    for step, norm in enumerate(NORMS, start=1):
        history = update_norm_history(history, torch.tensor(norm))
        expected = np.quantile(finite(NORMS[:step])[-window:], quantile)
        assert_close(quantile_bound(history, quantile).item(), float(expected), rtol=1e-6, atol=0.0)
        assert len(history) == window


def z_score_rule(norms, z, decay, warmup):
    """Return the bounds of the published rule, in float64."""
    seen, bounds, mean, variance = [], [], None, None
    for norm in norms:
        bound = math.inf
        if mean is not None:
            score = (norm - mean) / (math.sqrt(variance) + 1e-6)
            if score > z:
                bound = mean + z * math.sqrt(variance) / (score / z)
        bounds.append(bound)
        if not math.isfinite(norm):
            continue
        clipped = min(norm, bound)
        if mean is not None:
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        else:
            seen.append(clipped)
            if len(seen) == warmup:
                mean, variance = np.mean(seen), np.var(seen)
    return bounds


@pytest.mark.parametrize(("z", "decay", "warmup"), [(2.5, 0.97, 4), (0.5, 0.5, 2), (1.0, 0.9, 1)])
def test_z_score_bound_matches_published_rule(z, decay, warmup):
    statistics, bounds = torch.zeros(3), []
    for norm in map(torch.tensor, NORMS):
        bound = z_score_bound(norm, statistics, z) if statistics[0] >= warmup else torch.tensor(math.inf)
        statistics = update_norm_statistics(statistics, torch.minimum(norm, bound) if norm.isfinite() else norm, decay, warmup)
        bounds.append(bound.item())
    reference = z_score_rule(NORMS, z, decay, warmup)
    clipped = [index for index, bound in enumerate(reference) if math.isfinite(bound) and math.isfinite(NORMS[index])]
    assert len(clipped) >= 2
    assert_close([bounds[i] for i in clipped], [float(reference[i]) for i in clipped], rtol=1e-4, atol=1e-6)
    assert all(math.isinf(bounds[i]) for i, bound in enumerate(reference) if math.isinf(bound))
    assert statistics[0] == len(finite(NORMS))


def test_statistics_use_clipped_norms():
    """The negative control: statistics of unclipped norms would differ."""
    clipped, unclipped = (torch.tensor([4.0, 1.0, 0.01]) for _ in range(2))
    bound = z_score_bound(torch.tensor(9.0), clipped, 2.5)
    clipped = update_norm_statistics(clipped, bound, 0.97, 4)
    unclipped = update_norm_statistics(unclipped, torch.tensor(9.0), 0.97, 4)
    assert unclipped[2] > 100 * clipped[2]


class Recorder(Classifier):
    """Records the norm that the optimizer sees, and makes some steps larger or non-finite."""

    def __init__(self, factors=(), **options):
        super().__init__(**options)
        self.factors, self.norms = dict(factors), []

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factors.get(self.global_step, 1.0)

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm().item())


def test_quantile_clipping_uses_norms_before_clipping():
    free = Recorder(lr=0.0)
    fit(model=free, max_epochs=3)  # lr is 0, so the norms depend only on the batches
    clipped = Recorder(lr=0.0)
    fit([QuantileGradientClipping(0.25)], clipped, max_epochs=3)
    expected = [min(norm, np.quantile(free.norms[: step + 1], 0.25)) for step, norm in enumerate(free.norms)]
    assert clipped.norms == pytest.approx(expected, rel=1e-4)
    assert clipped.norms != pytest.approx(free.norms, rel=1e-4)


def test_z_score_clipping_clips_only_outliers():
    free, clipped = Recorder(lr=0.0), Recorder({9: 50.0}, lr=0.0)
    fit(model=free, max_epochs=3)
    fit([ZScoreGradientClipping(2.5, warmup=4)], clipped, max_epochs=3)
    assert clipped.norms[9] < 2 * max(free.norms)
    assert clipped.norms[:9] == pytest.approx(free.norms[:9], rel=1e-5)


class KeepsFinite(Recorder):
    """Keeps its weights finite, whatever the gradients are."""

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "make", [lambda: QuantileGradientClipping(0.25), lambda: ZScoreGradientClipping(0.5, warmup=2)], ids=["quantile", "z-score"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_step_does_not_break_statistics(make, bad):
    """Published callbacks never recover, since their mean stays NaN."""
    callback, healthy = make(), make()
    fit([callback], KeepsFinite({3: bad}, lr=0.0), max_epochs=3, logger=Memory(), log_every_n_steps=4)
    fit([healthy], Recorder(lr=0.0), max_epochs=3)
    (memory,), (other,) = callback.state["memory"].values(), healthy.state["memory"].values()
    assert memory[-1].isfinite()
    norms = lambda memory: memory[0] if len(memory) == 3 else memory.isfinite().sum()  # noqa: E731
    assert norms(memory) == norms(other) - 1 == 11
    assert dict(callback.running.compute_and_reset())["nonfinite_steps"] == 1


def test_statistics_and_metrics_per_optimizer():
    callback, memory = QuantileGradientClipping(0.5, window=3), Memory()
    fit([callback], Gan(), logger=memory, log_every_n_steps=1)
    assert sorted(callback.state["memory"]) == [0, 1]
    assert not torch.equal(callback.state["memory"][0], callback.state["memory"][1])
    assert {"norm_before_0", "norm_before_1", "threshold_0", "threshold_1", "clipped_steps_0", "nonfinite_steps_1"} <= {
        key.rpartition("/")[2] for key in memory.steps[max(memory.steps)]
    }


def test_missing_gradients_do_not_enter_statistics():
    for callback in (QuantileGradientClipping(), ZScoreGradientClipping()):
        callback.update(0.0)
        callback.gradients([parameter([1.0])], None, None)
        assert not callback.state["memory"]


def test_second_fit_starts_fresh():
    callback = ZScoreGradientClipping(0.5, warmup=2)
    fit([callback])
    assert same(fit([callback]), fit([ZScoreGradientClipping(0.5, warmup=2)]))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantileGradientClipping(0.3, window=5),
        lambda: ZScoreGradientClipping(0.5, warmup=2),
        lambda: GradientNormClipping(1.0),
    ],
    ids=["quantile", "z-score", "norm"],
)
def test_metrics_after_mid_epoch_resume_match(make, tmp_path):
    def run(epochs, folder, resume=None):
        memory = Memory()
        saves = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        options = {**QUIET, "enable_checkpointing": True, "logger": memory, "log_every_n_steps": 4}
        Trainer(**options, max_epochs=epochs, callbacks=[make(), saves]).fit(
            KeepsFinite({2: math.nan}), Resumable(), ckpt_path=resume
        )
        return memory.steps

    uninterrupted = run(3, tmp_path / "uninterrupted")
    resumed = run(3, tmp_path / "resumed", tmp_path / "uninterrupted" / "step=6.ckpt")
    expected = {step: metrics for step, metrics in uninterrupted.items() if step >= 6}
    assert expected
    assert all(str(resumed[step]) == str(metrics) for step, metrics in expected.items())  # NaN is not equal to itself
    assert all(metrics[f"reg/{make().name}/nonfinite_steps"] == 1 for metrics in expected.values())


def test_checkpoint_with_other_window_raises(tmp_path):
    trainer = Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[QuantileGradientClipping(window=5)])
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="checkpoint has a window of 5 norms, expected window=7: resume with window=5"):
        Trainer(**{**QUIET, "max_epochs": 2}, callbacks=[QuantileGradientClipping(window=7)]).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantileGradientClipping(0.0), r"QuantileGradientClipping: quantile must be a number in \(0, 1\), got 0.0"),
        (lambda: QuantileGradientClipping(1), r"QuantileGradientClipping: quantile must be a number in \(0, 1\), got 1"),
        (lambda: QuantileGradientClipping(window=0), "QuantileGradientClipping: window must be an integer ≥ 1, got 0"),
        (lambda: ZScoreGradientClipping(0.0), r"ZScoreGradientClipping: z must be a number in \(0, inf\], got 0.0"),
        (lambda: ZScoreGradientClipping(decay=1.5), r"ZScoreGradientClipping: decay must be a number in \[0, 1\], got 1.5"),
        (lambda: ZScoreGradientClipping(warmup=0), "ZScoreGradientClipping: warmup must be an integer ≥ 1, got 0"),
    ],
    ids=["quantile of 0", "quantile of 1", "window of 0", "z of 0", "decay above 1", "warmup of 0"],
)
def test_arguments_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_running_metrics_survive_pickling():
    callback = GradientNormClipping(0.5)
    fit([callback], max_epochs=1, logger=Memory(), log_every_n_steps=4)
    callback.running.mean("clipped_steps", torch.tensor(1.0))
    callback.running.sum("nonfinite_steps", torch.tensor(0.0))
    again = pickle.loads(pickle.dumps(callback))
    expected = {"clipped_steps": 1.0, "nonfinite_steps": 0.0}
    assert dict(again.running.compute_and_reset()) == dict(callback.running.compute_and_reset()) == expected
