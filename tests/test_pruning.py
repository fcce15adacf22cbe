"""The functions behind pruning, compared with sorting, loops, and torch's own pruning."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import parameter
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

import lightning_reg
from lightning_reg.functional import (
    Units,
    clear_state_,
    mask_,
    mask_gradients_,
    pruning_masks,
    smallest_entries,
    units_of,
)
from lightning_reg.pruning import select
from lightning_reg.pruning.masks import pack_bits, unpack_bits


def by_sorting(scores, count):
    """Return reference masks from a stable sort of all scores."""
    flat = torch.cat([s.flatten().float() for s in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(stable=True)[:count]] = True
    return [part.view(s.shape) for part, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


KINDS = {
    "normal": lambda shape: torch.randn(shape),
    "ties": lambda shape: torch.randint(-2, 3, shape).float() * torch.tensor([1.0, -0.0])[torch.randint(0, 2, shape)],
    "all equal": lambda shape: torch.full(shape, -0.25),
    "extreme": lambda shape: torch.randn(shape) * 10.0 ** torch.randint(-44, 39, shape),
    "bfloat16": lambda shape: torch.randn(shape).bfloat16(),
    "columns": lambda shape: torch.randn(shape[::-1]).permute(tuple(reversed(range(len(shape))))),
}


@pytest.mark.parametrize(("chunk", "width"), [(1 << 19, 16), (7, 5), (64, 11)])
@pytest.mark.parametrize("kind", KINDS)
def test_smallest_entries_match_stable_sort(kind, chunk, width, monkeypatch):
    monkeypatch.setattr(select, "_CHUNK", chunk)
    monkeypatch.setattr(select, "_WIDTH", width)
    torch.manual_seed(0)
    scores = [KINDS[kind](shape) for shape in [(5, 9), (0, 3), (), (30,), (2, 3, 4)]]
    for count in (0, 1, 2, 31, 50, 75, 99, 100):
        masks = smallest_entries(scores, count)
        assert sum(int(mask.sum()) for mask in masks) == count
        assert_close(masks, by_sorting(scores, count), rtol=0.0, atol=0.0)


def test_unstable_sort_would_differ():
    scores = [torch.zeros(4), torch.zeros(4)]
    reverse = [mask.flip(0) for mask in by_sorting(scores, 3)[::-1]]
    assert not all(torch.equal(*pair) for pair in zip(smallest_entries(scores, 3), reverse, strict=True))


def test_magnitude_pruning_matches_torch_up_to_ties():
    torch.manual_seed(0)
    modules = [nn.Linear(64, 64), nn.Conv2d(8, 16, 3), nn.Embedding(50, 12)]
    params = [module.weight.detach().clone() for module in modules]
    prune.global_unstructured([(module, "weight") for module in modules], prune.L1Unstructured, amount=0.8)
    masks = pruning_masks(params, 0.8)
    total = sum(p.numel() for p in params)
    assert sum(int(mask.sum()) for mask in masks) == round(0.8 * total)
    for module, p, mask in zip(modules, params, masks, strict=True):
        differing = mask != (module.weight_mask == 0)
        largest = max(float(q[m].abs().max()) for q, m in zip(params, masks, strict=True))
        assert (p[differing].abs() == largest).all()  # they differ only in ties at the threshold
    assert not torch.equal(pruning_masks(params, 0.7)[0], masks[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_magnitudes_are_compared_in_float32(dtype):
    torch.manual_seed(0)
    params = [torch.randn(50, 7).to(dtype), torch.randn(20).to(dtype)]
    assert_close(pruning_masks(params, 0.3), by_sorting([p.abs() for p in params], 111), rtol=0.0, atol=0.0)


def test_layer_scope_prunes_each_tensor_equally():
    torch.manual_seed(0)
    params = [torch.randn(7, 3), 10 * torch.randn(5, 5), torch.zeros(0, 4)]
    masks = pruning_masks(params, 0.3, scope="layer")
    assert [int(mask.sum()) for mask in masks] == [round(0.3 * p.numel()) for p in params]
    assert_close(masks[:2], [by_sorting([p.abs()], round(0.3 * p.numel()))[0] for p in params[:2]])
    assert [int(mask.sum()) for mask in pruning_masks(params, 0.3)] != [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("criterion", ["magnitude", "random", "custom"])
@pytest.mark.parametrize("structure", ["element", "unit"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_stay_pruned_without_compounding(criterion, structure, scope):
    torch.manual_seed(0)
    params = [torch.randn(20, 10) + 1, torch.randn(30, 10)]
    scores = [torch.randn(p.shape) for p in params] if criterion == "custom" else criterion
    options = {"scope": scope, "structure": structure, "criterion": scores}
    pruned = pruning_masks(params, 0.2, **options, seed=1)
    more = pruning_masks(params, 0.5, **options, pruned=pruned, seed=2)
    assert all((~mask & before).sum() == 0 for mask, before in zip(more, pruned, strict=True))
    assert sum(int(mask.sum()) for mask in more) == 250
    less = pruning_masks(params, 0.1, **options, pruned=pruned, seed=3)
    assert_close(less, pruned)


def test_unit_with_some_pruned_entries_is_no_pruned_unit():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    pruned = pruning_masks([weight], 0.05)
    (mask,) = pruning_masks([weight], 0.25, structure="unit", pruned=pruned)
    assert int(mask.all(1).sum()) == 16
    assert not bool((pruned[0] & ~mask).any())


LAYERS = [
    nn.Linear(6, 5),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(6, 4, 3),
    nn.ConvTranspose1d(6, 4, 3, groups=2),
    nn.Embedding(7, 3),
]


def units_by_hand(layer):
    """Return index tuples of the output units, from torch's documentation of each weight."""
    shape = layer.weight.shape
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [(slice(i, i + 1),) for i in range(shape[0])]
    per = shape[0] // layer.groups
    return [(slice(g * per, (g + 1) * per), slice(o, o + 1)) for g in range(layer.groups) for o in range(shape[1])]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_unit_pruning_removes_units_of_smallest_norm(layer):
    torch.manual_seed(0)
    weight = torch.randn(layer.weight.shape)
    units = units_by_hand(layer)
    norms = torch.stack([weight[unit].norm() for unit in units])
    expected = torch.zeros_like(weight, dtype=torch.bool)
    for index in norms.argsort()[: round(0.5 * len(units))]:
        expected[units[index]] = True
    (mask,) = pruning_masks([weight], 0.5, structure="unit", scope="layer", units=[units_of(layer)])
    assert torch.equal(mask, expected)
    (scored,) = pruning_masks(
        [weight], 0.5, criterion=[-weight.abs()], structure="unit", scope="layer", units=[units_of(layer)]
    )
    assert not torch.equal(scored, expected)


