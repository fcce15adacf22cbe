"""Training on a GPU. Tests that need one are skipped if there is none."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import Digits, train
from helpers import TOLERANCE, distance, fit, identical, loader, same
from processes import run_script
from table import changes, every_callback, everything, model
from torch.testing import assert_close

from tests.benchmarks.cuda import count_syncs, measure_bandwidth

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@every_callback
def test_gpu_training_in_each_precision(row, precision):
    on_gpu, plain = (
        fit(callbacks, model(row), max_epochs=1, accelerator="cuda", precision=precision) for callbacks in ([row.active()], [])
    )
    assert all(p.isfinite().all() for p in on_gpu.parameters())
    assert same(on_gpu, plain) is not changes(row)
    if row.inactive:
        assert same(fit([row.inactive()], model(row), max_epochs=1, accelerator="cuda", precision=precision), plain)


@needs_cuda
@every_callback
def test_gpu_training_matches_cpu(row):
    if "devices" in row.exempt:
        pytest.skip(row.exempt["devices"])

    def fit_on(callbacks, accelerator):
        classifier = model(row)
        classifier.net[3].p = 0.0  # each device draws its own masks
        return fit(callbacks, classifier, max_epochs=1, accelerator=accelerator).cpu()

    on_gpu, on_cpu, plain = fit_on([row.active()], "cuda"), fit_on([row.active()], "cpu"), fit_on([], "cpu")
    if changes(row):
        assert distance(on_gpu, on_cpu) < 0.1 * distance(plain, on_cpu)


@needs_cuda
@every_callback
def test_no_gpu_sync_per_step(row):
    def syncs(callbacks, batches):
        return count_syncs(lambda: fit(callbacks, model(row), loader(16 * batches), max_epochs=1, accelerator="cuda"))

    plain, ours = (syncs(make(), 8) - syncs(make(), 4) for make in (list, lambda: [row.active()]))
    assert (ours > plain) is ("waits" in row.exempt)


def test_two_ranks_on_one_device_are_identical(two_ranks, tmp_path):
    """On the GPU if there is one, else on the CPU: ranks can share a device."""
    run_script(*two_ranks("device_worker.py"), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["device"] == second["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert identical(first["weights"], second["weights"])
    if first["device"] == "cpu":
        expected = train(everything(), Digits(), [0, 1], accumulate_grad_batches=2, max_epochs=1)
        assert_close(first["weights"], expected, **TOLERANCE)


def test_these_tests_and_the_benchmarks_need_no_extra():
    """A machine with a GPU may have little installed."""
    without = "import sys; sys.modules.update(dict.fromkeys(['jsonargparse', 'optuna'])); "
    printed = run_script("-c", f"{without}import device_worker, test_cuda, tests.benchmarks.__main__; print('imported')")
    assert printed == "imported\n"


def test_bandwidth_benchmark_runs():
    rows = measure_bandwidth("cuda" if torch.cuda.is_available() else "cpu", millions=4, seconds=0.05)
    assert len(rows) == 5
    assert all(row.fraction > 0 for row in rows)
