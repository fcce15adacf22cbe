"""The same on a GPU. What needs one is skipped, and says so, where there is none."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch
from distributed_worker import Digits, train
from helpers import fit, loader, same
from processes import HERE, environment
from table import ROWS, everything
from test_laws import changes, distance, model
from torch.testing import assert_close

from tests.benchmarks.cuda import reached, waits

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
every_callback = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
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
        return waits(lambda: fit(callbacks, model(row), loader(16 * batches), max_epochs=1, accelerator="cuda"))

    plain, ours = (counted(made(), 8) - counted(made(), 4) for made in (list, lambda: [row.active()]))
    assert (ours > plain) is ("waits" in row.exempt)


def test_two_ranks_on_one_device_stay_identical(tmp_path):
    """On the GPU where there is one, else on the processor: what is tested is that ranks can share a device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    command = [sys.executable, str(HERE / "device_worker.py"), str(tmp_path)]
    running = [
        subprocess.Popen(command, env={**environment(), **shared, "RANK": rank, "NODE_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=300)[1].decode()[-2000:] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["device"] == other["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    if one["device"] == "cpu":
        alone = train(everything(), Digits(), [0, 1], accumulate_grad_batches=2, max_epochs=1)
        assert_close(one["weights"], alone, rtol=1e-4, atol=1e-6)


def test_what_is_measured_on_a_gpu_runs_anywhere():
    found = reached("cuda" if torch.cuda.is_available() else "cpu", millions=4, seconds=0.05)
    assert len(found) == 4
    assert all(row.share > 0 for row in found)
