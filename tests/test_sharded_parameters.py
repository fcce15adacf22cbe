"""What ``ParameterMonitor`` measures of sharded parameters: the same as of whole ones, on every rank."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

WORKER = "parameter_monitor_worker.py"


def test_sharded_and_whole_parameters(ranks):
    """Shards are uneven, so that the ranks stack them in different batches, and some are empty."""
    assert len(ranks[0]) > 70
    for first, second in zip(ranks[0].items(), ranks[1].items(), strict=True):
        (case, found), (_, other) = first, second
        sharded, whole = found["sharded"], found["whole"]
        assert sharded["values"] == other["sharded"]["values"], case
        assert sharded["values"] == pytest.approx(whole["values"], rel=1e-4, abs=1e-7), case
        assert sharded["relative"] == other["sharded"]["relative"] == pytest.approx(whole["relative"], rel=1e-4), case
        assert_close(sharded["weights"], whole["weights"], rtol=0, atol=0)


def test_the_parts_alone_give_other_values(ranks):
    """If each rank measured its own part, the tests above would fail."""
    for rank in ranks:
        case = rank["L2, matrices, all sharded, gradient, 0"]
        wrong = [abs(part / whole - 1) > 1e-2 for part, whole in zip(case["sharded"]["parts"], norms(case), strict=True)]
        assert sum(wrong) >= len(wrong) - 1  # the first rank holds all of the tensor whose other shard is empty


def norms(case):
    """Return the norms of the whole weights."""
    return [value for key, value in case["whole"]["values"].items() if key.endswith("/weight_norm")]
