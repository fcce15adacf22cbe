"""Training that resumes in a new process, compared with uninterrupted training."""

from __future__ import annotations

import pytest
import torch
from helpers import identical
from processes import HERE, run_script
from resume_worker import NAMES, STEPS, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train without interruption, then resume from the checkpoints in another process."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        torch.save(train(name, folder / name), folder / name / "uninterrupted.pt")
    run_script(str(HERE / "resume_worker.py"), str(folder))
    return folder


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_matches_uninterrupted_run(runs, name, step):
    uninterrupted = torch.load(runs / name / "uninterrupted.pt")
    resumed = torch.load(runs / name / f"resumed_{step}.pt")
    assert identical(uninterrupted, resumed)
    checkpoint = torch.load(runs / name / f"step={step}.ckpt", weights_only=False)["state_dict"]
    assert not identical(uninterrupted, checkpoint)
