"""FSDP2 over tensor parallelism on a 2×2 mesh of four ranks, compared with one process: the laws over the table."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import PRUNING, masks_of
from helpers import TOLERANCE, identical
from mesh_worker import RANKS, Meshed, dropped_peaks, layer, train_and_log, values
from processes import run_script
from table import ROWS
from torch.distributed.tensor import Partial
from torch.testing import assert_close

from lightning_reg._tensors.shards import divides

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:PeakGradientDropping with k=1 drops every entry of plain_weight"),
]
every_row = pytest.mark.parametrize("name", ROWS)
ONE_PROCESS = {"accumulate_grad_batches": 2}


def comparable(metrics):
    """Return metrics that do not depend on how the samples of a step are divided into batches."""
    by_batch = ("reg/ActivityPenalty-ReLU/penalty", "reg/OverfittingMonitor/gap_low", "reg/OverfittingMonitor/gap_high")
    return {name: value for name, value in metrics.items() if name not in by_batch}


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    run_script(*two_ranks("mesh_worker.py", ranks=RANKS), str(folder), timeout=600)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def plain():
    return train_and_log([], Meshed(), [0, 1], **ONE_PROCESS)[0]


@every_row
def test_replicas_are_identical_and_log_the_same(ranks, name):
    weights, logged = ranks[0][name]
    for others, other_logs in (rank[name] for rank in ranks[1:]):
        assert identical(others, weights)
        assert other_logs == logged


@every_row
def test_training_and_metrics_equal_one_process(ranks, name, plain):
    row = ROWS[name]
    if "tensor_parallel" in row.exempt:
        pytest.skip(row.exempt["tensor_parallel"])
    expected, expected_logs = train_and_log([row.active()], Meshed(**row.options), [0, 1], **ONE_PROCESS)
    weights, logged = ranks[0][name]
    assert_close(weights, expected, **TOLERANCE)
    assert logged.keys() == expected_logs.keys()
    for step, metrics in expected_logs.items():
        assert comparable(logged[step]) == pytest.approx(comparable(metrics), rel=1e-3, abs=1e-6)
    if "changes_training" not in row.exempt:  # the negative control
        other = train_and_log([], Meshed(**row.options), [0, 1], **ONE_PROCESS)[0] if row.options else plain
        with pytest.raises(AssertionError):
            assert_close(weights, other, **TOLERANCE)


@pytest.mark.parametrize("variant", PRUNING)
def test_masks_equal_one_process(ranks, variant):
    """The weights are bit-identical, so the masks must be equal."""
    expected = masks_of(Meshed(), PRUNING[variant], [0, 1], **ONE_PROCESS)
    assert 0 < sum(int(mask.sum()) for mask in expected.values()) < sum(mask.numel() for mask in expected.values())
    for rank in ranks:
        assert identical(rank[f"masks, {variant}"], expected)


@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
def test_norms_penalties_and_peaks_count_all_shards(ranks, style):
    for rank in ranks:
        placements, found, peaks = rank[style]
        assert ("_StridedShard" in placements) is (style == "ColwiseParallel")
        assert found == pytest.approx(values(list(layer().parameters())), rel=1e-5)
        assert all(map(torch.equal, peaks, dropped_peaks(list(layer().parameters()))))


def test_unknown_placement_is_refused_by_name():
    with pytest.raises(TypeError, match="Partial"):
        divides(Partial())
