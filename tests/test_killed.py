"""A process that is killed in mid-epoch, with one of each callback."""

from __future__ import annotations

import subprocess
import sys

import torch
from kill_worker import KILLED_AT
from processes import HERE, environment, run_script

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "kill_worker.py")]


def test_what_resumes_after_a_kill_reaches_the_weights_of_the_uninterrupted_run(tmp_path):
    command = [sys.executable, *LAUNCHER, str(tmp_path), "killed"]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    run_script(*LAUNCHER, str(tmp_path), "resumed")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["from"] == f"step={KILLED_AT - 1}.ckpt"
    checkpoint = torch.load(tmp_path / "killed" / ranks[0]["from"], weights_only=False)["state_dict"]
    for found in ranks:
        assert all(torch.equal(found["whole"][name], found["resumed"][name]) for name in found["whole"])
    assert not all(torch.equal(checkpoint[name], ranks[0]["whole"][name]) for name in ranks[0]["whole"])
