"""Pruning on two ranks, compared with one process and with other kinds of optimizers."""

from __future__ import annotations

import pytest
from helpers import identical
from pruning_worker import REWINDS

WORKER = "pruning_worker.py"


@pytest.mark.parametrize("name", REWINDS)
def test_state_in_each_ranks_own_optimizer_is_cleared(ranks, name):
    """ZeroRedundancyOptimizer trains as Adam does, bit for bit."""
    for rank in ranks:
        assert identical(rank[f"{name}, WithZero"], rank[f"{name}, WithAdam"])
        assert identical(rank[f"{name}, WithZero"], ranks[0][f"{name}, WithZero"])
