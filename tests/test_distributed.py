"""Two processes compared with one process on the same global batches."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import (
    PRUNING,
    Digits,
    Poisoned,
    PoisonedOwnStep,
    Sharded,
    Unused,
    around_the_step,
    masks_of,
    mean_scores,
    random_scores,
    sharded_techniques,
    techniques,
    train,
    train_and_prune,
)
from helpers import TOLERANCE, identical
from torch.testing import assert_close

from lightning_reg import L1Penalty, L2Penalty, NonFiniteGradientGuard, WeightDecay
from lightning_reg.functional import smallest_entries

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
WORKER = "distributed_worker.py"


def test_replicas_are_identical_with_all_techniques(ranks):
    assert identical(ranks[0]["all"], ranks[1]["all"])
    assert identical(ranks[0]["unused"], ranks[1]["unused"])
    assert not identical(ranks[0]["unseeded"], ranks[1]["unseeded"])  # they differ without a common seed


def test_penalties_of_large_shards_are_exact(ranks):
    entries = 4 * 3001 * 2000
    for values in (rank["values"] for rank in ranks):
        assert_close(values["L1"].item(), 0.3 * entries, rtol=1e-6, atol=0.0)
        assert_close(values["L2"].item(), 0.3**2 / 2 * entries, rtol=1e-6, atol=0.0)
        assert abs(values["norm"].item() - 0.3 * entries / 4) > 1e-4 * entries  # torch keeps one running sum


def test_dropout_masks_depend_on_seed_of_rank(ranks):
    """As with nn.Dropout, ranks with the same seed draw the same masks, each for its own samples."""
    for seed_per_rank in (True, False):
        (first, second) = (rank["masks"][seed_per_rank] for rank in ranks)
        assert identical(first["weights"], second["weights"])
        for name in ("net.2", "net.3"):
            assert first["masks"][name].any()
            assert torch.equal(first["masks"][name], second["masks"][name]) is not seed_per_rank


def test_two_ranks_equal_one_process(ranks):
    one_process = train(techniques(), Digits(), [0, 1], accumulate_grad_batches=2)
    assert_close(ranks[0]["all"], one_process, **TOLERANCE)


@pytest.mark.parametrize("index", range(len(techniques())))
def test_tolerance_detects_each_technique(ranks, index):
    """The negative control: the tolerance is narrow enough to detect each technique."""
    others = techniques()[:index] + techniques()[index + 1 :]
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["all"], train(others, Digits(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


def test_tolerance_detects_doubled_penalty(ranks):
    doubled = [L1Penalty(2e-3) if isinstance(callback, L1Penalty) else callback for callback in techniques()]
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["all"], train(doubled, Digits(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


@pytest.mark.parametrize("run", ["unused", "unused, plain DDP"])
def test_unused_layer_is_penalized_under_ddp(ranks, run):
    one_process = train([L2Penalty(0.1, params="all")], Unused(), [0, 1], accumulate_grad_batches=2)
    assert_close(ranks[0][run], one_process, **TOLERANCE)
    assert not torch.equal(one_process["unused.weight"], Unused().unused.weight)
    assert "mark a variable ready only once" in ranks[0]["naive, DDP"]  # adding to the loss fails there


def test_inexact_loss_route_raises(ranks):
    assert ranks[0]["error, DDP"] == (
        "L2Penalty: inject='loss' is not exact under DDP with find_unused_parameters or static_graph; "
        "use inject='gradient' or 'auto'"
    )
    assert ranks[0]["error, sharded"] == (
        "L2Penalty: inject='loss' is not exact for sharded parameters; use inject='gradient' or 'auto'"
    )
    assert ranks[0]["naive, sharded"]  # a sum over DTensors and plain tensors fails within torch; its message varies


def test_sharded_training_equals_one_process(ranks):
    """All techniques that support FSDP2, with one unsharded parameter. The tolerance detects each technique."""
    one_process = train(sharded_techniques(), Sharded(), [0, 1], accumulate_grad_batches=2)
    assert identical(ranks[0]["sharded"], ranks[1]["sharded"])
    assert_close(ranks[0]["sharded"], one_process, **TOLERANCE)
    for index in range(len(sharded_techniques())):
        others = sharded_techniques()[:index] + sharded_techniques()[index + 1 :]
        with pytest.raises(AssertionError):
            assert_close(ranks[0]["sharded"], train(others, Sharded(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:NonFiniteGradientGuard.*infinite or NaN gradients")
@pytest.mark.parametrize("run", ["guarded, DDP", "guarded, sharded"])
def test_bad_gradient_on_one_rank_skips_step_on_all(ranks, run):
    """Under FSDP2, only one rank holds the bad gradient. If it decided alone, the ranks would take different steps."""
    one_process = train([NonFiniteGradientGuard(), WeightDecay(0.1)], Poisoned(), [0, 1], accumulate_grad_batches=2)
    assert identical(ranks[0][run], ranks[1][run])
    assert all(p.isfinite().all() for p in one_process.values())
    assert_close(ranks[0][run], one_process, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(ranks[0][run], train([WeightDecay(0.1)], Sharded(), [0, 1], accumulate_grad_batches=2), **TOLERANCE)


def test_replicas_with_sam_are_identical_and_skip_the_same_steps(ranks):
    assert identical(ranks[0]["SAM, DDP"], ranks[1]["SAM, DDP"])
    assert all(p.isfinite().all() for p in ranks[0]["SAM, DDP"].values())
    assert ranks[0]["SAM, DDP"]["net.1.weight"].abs().max() <= 0.1


@pytest.mark.filterwarnings("ignore:NonFiniteGradientGuard.*infinite or NaN gradients")
def test_sharded_training_with_an_own_step_equals_one_process(ranks):
    one_process = train(around_the_step(), PoisonedOwnStep(), [0, 1], accumulate_grad_batches=2)
    assert_close(ranks[0]["own step, sharded"], one_process, **TOLERANCE)
    without_decay = [callback for callback in around_the_step() if not isinstance(callback, WeightDecay)]
    other = train(without_decay, PoisonedOwnStep(), [0, 1], accumulate_grad_batches=2)
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["own step, sharded"], other, **TOLERANCE)


def test_a_bad_batch_of_one_rank_leaves_finite_buffers_on_all(ranks):
    """Each rank restores what became non-finite: without synchronization only the rank of the bad batch does."""
    synced = [rank["synchronized batch norm"] for rank in ranks]
    own = [rank["batch norm"] for rank in ranks]
    assert all(rank["finite"] for rank in (*synced, *own))
    for name in ("net.3.running_mean", "net.3.running_var"):
        assert all(torch.equal(rank["after"][name], rank["before"][name]) for rank in synced)
        assert own[1]["after"][name].isfinite().all()  # its own value, since DDP takes that of rank 0 in each forward pass
    assert not torch.equal(own[0]["after"]["net.3.running_mean"], own[0]["before"]["net.3.running_mean"])
    assert identical(synced[0]["after"], synced[1]["after"])


@pytest.mark.parametrize("variant", PRUNING)
def test_distributed_pruning_equals_one_process(ranks, variant):
    """The weights are bit-identical, so the masks must be equal."""
    for kind, model in (("DDP", Digits), ("sharded", Sharded)):
        one_process = masks_of(model(), PRUNING[variant], [0, 1], accumulate_grad_batches=2)
        pruned = sum(int(mask.sum()) for mask in one_process.values())
        assert 0 < pruned < sum(mask.numel() for mask in one_process.values())
        for rank in (0, 1):
            assert identical(ranks[rank][f"masks, {kind}, {variant}"], one_process)


def test_pruning_averages_scores_over_ranks(ranks):
    expected = masks_of(Digits(), {"criterion": mean_scores}, [0, 1], accumulate_grad_batches=2)
    not_averaged = masks_of(Digits(), {"criterion": lambda name, p: random_scores(p, 0)}, [0, 1], accumulate_grad_batches=2)
    for rank in ranks:
        assert identical(rank["masks, scores of each rank"], expected)
    assert not identical(not_averaged, expected)


def test_wrong_scores_raise_on_every_rank(ranks):
    """No rank waits for scores that another one cannot send."""
    where = "for '{}' as a tensor of its shape, got "
    part = (
        "scores of shape {}, expected {} (this rank's part: compute scores from the sharded parameter, not from p.to_local())"
    )
    for run, name, *got in (
        ("shards", "net.1.weight", *[part.format((16, 64), (32, 64))] * 2),
        ("empty shard", "single.weight", part.format((0, 4), (1, 4)) + ", on rank 1", part.format((0, 4), (1, 4))),
        ("one rank", "net.1.weight", "None of type NoneType, on rank 1", "None of type NoneType"),
    ):
        for rank, text in zip(ranks, got, strict=True):
            message = rank[f"error, {run}"].partition(": ")[2]
            assert message == f"the criterion must return finite scores {where.format(name)}{text}"


def test_threshold_per_rank_gives_other_masks(ranks):
    scores = {name: p.detach().abs() for name, p in Sharded().named_parameters() if p.ndim > 1}
    halves = [{name: score.chunk(2)[rank] for name, score in scores.items() if len(score) > 1} for rank in (0, 1)]
    half_masks = [
        smallest_entries(list(half.values()), round(0.6 * sum(score.numel() for score in half.values()))) for half in halves
    ]
    naive = {name: torch.cat(parts) for name, *parts in zip(halves[0], *half_masks, strict=True)}
    masks = ranks[0]["masks, sharded, magnitude"]
    assert not identical(naive, {name: masks[name] for name in naive})


def test_sharded_pruning_and_its_state_equal_one_process(ranks):
    one_state, one_weights = train_and_prune([0, 1], accumulate_grad_batches=2)
    resumed_state, resumed_weights = train_and_prune([0, 1], one_state, accumulate_grad_batches=2)
    assert not identical(resumed_weights, one_weights)
    for run, state, weights in (
        ("pruned, sharded", one_state, one_weights),
        ("pruned again, sharded", resumed_state, resumed_weights),
    ):
        for rank in (0, 1):
            sharded_state, sharded_weights = ranks[rank][run]
            assert_close(sharded_weights, weights, **TOLERANCE)
            assert identical({n: p == 0 for n, p in sharded_weights.items()}, {n: p == 0 for n, p in weights.items()})
            for name, (bits, shape) in state["state"]["masks"].items():
                assert torch.equal(sharded_state["state"]["masks"][name][0], bits)
                assert sharded_state["state"]["masks"][name][1] == shape
