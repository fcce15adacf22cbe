"""Constraints and masks hold after an average of the replicas, and the replicas stay equal."""

from __future__ import annotations

import pytest
import torch
from helpers import identical

PRUNED = "net.4.weight"  # as in the worker, whose imports warn
WORKER = "averaging_worker.py"
averaged = pytest.mark.parametrize("kind", ["strategy", "optimizer"])


@averaged
def test_unit_norms_hold_after_an_average(ranks, kind):
    """The average of unit vectors is shorter."""
    for rank in ranks:
        assert len(rank[f"{kind}, deviations"]) == 15
        assert max(rank[f"{kind}, deviations"]) < 1e-5


@averaged
def test_all_ranks_prune_the_same_weights(ranks, kind):
    """Although their weights differ when they are pruned, and the share is exact."""
    masks = [rank[kind][PRUNED] == 0 for rank in ranks]
    assert torch.equal(*masks)
    assert masks[0].sum() == masks[0].numel() // 2


@averaged
def test_replicas_are_equal_after_an_average(ranks, kind):
    assert identical(ranks[0][kind], ranks[1][kind])


def test_replicas_differ_where_nothing_averages_them(ranks):
    """Otherwise, these tests would show nothing."""
    assert not identical(ranks[0]["apart"], ranks[1]["apart"])
    assert identical(ranks[0]["plain"], ranks[1]["plain"])
    assert not (ranks[0]["plain"][PRUNED] == 0).any()
