"""``OverfittingMonitor`` on two ranks: it changes nothing, and each rank evaluates an equal share."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

WORKER = "monitors_worker.py"
strategies = pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])


@strategies
def test_nothing_changes(ranks, strategy):
    for rank in ranks:
        ours, plain = rank[strategy], rank[f"{strategy}, plain"]
        assert_close(ours["state"], plain["state"], rtol=0.0, atol=0.0)
        assert str(ours["logged"]) == str(plain["logged"])
        assert torch.equal(ours["random"], plain["random"])
        assert plain["metrics"].items() <= ours["metrics"].items()


@strategies
def test_ranks_have_the_same_parameters(ranks, strategy):
    """Otherwise, the value of a sample would depend on the rank that evaluates it, and the next test would compare nothing."""
    first, second = (
        {name: value for name, value in rank[strategy]["state"].items() if "running" not in name} for rank in ranks
    )
    assert "net.2.0.weight" in first
    assert_close(first, second, rtol=0.0, atol=0.0)


@strategies
def test_values_are_equal_on_all_ranks_and_those_of_the_samples(ranks, strategy):
    first, second = (rank[strategy] for rank in ranks)
    assert first["points"] == second["points"]
    assert len(first["points"]) == 4  # two monitors, two epochs
    assert first["batches"] == second["batches"]
    assert all(2 * count >= 20 for count in first["batches"])
    assert first["metrics"]["reg/loss/val"] == pytest.approx(first["metrics"]["val/loss"], abs=0.02)
    # Of 303 samples, validation evaluates one twice, and the monitor, with 151 on each rank, leaves one out.
    correct, in_validation = 302 * first["metrics"]["reg/accuracy/val"], 304 * first["metrics"]["val/accuracy"]
    assert [correct, in_validation] == pytest.approx([round(correct), round(in_validation)], abs=1e-3)
    assert round(in_validation) - round(correct) in (0, 1, 2)
    assert first["metrics"]["reg/accuracy/gap_low"] < first["metrics"]["reg/accuracy/gap_high"]
