"""How strong penalties are relative to the data, against float64 and autograd, on parameters of many kinds."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn import Parameter
from torch.testing import assert_close

from lightning_reg import (
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    OrthogonalityPenalty,
    Penalty,
    StartingPointPenalty,
)
from lightning_reg._tensors.units import Units
from lightning_reg.monitors import relative
from lightning_reg.monitors.layout import SMALL
from lightning_reg.monitors.watched import Watched
from lightning_reg.penalties.elementwise import is_elementwise

FACTORIES = {
    "L1": partial(L1Penalty, 0.3),
    "L2": partial(L2Penalty, 0.2),
    "elastic net": partial(ElasticNetPenalty, 0.3, 0.2),
    "group lasso": partial(GroupLassoPenalty, 0.1),
    "starting point": partial(StartingPointPenalty, 0.4),
    "orthogonality": partial(OrthogonalityPenalty, 0.05),
}
SHAPES = [(4, 3), (4, 3), (6, 2, 3, 3), (4, 3), (SMALL + 5, 2), (1100, 1000), (6, 2, 3, 3)]
ROUTES = ["loss", "gradient"]


def given(make, params, inject, *, units=None):
    """Return a penalty that acts on given parameters, without a fit."""
    base = make.func

    class Given(base):
        adds_to_loss = property(lambda self: inject == "loss")

        def parameters_of(self, optimizer):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            return [p for p in params if id(p) in held]

        def units(self, wanted):
            return [(units or {}).get(id(p), Units()) for p in wanted]

        @classmethod
        def formula_class(cls):
            return base.formula_class()

    penalty = Given(*make.args, inject=inject, name=base.__name__)
    if isinstance(penalty, StartingPointPenalty):
        torch.manual_seed(7)
        penalty._references = {id(p): torch.randn_like(p) for p in params}
    return penalty


def parameters(shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    with torch.no_grad():
        params[0].view(-1)[:2] = 0
        if len(shapes) > 1:
            params[1].view(len(params[1]), -1)[0] = 0  # a unit of zeros
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def own_gradients(penalty, params):
    """Return λ∇R in float64 where the formula allows it, by autograd."""
    with torch.enable_grad():
        value = penalty.scale * penalty.value(params)
        return [g.detach().to(torch.promote_types(g.dtype, torch.float64)) for g in torch.autograd.grad(value, params)]


def norm(tensors):
    return math.sqrt(sum(float(tensor.abs().square().sum()) for tensor in tensors))


def in_loss(penalties):
    return [penalty for penalty in penalties if penalty.adds_to_loss]


def check(penalties, acting, params, optimizer=None, *, watched=None, rtol=1e-5, signs=None):
    """Compare with the reference; the given gradients are those of the data."""
    data = {id(p): p.grad.clone().to(torch.promote_types(p.dtype, torch.float64)) for p in params}
    expected = {}
    for penalty, chosen in zip(penalties, acting, strict=True):
        own = own_gradients(penalty, chosen)
        expected[penalty.name] = norm(own) / norm([data[id(p)] for p in chosen])
        if penalty.adds_to_loss:
            for p, gradient in zip(chosen, own, strict=True):
                p.grad += (signs or {}).get(id(p), 1) * gradient.to(p.dtype)
    kept = [p.grad.clone() for p in params]
    watched = watched or Watched(params, [[str(index)] for index in range(len(params))], "")
    with torch.no_grad():
        before = watched.before_step(penalties, optimizer or torch.optim.SGD(params, lr=0.1), in_loss(penalties))
        found = {name: float(value) for name, value in before.relative_norms.items()}
    assert found == pytest.approx(expected, rel=rtol)
    for one, p in zip(kept, params, strict=True):
        assert_close(p.grad, one, rtol=0, atol=0, equal_nan=True)  # the gradients must stay
    return before, found


@pytest.mark.parametrize("inject", ROUTES)
@pytest.mark.parametrize("name", FACTORIES)
def test_each_penalty(name, inject):
    params = parameters()
    before, _ = check([given(FACTORIES[name], params, inject)], [params], params)
    for p, weights, gradients in zip(params, before.weights, before.gradients, strict=True):
        assert_close(weights, p.detach().double().square().sum(), rtol=1e-5, atol=0, check_dtype=False)
        assert_close(gradients, p.grad.double().square().sum(), rtol=1e-5, atol=0, check_dtype=False)


@pytest.mark.parametrize("names", list(itertools.combinations(FACTORIES, 2)), ids=" and ".join)
@pytest.mark.parametrize("routes", list(itertools.product(ROUTES, ROUTES)), ids=" and ".join)
def test_two_penalties_on_different_parts(names, routes):
    """Each acts on some of the tensors of a stack."""
    params = parameters()
    acting = [[p for index, p in enumerate(params) if index % 2], params[2:]]
    penalties = [given(FACTORIES[name], chosen, route) for name, chosen, route in zip(names, acting, routes, strict=True)]
    check(penalties, acting, params)


@pytest.mark.parametrize("inject", ROUTES)
@pytest.mark.parametrize("name", FACTORIES)
def test_maximized_parameters(name, inject):
    """A penalty is subtracted where the optimizer maximizes: of some tensors of a stack, and of one large tensor."""
    params = parameters()
    groups = [{"params": params[1:5]}, {"params": [params[0], *params[5:]], "maximize": True}]
    signs = {id(p): -1 for p in groups[1]["params"]}
    check([given(FACTORIES[name], params, inject)], [params], params, torch.optim.SGD(groups, lr=0.1), signs=signs)


@pytest.mark.parametrize("name", ["L1", "L2", "elastic net", "starting point"])
def test_complex_parameters(name):
    for inject in ROUTES:
        params = parameters(dtype=torch.complex64)
        check([given(FACTORIES[name], params, inject)], [params], params)


@pytest.mark.parametrize("inject", ROUTES)
@pytest.mark.parametrize("name", ["L1", "L2", "elastic net", "starting point"])
@pytest.mark.parametrize("other", [torch.float64, torch.complex64, torch.bfloat16])
def test_several_dtypes(other, name, inject):
    """In one model, some of whose tensors are stacked and penalized in part."""
    params = [*parameters(SHAPES[:4]), *parameters(SHAPES[:4], other)]
    for chosen in (params, params[1:], params[:-1]):
        check([given(FACTORIES[name], chosen, inject)], [chosen], params, rtol=2e-2 if other is torch.bfloat16 else 1e-5)
        for p in params:
            p.grad = torch.randn_like(p)


@pytest.mark.parametrize("inject", ROUTES)
@pytest.mark.parametrize("name", FACTORIES)
def test_gradients_of_another_dtype(name, inject):
    """Weights in half precision with gradients in float32, which torch allows where ``grad_dtype`` says so."""
    params = parameters(dtype=torch.bfloat16)
    for p in params:
        gradient, p.grad = p.grad.float(), None
        p.grad_dtype, p.grad = torch.float32, gradient
    check([given(FACTORIES[name], params, inject)], [params], params, rtol=2e-2)
    assert {p.grad_dtype for p in params} == {torch.float32}


@pytest.mark.parametrize("name", FACTORIES)
def test_values_that_are_not_finite(name):
    """Those of tensors that a penalty does not select do not reach its norm."""
    for inject in ROUTES:
        params = parameters()
        chosen = [params[0], params[2], params[5]]
        with torch.no_grad():
            params[1].fill_(math.nan)
            params[4].fill_(math.inf)
        params[3].grad.fill_(math.nan)
        _, found = check([given(FACTORIES[name], chosen, inject)], [chosen], params)
        assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("inject", ROUTES)
@pytest.mark.parametrize("name", FACTORIES)
def test_half_precision(name, inject):
    """To the precision of the parameters, also where a penalty acts on some tensors of a stack."""
    params = parameters(dtype=torch.bfloat16)
    check([given(FACTORIES[name], params[1:], inject)], [params[1:]], params, rtol=2e-2)


@pytest.mark.parametrize("inject", ROUTES)
@pytest.mark.parametrize("name", FACTORIES)
def test_memory_formats(name, inject):
    """Transposed weights, filters in channels-last memory, and gradients in another order than the weights."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(1100, 1000).t(),
        torch.randn(300, 200, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(700, 300, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(5, 7).t(),
    ]
    params = list(map(Parameter, tensors))
    for index, p in enumerate(params):
        p.grad = torch.randn_like(p) if index % 2 else torch.randn(p.shape)
    assert not any(p.is_contiguous() for p in params)
    check([given(FACTORIES[name], params, inject)], [params], params)


@pytest.mark.parametrize("inject", ROUTES)
def test_units_in_other_dimensions(inject):
    """Those of a layer that stores its weight as (in, out), and of a grouped transposed convolution."""
    params = parameters([(6, 4), (6, 4), (6, 2, 3, 3), (2000, 700)])
    units = {id(params[1]): Units(1), id(params[2]): Units(1, 3), id(params[3]): Units(1)}
    check([given(FACTORIES["group lasso"], params, inject, units=units)], [params], params)


def test_tiny_and_huge_units():
    params = parameters([(3, 4), (3, 4)])
    with torch.no_grad():
        params[0][1] *= 1e-30
        params[0][2] *= 1e30
        params[1][1] = 1e-44
    check([given(FACTORIES["group lasso"], params, "loss")], [params], params)


@pytest.mark.parametrize("inject", ROUTES)
def test_parameters_that_are_not_watched(inject):
    """What a penalty acts on outside of the monitor counts too."""
    params = parameters()
    watched = Watched(params[:3], [["0"], ["1"], ["2"]], "")
    penalties = [given(FACTORIES[name], params, inject) for name in ("L1", "L2", "starting point")]
    optimizer = torch.optim.SGD(params, lr=0.1)
    before, _ = check(penalties, [params] * 3, params, optimizer, watched=watched)
    assert len(before.weights) == len(before.gradients) == 3
    with torch.no_grad():
        params[0].zero_()
        assert float(watched.after_step(before)[2]) == pytest.approx(1)  # all of it has changed


def test_other_parameters_that_change():
    """They get another dtype in place, as by ``module.double()``."""
    params = parameters()
    watched = Watched(params[:3], [["0"], ["1"], ["2"]], "")
    optimizer = torch.optim.SGD(params, lr=0.1)
    for dtype in (torch.float32, torch.float64):
        for p in params[3:]:
            p.grad, p.data = None, p.data.to(dtype)
            p.grad = torch.randn_like(p)
        check([given(FACTORIES["L2"], params, "gradient")], [params], params, optimizer, watched=watched)


def test_weak_data_gradients_do_not_cancel():
    """The data's gradient is found by subtraction of each entry: the difference of two sums would have no correct digit."""
    params = parameters([(50, 60)])
    params[0].grad *= 1e-5
    _, found = check([given(FACTORIES["L2"], params, "loss")], [params], params, rtol=1e-2)
    assert found["L2Penalty"] > 1e4


def test_missing_gradients():
    """If the loss does not reach a parameter, the values of the others are as usual."""
    params = parameters([(4, 3), (4, 3), (5,)])
    params[1].grad = None
    for name in ("L1", "L2", "starting point", "group lasso"):
        check(
            [given(FACTORIES[name], params[:1], "gradient")],
            [params[:1]],
            [params[0]],
            torch.optim.SGD(params, lr=0.1),
            watched=Watched(params, [["0"], ["1"], ["2"]], ""),
        )


@pytest.mark.parametrize("inject", ROUTES)
def test_both_ways_agree(inject, monkeypatch):
    """Measured on parts in the cache, and on whole tensors as on other devices."""
    params = parameters()
    penalties = [given(make, params, inject) for name, make in FACTORIES.items() if name != "orthogonality"]
    optimizer = torch.optim.SGD(params, lr=0.1)
    watched = [Watched(params, [["all"]] * len(params), "") for _ in range(2)]
    with torch.no_grad():
        assert watched[0]._shares._elementwise(penalties, in_loss(penalties)) == penalties
        found = watched[0].before_step(penalties, optimizer, in_loss(penalties))
        monkeypatch.setattr(relative, "is_elementwise", lambda penalty: False)
        other = watched[1].before_step(penalties, optimizer, in_loss(penalties))
    assert_close(found.relative_norms, other.relative_norms, rtol=1e-4, atol=0)
    assert_close(torch.stack(found[:2]), torch.stack(other[:2]), rtol=1e-5, atol=0)


def test_an_overridden_formula_is_not_elementwise():
    class Cubed(L2Penalty):
        def value(self, params):
            return sum(p.abs().pow(3).sum() for p in params)

        def add_gradient_(self, params, strength):
            Penalty.add_gradient_(self, params, strength)

    class Renamed(L2Penalty):
        """Changes nothing of the formula."""

    assert is_elementwise(Renamed(0.1))
    assert all(make(params="*").is_sum_over_tensors() for make in FACTORIES.values())
    assert not is_elementwise(Cubed(0.1))
    assert not is_elementwise(OrthogonalityPenalty(0.1))
    params = parameters()
    check([given(partial(Cubed, 0.1), params, "gradient")], [params], params)
