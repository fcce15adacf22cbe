"""The laws that need processes, over the table: every callback, all pairs, random sets, sharded and resumed runs."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import Digits, Sharded, train
from helpers import TOLERANCE, identical
from laws_worker import TENSOR_PARALLEL, Parallel, made, three_steps
from table import PAIRS, ROWS, SEED, SETS
from torch.testing import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*acts on parameters that the optimizer decays too"),
]
WORKER = "laws_worker.py"
every_row = pytest.mark.parametrize("name", ROWS)


def one_process(row, model, **trainer):
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, **trainer}
    ours, plain = (train(callbacks, model(**row.options), [0, 1], **options) for callbacks in ([row.active()], []))
    return ours, plain


def check(found, ours, plain, row):
    """Compare with one process, and with one without the callback: the tolerance is narrow enough for it to be seen."""
    assert_close(found, ours, **TOLERANCE)
    if "changes_training" in row.exempt:
        assert identical(ours, plain)
    else:
        with pytest.raises(AssertionError):
            assert_close(found, plain, **TOLERANCE)


@every_row
def test_replicas_are_identical_and_equal_one_process(ranks, name):
    found, other = (rank[f"DDP, {name}"] for rank in ranks)
    assert identical(found, other)
    check(found, *one_process(ROWS[name], Digits), ROWS[name])


@every_row
def test_shards_equal_whole_parameters(ranks, name):
    found, other = (rank[f"sharded, {name}"] for rank in ranks)
    if "sharded" in ROWS[name].exempt:
        assert found == other == f"{name} does not work with sharded parameters: use DDP"
        return
    assert identical(found, other)
    check(found, *one_process(ROWS[name], Sharded), ROWS[name])


def test_all_pairs_keep_replicas_identical_in_any_order_and_equal_one_process(ranks):
    """The two ranks list each pair in opposite orders."""
    differ = [pair for pair in PAIRS if not torch.equal(*(rank[" + ".join(pair)] for rank in ranks))]
    assert not differ
    far = []
    for pair in PAIRS:
        alone = three_steps(made(pair), pair, [0, 1], accumulate_grad_batches=2)
        if not torch.allclose(ranks[0][" + ".join(pair)], alone, **TOLERANCE):
            far.append(pair)
    assert not far
    assert len({tuple(ranks[0][" + ".join(pair)].tolist()) for pair in PAIRS}) > len(PAIRS) / 2  # they do not all do the same


@pytest.mark.parametrize("names", [pytest.param(names, id=f"seed {SEED}, {' '.join(names)}") for names in SETS])
def test_random_sets_keep_replicas_identical_in_any_order_and_equal_one_process(ranks, names):
    found, other = (rank[" + ".join(names)] for rank in ranks)
    assert torch.equal(found, other)
    assert_close(found, three_steps(made(names), names, [0, 1], accumulate_grad_batches=2), **TOLERANCE)
    without = [name for name in names if "changes_training" in ROWS[name].exempt]
    with pytest.raises(AssertionError):
        assert_close(found, three_steps(made(without), names, [0, 1], accumulate_grad_batches=2), **TOLERANCE)


def test_accumulation_without_synchronization_equals_one_process(ranks):
    """DDP reduces only in the last micro-batch of a step."""
    everything = [name for name in ROWS if name != "WeightDecayScheduler"]
    assert identical(ranks[0]["accumulated"], ranks[1]["accumulated"])
    alone = train(made(everything), Digits(), [0, 1], accumulate_grad_batches=4)
    assert_close(ranks[0]["accumulated"], alone, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["accumulated"], train(made(everything), Digits(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


@pytest.mark.parametrize("kind", ["sharded files", "whole files"])
def test_sharded_runs_resume_in_mid_epoch_to_the_last_bit(ranks, kind):
    for rank in ranks:
        uninterrupted, resumed = rank[kind]
        assert identical(uninterrupted, resumed)


def test_tensor_parallel_layers_equal_whole_ones(ranks):
    """Every rank sees every sample; units lie across ranks in the layer that is divided by columns."""
    assert identical(ranks[0]["tensor parallel"], ranks[1]["tensor parallel"])
    alone, plain = (train(callbacks, Parallel(), [0], max_epochs=1) for callbacks in (made(TENSOR_PARALLEL), []))
    assert_close(ranks[0]["tensor parallel"], alone, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(alone, plain, **TOLERANCE)