def test_units_are_ranked_globally_by_root_mean_square():
    wide, narrow = torch.full((3, 100), 1.0), torch.full((3, 4), 1.5)
    wide[0] = 0.5
    masks = pruning_masks([wide, narrow], 0.34, structure="unit")  # 106 entries: room for one wide unit, not two
    assert masks[0].all(1).tolist() == [True, False, False]
    assert not masks[1].any()  # though its norms of 3 are smaller than those of the wide units


def test_two_of_four_keeps_largest_sum():
    torch.manual_seed(0)
    weight = torch.randn(5, 8)
    (mask,) = pruning_masks([weight], 0.5, structure="2:4")
    assert (mask.view(-1, 4).sum(1) == 2).all()
    kept = (weight.abs() * ~mask).view(-1, 4).sum(1)
    pairs = torch.stack([weight.abs().view(-1, 4)[:, list(pair)].sum(1) for pair in itertools.combinations(range(4), 2)])
    assert_close(kept, pairs.max(0).values)
    (none,) = pruning_masks([weight], 0.0, structure="2:4")
    assert not none.any()


LAYERS_OF_FOURS = {
    "linear": (nn.Linear(8, 3), lambda w: w),
    "embedding": (nn.Embedding(5, 8), lambda w: w),
    "recurrent": (nn.GRU(8, 4), lambda w: w),
    "convolution": (nn.Conv2d(8, 6, 3), lambda w: w.permute(0, 2, 3, 1)),
    "grouped convolution": (nn.Conv1d(8, 6, 3, groups=2), lambda w: w.permute(0, 2, 1)),
    "transposed convolution": (nn.ConvTranspose2d(8, 6, 3), lambda w: w.permute(1, 2, 3, 0)),
    "grouped transposed convolution": (nn.ConvTranspose1d(8, 6, 3, groups=2), lambda w: w.permute(1, 2, 0)),
}
"""Layers, each with its weight in rows of inputs."""


