"""Two ranks that ``pytorch_lightning`` drives equal two ranks that ``lightning.pytorch`` drives, to the last bit."""

from __future__ import annotations

import pytest
from pytorch_lightning_ranks_worker import checks
from table import ROWS

WORKER = "pytorch_lightning_ranks_worker.py"
NEW, OLD = "lightning.pytorch", "pytorch_lightning"


@pytest.mark.parametrize("what", checks(None))
def test_both_packages_train_alike_on_two_ranks(ranks, what):
    """The weights of both ranks, and each metric on each of them."""
    for rank in ranks:
        assert "traceback" not in rank[OLD][what], rank[OLD][what]["traceback"]
        assert rank[OLD][what] == rank[NEW][what]
    assert ranks[0][OLD][what]["weights"] == ranks[1][OLD][what]["weights"]
    kind, _, name = what.partition(" ")
    if kind == "active" and "changes_training" not in ROWS[name].exempt:
        assert ranks[0][OLD][what]["weights"] != ranks[0][OLD]["plain"]["weights"]
        assert ranks[0][OLD][what]["logged"]


def test_accumulation_that_changes_is_counted(ranks):
    """Two steps of one batch, then two epochs of one step of two batches; the third step ends with the fourth batch."""
    for rank in ranks:
        logged = rank[OLD]["counted"]["logged"]
        strengths = [metrics["reg/L1Penalty/strength"] for metrics in logged.values()]
        assert strengths == pytest.approx([0.1 * batches / 4 for batches in (0, 1, 2, 4)])


def test_both_ranks_skip_the_step_that_one_of_them_cannot_take(ranks):
    for rank in ranks:
        assert rank[OLD]["guarded"]["monitored"]["reg/NonFiniteGradientGuard/nonfinite_steps"] == 2
