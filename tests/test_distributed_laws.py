"""The laws that need several processes, over the table: each callback, all pairs, random sets, and sharded and resumed runs."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import Digits, Sharded, train
from helpers import TOLERANCE, identical
from laws_worker import TENSOR_PARALLEL, Parallel, active_callbacks, train_three_steps
from table import PAIRS, ROWS, SEED, SETS
from torch.testing import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*acts on parameters that the optimizer also decays"),
    pytest.mark.filterwarnings("ignore:PeakGradientDropping with k=1 drops every entry of plain_weight"),
]
WORKER = "laws_worker.py"
every_row = pytest.mark.parametrize("name", ROWS)


def train_one_process(row, model, **trainer):
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, **trainer}
    ours, plain = (train(callbacks, model(**row.options), [0, 1], **options) for callbacks in ([row.active()], []))
    return ours, plain


def check(result, ours, plain, row):
    """Compare with one process. The tolerance must be narrow enough to detect the callback."""
    assert_close(result, ours, **TOLERANCE)
    if "changes_training" in row.exempt:
        assert identical(ours, plain)
    else:
        with pytest.raises(AssertionError):
            assert_close(result, plain, **TOLERANCE)


@every_row
def test_replicas_equal_one_process(ranks, name):
    result, other = (rank[f"DDP, {name}"] for rank in ranks)
    assert identical(result, other)
    check(result, *train_one_process(ROWS[name], Digits), ROWS[name])


@every_row
def test_sharded_training_equals_one_process(ranks, name):
    result, other = (rank[f"sharded, {name}"] for rank in ranks)
    assert identical(result, other)
    check(result, *train_one_process(ROWS[name], Sharded), ROWS[name])


def test_pairs_equal_one_process_in_any_order(ranks):
    """The two ranks list each pair in opposite orders."""
    differing = [pair for pair in PAIRS if not torch.equal(*(rank[" + ".join(pair)] for rank in ranks))]
    assert not differing
    mismatches = []
    for pair in PAIRS:
        expected = train_three_steps(active_callbacks(pair), pair, [0, 1], accumulate_grad_batches=2)
        if not torch.allclose(ranks[0][" + ".join(pair)], expected, **TOLERANCE):
            mismatches.append(pair)
    assert not mismatches
    assert len({tuple(ranks[0][" + ".join(pair)].tolist()) for pair in PAIRS}) > len(PAIRS) / 2  # most pairs differ


@pytest.mark.parametrize("names", [pytest.param(names, id=f"seed {SEED}, {' '.join(names)}") for names in SETS])
def test_random_sets_equal_one_process_in_any_order(ranks, names):
    result, other = (rank[" + ".join(names)] for rank in ranks)
    assert torch.equal(result, other)
    assert_close(result, train_three_steps(active_callbacks(names), names, [0, 1], accumulate_grad_batches=2), **TOLERANCE)
    without = [name for name in names if "changes_training" in ROWS[name].exempt]
    with pytest.raises(AssertionError):
        assert_close(
            result, train_three_steps(active_callbacks(without), names, [0, 1], accumulate_grad_batches=2), **TOLERANCE
        )


def test_accumulation_under_ddp_equals_one_process(ranks):
    """DDP synchronizes only in the last micro-batch of a step."""
    everything = [name for name, row in ROWS.items() if not row.options]
    assert identical(ranks[0]["accumulated"], ranks[1]["accumulated"])
    expected = train(active_callbacks(everything), Digits(), [0, 1], accumulate_grad_batches=4)
    assert_close(ranks[0]["accumulated"], expected, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(
            ranks[0]["accumulated"],
            train(active_callbacks(everything), Digits(), [0, 1], accumulate_grad_batches=2),
            **TOLERANCE,
        )


@pytest.mark.parametrize("kind", ["sharded checkpoint", "full checkpoint"])
def test_sharded_resume_matches_uninterrupted_run(ranks, kind):
    for rank in ranks:
        uninterrupted, resumed = rank[kind]
        assert identical(uninterrupted, resumed)


def test_tensor_parallel_training_equals_one_process(ranks):
    """Every rank sees every sample. In one of the layers, units span ranks."""
    assert identical(ranks[0]["tensor parallel"], ranks[1]["tensor parallel"])
    expected, plain = (train(callbacks, Parallel(), [0], max_epochs=1) for callbacks in (active_callbacks(TENSOR_PARALLEL), []))
    assert_close(ranks[0]["tensor parallel"], expected, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(expected, plain, **TOLERANCE)