@pytest.mark.parametrize(("layer", "rows"), LAYERS_OF_FOURS.values(), ids=list(LAYERS_OF_FOURS))
def test_two_of_four_groups_the_inputs(layer, rows):
    """As brute force over the rows of inputs does. Groups along any other dimension have other masks."""
    weight = next(layer.parameters()).detach()
    (mask,) = pruning_masks([weight], 0.5, structure="2:4", units=[units_of(layer)])
    expected = torch.zeros_like(rows(weight), dtype=torch.bool)
    for index in itertools.product(*map(range, expected.shape[:-1])):
        for start in range(0, expected.shape[-1], 4):
            group = rows(weight)[index][start : start + 4].abs()
            expected[index][start + group.argsort()[:2]] = True
    assert torch.equal(rows(mask), expected)


def test_two_of_four_does_not_mix_groups_of_channels():
    layer = nn.ConvTranspose1d(12, 6, 1, groups=2)  # six inputs in each group
    with pytest.raises(ValueError, match=r"multiple of 4, got shape \(12, 3, 1\) with inputs in dimension 0"):
        pruning_masks([layer.weight], 0.5, structure="2:4", units=[units_of(layer)])


def test_two_of_four_with_other_sparsity_or_shape_raises():
    with pytest.raises(ValueError, match=r"sparsity must be 0 or 0\.5, got 0\.6"):
        pruning_masks([torch.zeros(4, 4)], 0.6, structure="2:4")
    with pytest.raises(ValueError, match=r"multiple of 4, got shape \(4, 3\)"):
        pruning_masks([torch.zeros(4, 3)], 0.5, structure="2:4")


def test_random_masks_are_uniform_and_depend_on_seed():
    """The mean position and the overlap of two masks are within four standard errors."""
    p = torch.ones(400, 250)
    first, second, repeated = (pruning_masks([p], 0.3, criterion="random", seed=seed)[0] for seed in (0, 1, 0))
    assert torch.equal(first, repeated)
    positions = first.flatten().nonzero().float() / p.numel()
    assert abs(positions.mean() - 0.5) < 4 * (1 / 12 / 30_000) ** 0.5
    assert abs((first & second).float().mean() - 0.09) < 4 * (0.09 * 0.91 / p.numel()) ** 0.5
    assert abs(first[:, ::2].float().mean() - 0.3) < 4 * (0.3 * 0.7 / p.numel() * 2) ** 0.5


def test_scores_of_wrong_shape_or_nonfinite_raise():
    with pytest.raises(ValueError, match=r"scores of shape \(3,\), expected \(4,\)"):
        pruning_masks([torch.zeros(4)], 0.5, criterion=[torch.zeros(3)])
    with pytest.raises(ValueError, match="1 scores that are infinite or NaN"):
        pruning_masks([torch.zeros(2)], 0.5, criterion=[torch.tensor([0.0, torch.nan])])


def test_nan_weight_counts_as_largest():
    (mask,) = pruning_masks([torch.tensor([torch.nan, -torch.inf, 2.0, -1.0])], 0.5)
    assert mask.tolist() == [False, False, True, True]


def test_mask_zeros_nan_and_keeps_other_weights():
    p = torch.tensor([torch.nan, torch.inf, -2.0, -0.0])
    mask_([p], [torch.tensor([True, True, False, False])])
    assert p.tolist() == [0.0, 0.0, -2.0, 0.0]
    assert p.signbit().tolist() == [False, False, True, True]


