"""Comparing and choosing where Lightning trains each run on two ranks."""

from __future__ import annotations

import json

import pytest
from processes import HERE, run_script

from lightning_reg.tuning.experiment import TrainerRun
from lightning_reg.tuning.runs import may_start_ranks


@pytest.mark.slow
def test_ddp_started_from_the_calling_script(tmp_path):
    """Both ranks get what rank 0 measured, and the script goes on in both."""
    run_script(str(HERE / "tuning_ranks_worker.py"), str(tmp_path), folder=tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first["trials"]) == 4
    assert len({value for values in first["values"].values() for value in values}) == 6
    assert first["overlap"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, True),
        ({"accelerator": "cpu"}, False),
        ({"devices": 1}, False),
        ({"devices": 2, "accelerator": "cpu"}, True),
        ({"devices": "auto"}, True),
        ({"devices": 1, "num_nodes": 2}, True),
    ],
)
def test_which_runs_may_start_ranks(trainer, expected):
    assert may_start_ranks(TrainerRun(lambda: None, lambda split: None, "loss", trainer)) is expected
    assert not may_start_ranks(lambda callbacks, split, seed: 0.0)
