"""Pruning on two ranks, compared with one process and with other kinds of optimizers."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import Sharded, masks_of, train
from helpers import TOLERANCE, identical
from processes import run_script
from pruning_worker import RESUMED, REWINDS, SHARDED, ShardedZeros, cases, rewound
from torch.testing import assert_close

from lightning_reg import WeightPruning

WORKER = "pruning_worker.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*protects weights in these tensors"),
]


@pytest.fixture(scope="module")
def runs(two_ranks, tmp_path_factory):
    """Train on two ranks, resume in new processes, and return what each rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    for more in ([], ["resume"]):
        run_script(*two_ranks(WORKER), str(folder), *more, timeout=600)
    return [(torch.load(folder / f"{rank}.pt"), torch.load(folder / f"resumed {rank}.pt")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(runs):
    return [trained for trained, _ in runs]


@pytest.mark.parametrize("name", REWINDS)
def test_state_in_each_ranks_own_optimizer_is_cleared(ranks, name):
    """ZeroRedundancyOptimizer trains as Adam does, bit for bit."""
    for rank in ranks:
        assert identical(rank[f"{name}, WithZero"], rank[f"{name}, WithAdam"])
        assert identical(rank[f"{name}, WithZero"], ranks[0][f"{name}, WithZero"])


@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_sharded_runs_that_rewind_resume_in_a_new_process(runs, case):
    """A rewound optimizer has no state, which sharded checkpoints cannot hold."""
    for trained, resumed in runs:
        assert identical(resumed["-".join(case)], trained["-".join(case)])


@pytest.mark.parametrize("name", RESUMED)
def test_checkpoints_do_not_change_a_sharded_run_that_rewinds(ranks, name):
    one_process = train([rewound("1ep")], RESUMED[name](), [0, 1], accumulate_grad_batches=2, max_epochs=3)
    for rank in ranks:
        assert identical(rank[f"{name}-1ep-full"], rank[f"unsaved, {name}"])
        assert_close(rank[f"unsaved, {name}"], one_process, **TOLERANCE)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_masks_equal_those_of_one_process(ranks, name):
    one_process = masks_of(Sharded(), SHARDED[name], [0, 1], accumulate_grad_batches=2)
    without = masks_of(Sharded(), {"params": "weights", "sparsity": 0.6, "min_kept": 0.0}, [0, 1], accumulate_grad_batches=2)
    assert not identical(one_process, without)
    for rank in ranks:
        assert identical(rank[f"masks, {name}"], one_process)


@pytest.mark.parametrize("grown", [0.0, 0.6])
def test_zeros_of_sharded_weights_are_kept(ranks, grown):
    one_process = train([WeightPruning(grown, keep_zeros=True)], ShardedZeros(), [0, 1], accumulate_grad_batches=2)
    before = {name: p == 0 for name, p in ShardedZeros().named_parameters() if p.ndim > 1}
    assert sum(int(mask.sum()) for mask in before.values()) > 100
    for rank in ranks:
        trained = rank[f"zeros, {grown}"]
        assert_close(trained, one_process, **TOLERANCE)
        assert identical({name: trained[name] == 0 for name in before}, {name: one_process[name] == 0 for name in before})
        assert all((trained[name][mask] == 0).all() for name, mask in before.items())
