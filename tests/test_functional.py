"""Every public function takes a tensor, a list, or a generator, and raises an error that says what came otherwise."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_reg import functional
from lightning_reg.functional import Units

F = functional


def generator():
    return torch.Generator().manual_seed(3)


MASK = torch.eye(3, 4).bool()
OTHER = torch.full((3, 4), 0.1)
LISTS = {
    "add_distance_gradient_": lambda p, wrap: F.add_distance_gradient_(p, wrap(OTHER), 0.5),
    "add_gradient_noise_": lambda p, wrap: F.add_gradient_noise_(p, 0.5, generator()),
    "add_group_lasso_gradient_": lambda p, wrap: F.add_group_lasso_gradient_(p, 0.5),
    "add_l1_gradient_": lambda p, wrap: F.add_l1_gradient_(p, 0.5),
    "add_l2_gradient_": lambda p, wrap: F.add_l2_gradient_(p, 0.5),
    "centralize_gradients_": lambda p, wrap: F.centralize_gradients_(p),
    "clear_state_": lambda p, wrap: F.clear_state_(torch.optim.SGD([nn.Parameter(OTHER)]), p, wrap(MASK)),
    "clip_gradient_norm_": lambda p, wrap: F.clip_gradient_norm_(p, 1.0),
    "clip_gradient_norm_per_tensor_": lambda p, wrap: F.clip_gradient_norm_per_tensor_(p, 1.0),
    "clip_gradient_value_": lambda p, wrap: F.clip_gradient_value_(p, 0.1),
    "clip_negative_weights_": lambda p, wrap: F.clip_negative_weights_(p),
    "clip_unit_gradients_": lambda p, wrap: F.clip_unit_gradients_(p, 0.1),
    "clip_weights_": lambda p, wrap: F.clip_weights_(p, 0.1),
    "decay_weights_": lambda p, wrap: F.decay_weights_(p, 0.5),
    "distance_penalty": lambda p, wrap: F.distance_penalty(p, wrap(OTHER)),
    "drop_peak_gradients_": lambda p, wrap: F.drop_peak_gradients_(p),
    "group_lasso_penalty": lambda p, wrap: F.group_lasso_penalty(p),
    "group_soft_threshold_": lambda p, wrap: F.group_soft_threshold_(p, 0.1),
    "l1_penalty": lambda p, wrap: F.l1_penalty(p),
    "l2_penalty": lambda p, wrap: F.l2_penalty(p),
    "mask_": lambda p, wrap: F.mask_(p, wrap(MASK)),
    "mask_gradients_": lambda p, wrap: F.mask_gradients_(p, wrap(MASK)),
    "nonfinite_gradients": lambda p, wrap: F.nonfinite_gradients(p),
    "orthogonality_penalty": lambda p, wrap: F.orthogonality_penalty(p),
    "project_unit_norms_": lambda p, wrap: F.project_unit_norms_(p, 0.0, 0.5),
    "pruning_masks": lambda p, wrap: F.pruning_masks(p, 0.5, criterion=wrap(OTHER), pruned=wrap(MASK)),
    "shrink_randomly_": lambda p, wrap: F.shrink_randomly_(p, 0.5, generator()),
    "smallest_entries": lambda p, wrap: F.smallest_entries(p, 5),
    "soft_threshold_": lambda p, wrap: F.soft_threshold_(p, 0.1),
    "zero_nonfinite_gradients_": lambda p, wrap: F.zero_nonfinite_gradients_(p),
}
"""A call of each function of lists of tensors, whose other lists are made by ``wrap``."""

NO_CHANGE = {"clear_state_", "nonfinite_gradients", "pruning_masks", "smallest_entries"}
"""Functions that return what they found, or change an optimizer."""

NORM = torch.tensor(2.0)
SINGLE = {
    "activity_penalty": ("output", F.activity_penalty),
    "alpha_dropout": ("x", lambda x: F.alpha_dropout(x, 0.5)),
    "dropout": ("x", lambda x: F.dropout(x, 0.5)),
    "find_dropout": ("module", F.find_dropout),
    "inject_dropout": ("modules", lambda modules: F.inject_dropout(modules, 0.5)),
    "packed_dropout": ("x", lambda x: F.packed_dropout(x, 0.5)),
    "quantile_bound": ("history", lambda history: F.quantile_bound(history, 0.5)),
    "sample_predictions": ("predict", lambda predict: F.sample_predictions(predict, 2)),
    "set_dropout_": ("sites", lambda sites: F.set_dropout_(sites, 0.5)),
    "sparsity": ("module", F.sparsity),
    "units_of": ("module", F.units_of),
    "update_norm_history": ("norm", lambda norm: F.update_norm_history(torch.zeros(3), norm)),
    "update_norm_statistics": ("statistics", lambda statistics: F.update_norm_statistics(statistics, NORM, 0.9, 5)),
    "z_score_bound": ("statistics", lambda statistics: F.z_score_bound(NORM, statistics, 2.0)),
}
"""A call of each other function with its first argument, or the one that is easiest to get wrong."""

WRAPS = {"tensor": lambda tensor: tensor, "tuple": lambda tensor: (tensor,), "generator": lambda tensor: iter([tensor])}


def matrix():
    """Return a parameter with a gradient, some of whose entries are infinite, negative, or large."""
    values = torch.linspace(-2.0, 3.0, 12).view(3, 4)
    p = nn.Parameter(values)
    p.grad = values.flip(1) * 20
    return p


def effect(call, wrap):
    """Return what a call returns, and what it makes of a tensor and its gradient."""
    p = matrix()
    if call is LISTS["zero_nonfinite_gradients_"]:
        p.grad[0, 0] = torch.inf
    returned = call(wrap(p), wrap)
    return returned, p.detach(), p.grad


def test_every_function_has_a_row():
    public = {name for name, member in vars(functional).items() if inspect.isfunction(member)}
    assert public == {*LISTS, *SINGLE}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("name", LISTS)
def test_tensor_or_iterable_equals_list(name, wrap):
    expected = effect(LISTS[name], lambda tensor: [tensor])
    assert_close(effect(LISTS[name], wrap), expected, rtol=0, atol=0)
    before = matrix()
    changes = not (torch.equal(before, expected[1]) and torch.equal(before.grad, expected[2]))
    assert changes is (name.endswith("_") and name not in NO_CHANGE)


SGD = torch.optim.SGD([nn.Parameter(OTHER)])
WRONG = {
    "a module of class Linear: pass its .parameters()": nn.Linear(2, 1),
    "a module of class ReLU at position 0: pass its .parameters()": nn.Sequential(nn.ReLU()),
    "at position 0: pass .parameters() instead of .named_parameters()": list(nn.Linear(2, 1).named_parameters()),
    "got 'w' at position 0: pass its .values()": {"w": torch.zeros(1)},
    "got 1.0": 1.0,
    "got None": None,
    "for p in group['params']]": SGD,
    "at position 0: pass [p for group in optimizer.param_groups for p in group['params']]": SGD.param_groups,
    "got 1.5 at position 0": [1.5],
    "got [tensor([0.])] at position 0": [[torch.zeros(1)]],
    "got 't' at position 0": "text",
}


@pytest.mark.parametrize("name", LISTS)
def test_anything_else_is_an_error(name):
    argument = "scores" if name == "smallest_entries" else "params"
    for message, wrong in WRONG.items():
        with pytest.raises(TypeError, match=rf"^{name}: {argument} must be a tensor or an iterable of tensors, got ") as caught:
            LISTS[name](wrong, WRAPS["tuple"])
        assert str(caught.value).endswith(message)


@pytest.mark.parametrize("name", SINGLE)
def test_other_functions_name_the_argument(name):
    argument, call = SINGLE[name]
    for wrong in ([1.0], None, "text", 0.5):
        with pytest.raises(TypeError, match=rf"^{name}(: {argument})?.* got "):
            call(wrong)


def test_other_lists_have_the_length_of_params():
    params = [matrix(), matrix()]
    with pytest.raises(ValueError, match=r"^mask_: masks must have one entry for each of the 2 tensors in params, got 1"):
        F.mask_(params, MASK)
    with pytest.raises(ValueError, match=r"^distance_penalty: references must have one entry .* got 3"):
        F.distance_penalty(params, [OTHER] * 3)
    with pytest.raises(ValueError, match=r"^clip_unit_gradients_: units must have one entry .* got 1"):
        F.clip_unit_gradients_(params, 0.1, units=Units(1))
    with pytest.raises(ValueError, match=r"^add_gradient_noise_: padding must have one entry .* got 1"):
        F.add_gradient_noise_(params, 0.1, padding=0)
    with pytest.raises(ValueError, match=r"^pruning_masks: pruned must have one entry .* got 1"):
        F.pruning_masks(params, 0.5, pruned=MASK)


@pytest.mark.parametrize(
    "call",
    [
        partial(F.group_soft_threshold_, threshold=0.1),
        partial(F.project_unit_norms_, low=0.0, high=0.5),
        partial(F.centralize_gradients_),
        partial(F.clip_unit_gradients_, clip_factor=0.1),
        partial(F.group_lasso_penalty),
        partial(F.add_group_lasso_gradient_, strength=0.5),
        partial(F.pruning_masks, sparsity=0.5, structure="unit"),
    ],
    ids=lambda call: call.func.__name__,
)
def test_units_of_a_single_tensor(call):
    """A layer's units are given as ``units_of`` returns them."""
    results = []
    for units in (Units(1), [Units(1)], None):
        p = matrix()
        results.append((call(p, units=units), p.detach(), p.grad))
    assert_close(results[0], results[1], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_close(results[0], results[2])
    for wrong in (1, ["rows"], (1, 1)):
        with pytest.raises(TypeError, match=r"units must be what units_of\(module\) returns"):
            call(matrix(), units=wrong)


def test_choices_of_pruning_masks():
    for wrong in ({"criterion": "magnitud"}, {"scope": "local"}, {"structure": "row"}):
        with pytest.raises(ValueError, match=rf"^pruning_masks: {next(iter(wrong))} must be '.*, got '"):
            F.pruning_masks([matrix()], 0.5, **wrong)
    with pytest.raises(TypeError, match=r"^pruning_masks: criterion must be a tensor or an iterable of tensors, got"):
        F.pruning_masks([matrix()], 0.5, criterion=len)


def test_compiled_functions_take_a_tensor():
    for name in ("l1_penalty", "l2_penalty", "group_lasso_penalty", "orthogonality_penalty"):
        function = getattr(F, name)
        assert_close(torch.compile(function, backend="eager", fullgraph=True)(matrix()), function([matrix()]))
