"""A process that is killed in mid-epoch, with one of each callback."""

from __future__ import annotations

import torch
from helpers import identical
from kill_worker import KILLED_AT
from processes import run_script, start


def test_what_resumes_after_a_kill_reaches_the_weights_of_the_uninterrupted_run(two_ranks, tmp_path):
    command = [*two_ranks("kill_worker.py"), str(tmp_path)]
    killed = start(*command, "killed")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    run_script(*command, "resumed")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["from"] == f"step={KILLED_AT - 1}.ckpt"
    checkpoint = torch.load(tmp_path / "killed" / ranks[0]["from"], weights_only=False)["state_dict"]
    for found in ranks:
        assert identical(found["whole"], found["resumed"])
    assert not identical(ranks[0]["whole"], checkpoint)
