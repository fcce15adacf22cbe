"""Two processes under DDP against one process on the same global batches."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import (
    WAYS,
    Digits,
    Poisoned,
    Sharded,
    Unused,
    drawn,
    kept,
    masks_of,
    mean_of_draws,
    sharded_techniques,
    techniques,
    train,
)
from helpers import TOLERANCE, identical
from torch.testing import assert_close

from lightning_reg import L1Penalty, L2Penalty, NonFiniteGradientGuard, WeightDecay
from lightning_reg.functional import smallest_entries

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
WORKER = "distributed_worker.py"


def test_replicas_are_bit_identical_with_all_techniques_at_once(ranks):
    assert identical(ranks[0]["all"], ranks[1]["all"])
    assert identical(ranks[0]["unused"], ranks[1]["unused"])
    assert not identical(ranks[0]["unseeded"], ranks[1]["unseeded"])  # what drawing without a common seed comes to


def test_penalties_of_large_shards_are_summed_exactly(ranks):
    entries = 4 * 3001 * 2000
    for values in (rank["values"] for rank in ranks):
        assert_close(values["L1"].item(), 0.3 * entries, rtol=1e-6, atol=0.0)
        assert_close(values["L2"].item(), 0.3**2 / 2 * entries, rtol=1e-6, atol=0.0)
        assert abs(values["norm"].item() - 0.3 * entries / 4) > 1e-4 * entries  # torch's keeps one running sum


def test_ranks_draw_different_masks_if_their_seeds_differ_and_stay_identical(ranks):
    """As with nn.Dropout: ranks that were seeded alike draw the same masks, each for its own samples."""
    for apart in (True, False):
        (one, other) = (rank["masks"][apart] for rank in ranks)
        assert identical(one["weights"], other["weights"])
        for name in ("net.2", "net.3"):
            assert one["masks"][name].any()
            assert torch.equal(one["masks"][name], other["masks"][name]) is not apart


def test_two_ranks_equal_one_process_on_the_same_global_batches(ranks):
    one_process = train(techniques(), Digits(), [0, 1], accumulate_grad_batches=2)
    assert_close(ranks[0]["all"], one_process, **TOLERANCE)


@pytest.mark.parametrize("changed", range(len(techniques())))
def test_leaving_out_any_one_technique_would_show(ranks, changed):
    """The negative control: the tolerance is narrow enough for each technique to be seen."""
    others = techniques()[:changed] + techniques()[changed + 1 :]
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["all"], train(others, Digits(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


def test_a_penalty_counted_once_per_micro_batch_would_show(ranks):
    doubled = [L1Penalty(2e-3) if isinstance(callback, L1Penalty) else callback for callback in techniques()]
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["all"], train(doubled, Digits(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


@pytest.mark.parametrize("run", ["unused", "unused, plain DDP"])
def test_an_unused_layer_is_penalized_whether_ddp_looks_for_it_or_not(ranks, run):
    one_process = train([L2Penalty(0.1, params="all")], Unused(), [0, 1], accumulate_grad_batches=2)
    assert_close(ranks[0][run], one_process, **TOLERANCE)
    assert not torch.equal(one_process["unused.weight"], Unused().unused.weight)
    assert "mark a variable ready only once" in ranks[0]["naive, DDP"]  # what adding it to the loss comes to there


def test_the_loss_route_is_refused_where_it_cannot_be_exact(ranks):
    assert ranks[0]["refused, DDP"] == (
        "L2Penalty: inject='loss' is not exact under DDP with find_unused_parameters or static_graph; "
        "use inject='gradient' or 'auto'"
    )
    assert ranks[0]["refused, sharded"] == (
        "L2Penalty: inject='loss' is not exact for sharded parameters; use inject='gradient' or 'auto'"
    )
    assert ranks[0]["naive, sharded"]  # a Python sum over DTensors and others fails within torch, which words it differently


def test_sharded_parameters_equal_whole_ones(ranks):
    """FSDP2, with one parameter left whole: every technique that acts on shards, and what leaving one out comes to."""
    one_process = train(sharded_techniques(), Sharded(), [0, 1], accumulate_grad_batches=2)
    assert identical(ranks[0]["sharded"], ranks[1]["sharded"])
    assert_close(ranks[0]["sharded"], one_process, **TOLERANCE)
    for changed in range(len(sharded_techniques())):
        others = sharded_techniques()[:changed] + sharded_techniques()[changed + 1 :]
        with pytest.raises(AssertionError):
            assert_close(ranks[0]["sharded"], train(others, Sharded(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


@pytest.mark.parametrize("run", ["guarded, DDP", "guarded, sharded"])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(ranks, run):
    """Only one rank holds the bad gradient under FSDP2; a decision of its own would leave the ranks with different steps."""
    one_process = train([NonFiniteGradientGuard(), WeightDecay(0.1)], Poisoned(), [0, 1], accumulate_grad_batches=2)
    assert identical(ranks[0][run], ranks[1][run])
    assert all(p.isfinite().all() for p in one_process.values())
    assert_close(ranks[0][run], one_process, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(ranks[0][run], train([WeightDecay(0.1)], Sharded(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_and_shards_prune_what_one_process_prunes(ranks, way):
    """From weights that are the same to the last bit; torch.equal, no tolerance."""
    for kind, model in (("DDP", Digits), ("sharded", Sharded)):
        one_process = masks_of(model(), WAYS[way], [0, 1], accumulate_grad_batches=2)
        pruned = sum(int(mask.sum()) for mask in one_process.values())
        assert 0 < pruned < sum(mask.numel() for mask in one_process.values())
        for rank in (0, 1):
            assert identical(ranks[rank][f"masks, {kind}, {way}"], one_process)


def test_of_scores_that_differ_between_ranks_the_mean_counts(ranks):
    alone = masks_of(Digits(), {"criterion": mean_of_draws}, [0, 1], accumulate_grad_batches=2)
    own = masks_of(Digits(), {"criterion": lambda name, p: drawn(p, 0)}, [0, 1], accumulate_grad_batches=2)
    for rank in ranks:
        assert identical(rank["masks, scores of each rank"], alone)
    assert not identical(own, alone)


def test_a_threshold_for_each_rank_would_show(ranks):
    scores = {name: p.detach().abs() for name, p in Sharded().named_parameters() if p.ndim > 1}
    halves = [{name: score.chunk(2)[rank] for name, score in scores.items() if len(score) > 1} for rank in (0, 1)]
    found = [
        smallest_entries(list(half.values()), round(0.6 * sum(score.numel() for score in half.values()))) for half in halves
    ]
    naive = {name: torch.cat(parts) for name, *parts in zip(halves[0], *found, strict=True)}
    masks = ranks[0]["masks, sharded, magnitude"]
    assert not identical(naive, {name: masks[name] for name in naive})


def test_sharded_pruning_trains_like_one_process_and_its_checkpoint_is_the_same(ranks):
    one_state, one_weights = kept([0, 1], accumulate_grad_batches=2)
    again_state, again_weights = kept([0, 1], one_state, accumulate_grad_batches=2)
    assert not identical(again_weights, one_weights)
    for run, state, weights in (
        ("pruned, sharded", one_state, one_weights),
        ("pruned again, sharded", again_state, again_weights),
    ):
        for rank in (0, 1):
            found_state, found = ranks[rank][run]
            assert_close(found, weights, **TOLERANCE)
            assert identical({n: p == 0 for n, p in found.items()}, {n: p == 0 for n, p in weights.items()})
            for name, (bits, shape) in state["state"]["masks"].items():
                assert torch.equal(found_state["state"]["masks"][name][0], bits)
                assert found_state["state"]["masks"][name][1] == shape
