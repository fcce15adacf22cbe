"""The same on a GPU. What needs one is skipped, and says so, where there is none."""

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
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@needs_cuda
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@every_callback
def test_a_gpu_trains_alike(row, precision):
    on_gpu, plain = (
        fit(callbacks, model(row), max_epochs=1, accelerator="cuda", precision=precision) for callbacks in ([row.active()], [])
    )
    assert all(p.isfinite().all() for p in on_gpu.parameters())
    assert same(on_gpu, plain) is not changes(row)
    if row.inactive:
        assert same(fit([row.inactive()], model(row), max_epochs=1, accelerator="cuda", precision=precision), plain)


@needs_cuda
@every_callback
def test_a_gpu_trains_as_the_cpu_does(row):
    if "devices" in row.exempt:
        pytest.skip(row.exempt["devices"])

    def trained(callbacks, accelerator):
        made = model(row)
        made.net[3].p = 0.0  # each device draws masks of its own
        return fit(callbacks, made, max_epochs=1, accelerator=accelerator).cpu()

    on_gpu, on_cpu, plain = trained([row.active()], "cuda"), trained([row.active()], "cpu"), trained([], "cpu")
    if changes(row):
        assert distance(on_gpu, on_cpu) < 0.1 * distance(plain, on_cpu)


@needs_cuda
@every_callback
def test_no_step_makes_the_host_wait_for_the_gpu(row):
    def counted(callbacks, batches):
        return count_syncs(lambda: fit(callbacks, model(row), loader(16 * batches), max_epochs=1, accelerator="cuda"))

    plain, ours = (counted(made(), 8) - counted(made(), 4) for made in (list, lambda: [row.active()]))
    assert (ours > plain) is ("waits" in row.exempt)


def test_two_ranks_on_one_device_stay_identical(two_ranks, tmp_path):
    """On the GPU where there is one, else on the processor: what is tested is that ranks can share a device."""
    run_script(*two_ranks("device_worker.py"), str(tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["device"] == other["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert identical(one["weights"], other["weights"])
    if one["device"] == "cpu":
        alone = train(everything(), Digits(), [0, 1], accumulate_grad_batches=2, max_epochs=1)
        assert_close(one["weights"], alone, **TOLERANCE)


def test_what_is_measured_on_a_gpu_runs_anywhere():
    found = measure_bandwidth("cuda" if torch.cuda.is_available() else "cpu", millions=4, seconds=0.05)
    assert len(found) == 4
    assert all(row.fraction > 0 for row in found)
