"""Resume after a process is killed mid-epoch, with one of each callback."""

from __future__ import annotations

import torch
from helpers import identical
from kill_worker import KILLED_AT
from processes import run_script, start


def test_resume_after_kill_matches_uninterrupted_run(two_ranks, tmp_path):
    command = [*two_ranks("kill_worker.py"), str(tmp_path)]
    killed = start(*command, "killed")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    run_script(*command, "resumed")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["from"] == f"step={KILLED_AT - 1}.ckpt"
    checkpoint = torch.load(tmp_path / "killed" / ranks[0]["from"], weights_only=False)["state_dict"]
    for rank in ranks:
        assert identical(rank["uninterrupted"], rank["resumed"])
    assert not identical(ranks[0]["uninterrupted"], checkpoint)