def test_mask_gradients_dense_and_sparse():
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    dense, none = parameter([[1.0, 1.0]] * 3, grad=[[1.0, 2.0], [3.0, 4.0], [torch.nan, 6.0]]), parameter([1.0])
    mask_gradients_([dense, none], [mask, torch.tensor([True])])
    assert_close(dense.grad, torch.tensor([[0.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    assert none.grad is None
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([0, 2, 0])).sum().backward()
    mask_gradients_([table.weight], [mask])
    assert_close(table.weight.grad.to_dense(), torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
        lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.9, centered=True),
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_clear_state_zeros_only_masked_entries(make):
    torch.manual_seed(0)
    p, other = parameter([1.0, 2.0, 3.0]), parameter([1.0, 2.0, 3.0])
    optimizer = make([p, other])
    for _ in range(2):
        p.grad, other.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    mask = torch.tensor([True, False, True])
    clear_state_(optimizer, [p], [mask])
    seen = 0
    for key, value in optimizer.state[p].items():
        if value.shape == p.shape:
            seen += 1
            assert_close(value, optimizer.state[other][key].masked_fill(mask, 0.0))
            assert not torch.equal(value, optimizer.state[other][key])
    assert seen


def test_clear_state_of_lbfgs_removes_everything():
    p = parameter([1.0, 2.0])
    optimizer = torch.optim.LBFGS([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state
    clear_state_(optimizer, [p], [torch.tensor([True, False])])
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(0,), (), (1,), (8,), (3, 5), (1001,)])
def test_pack_bits_round_trips(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_sparsity_counts_zeros():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.view(-1)[:6] = torch.tensor([0.0, -0.0] * 3)
        model[0].bias.zero_()
    result = lightning_reg.sparsity(model)
    assert result.parameters == {"0.weight": (6, 12), "2.weight": (0, 6)}
    assert (result.total, result.fraction) == ((6, 18), 6 / 18)
    assert str(result).splitlines() == ["0.weight   50.00%  6 of 12", "2.weight    0.00%  0 of 6", "total      33.33%  6 of 18"]
    assert lightning_reg.sparsity(model, "all").parameters["0.bias"].fraction == 1.0
    with pytest.raises(ValueError, match="selects no parameter"):
        lightning_reg.sparsity(nn.ReLU())


def test_default_units():
    (mask,) = pruning_masks([torch.tensor([[3.0, 4.0], [1.0, 1.0]])], 0.5, structure="unit")
    (same,) = pruning_masks([torch.tensor([[3.0, 4.0], [1.0, 1.0]])], 0.5, structure="unit", units=[Units()])
    assert mask.tolist() == same.tolist() == [[False, False], [True, True]]


# What each tensor keeps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_kept", [0.0, 0.01, 0.25, 0.4])
def test_each_tensor_keeps_its_largest_entries(min_kept):
    """An independent reference: fix tensors at their limits, largest shortfall first, and sort the rest."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(40, 5, generator=generator) * scale for scale in (0.01, 0.1, 1.0)]
    masks = pruning_masks(params, 0.6, min_kept=min_kept)
    pruned = [int(mask.sum()) for mask in masks]
    assert sum(pruned) == 360
    most = 200 if not min_kept else 200 - max(int(min_kept * 200 + 0.5), 1)
    assert pruned[0] == most
    for p, mask, count in zip(params, masks, pruned, strict=True):
        smallest = p.abs().flatten().argsort()[:count]
        assert mask.flatten()[smallest].all()


def test_units_and_layers_keep_some():
    params = [torch.ones(10, 4) * 0.1, torch.ones(10, 4)]
    dead = [int(mask.all(1).sum()) for mask in pruning_masks(params, 0.5, structure="unit", min_kept=0.3)]
    assert dead == [7, 3]
    assert [int(mask.sum()) for mask in pruning_masks(params, 0.9, scope="layer", min_kept=0.2)] == [32, 32]
    assert [int(mask.sum()) for mask in pruning_masks(params, 0.9, min_kept=0.2)] == [32, 32]  # as many as they can lose
    assert [int(mask.sum()) for mask in pruning_masks([torch.ones(1), torch.ones(9)], 0.9, min_kept=0.01)] == [0, 8]


@pytest.mark.parametrize("min_kept", [-0.1, 1.0, float("nan")])
def test_min_kept_out_of_range_raises(min_kept):
    with pytest.raises(ValueError, match=r"pruning_masks: min_kept must be a number in \[0, 1\)"):
        pruning_masks([torch.ones(3)], 0.5, min_kept=min_kept)
