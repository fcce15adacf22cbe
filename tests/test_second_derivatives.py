"""Penalties as differentiable functions: higher derivatives, ``torch.func``, compiled code, and second-order optimizers."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit, loader
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from lightning_reg import (
    ActivityPenalty,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    OrthogonalityPenalty,
    StartingPointPenalty,
    functional as package,
)
from lightning_reg.functional import (
    Units,
    activity_penalty,
    distance_penalty,
    group_lasso_penalty,
    l1_penalty,
    l2_penalty,
    orthogonality_penalty,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch uses it in forward mode

REFERENCE = torch.arange(12.0, dtype=torch.float64).view(4, 3) / 7


def half_gram_distance(w):
    gram = w.t() @ w  # of a matrix with more rows than columns
    return (gram - torch.eye(len(gram), dtype=w.dtype)).square().sum() / 2


def elastic_net(w):
    callback = ElasticNetPenalty(0.3, 0.7)
    return callback.value([w])


# Each function of a matrix of shape (4, 3), and the formula in plain torch.
FUNCTIONS = {
    "l1_penalty": (lambda w: l1_penalty([w]), lambda w: w.abs().sum()),
    "l2_penalty": (lambda w: l2_penalty([w]), lambda w: w.square().sum() / 2),
    "group_lasso_penalty": (lambda w: group_lasso_penalty([w]), lambda w: 3**0.5 * w.square().sum(1).sqrt().sum()),
    "group_lasso_penalty of columns": (
        lambda w: group_lasso_penalty([w], [Units(1)]),
        lambda w: 2.0 * w.square().sum(0).sqrt().sum(),
    ),
    "orthogonality_penalty": (lambda w: orthogonality_penalty([w]), half_gram_distance),
    "orthogonality_penalty of columns": (lambda w: orthogonality_penalty([w.t()]), half_gram_distance),
    "distance_penalty": (
        lambda w: distance_penalty([w], [REFERENCE.to(w.dtype)]),
        lambda w: (w - REFERENCE.to(w.dtype)).square().sum() / 2,
    ),
    "activity_penalty": (activity_penalty, lambda w: w.abs().sum() / 4),
    "activity_penalty of squares": (lambda w: activity_penalty(w, p=2), lambda w: w.square().sum() / 8),
    "ElasticNetPenalty.value": (elastic_net, lambda w: 0.3 * w.abs().sum() + 0.35 * w.square().sum()),
    "several tensors": (
        lambda w: l2_penalty([w, w[0], w.sum()]) + 3 * l1_penalty([w[1], w]),
        lambda w: (w.square().sum() + w[0].square().sum() + w.sum().square()) / 2 + 3 * (w[1].abs().sum() + w.abs().sum()),
    ),
}
every_function = pytest.mark.parametrize(
    ("function", "plain"), [pytest.param(*functions, id=name) for name, functions in FUNCTIONS.items()]
)


def matrix(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (4, 3)), dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_every_penalty_is_tested():
    public = {name for name in vars(package) if name.endswith("_penalty")}
    assert public <= set(FUNCTIONS)


@every_function
def test_second_derivatives(function, plain):
    w = matrix().requires_grad_()
    hessian = torch.autograd.functional.hessian
    for vectorize in (False, True):
        assert_close(hessian(function, w, vectorize=vectorize), hessian(plain, w))
    assert torch.autograd.gradcheck(function, w, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, w, check_batched_grad=True)


@every_function
def test_third_derivative_and_that_of_the_strength(function, plain):
    def third(value):
        w, strength = matrix().requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(strength * value(w), w, create_graph=True)
        second, mixed = torch.autograd.grad(first.square().sum(), [w, strength], create_graph=True)
        assert first.requires_grad
        if not second.requires_grad:
            return first, second, mixed, torch.zeros(())
        return first, second, mixed, *torch.autograd.grad(second.square().sum(), w, materialize_grads=True)

    assert_close(third(function), third(plain))


@every_function
def test_transforms_of_functions(function, plain):
    w, batch = matrix(), matrix(5, 4, 3)
    assert_close(torch.func.grad(function)(w), torch.func.grad(plain)(w))
    assert_close(torch.func.hessian(function)(w), torch.func.hessian(plain)(w))
    assert_close(torch.func.vmap(function)(batch), torch.func.vmap(plain)(batch))
    assert_close(torch.func.vmap(torch.func.grad(function))(batch), torch.func.vmap(torch.func.grad(plain))(batch))
    tangents = torch.func.jvp(function, (w,), (batch[0],)), torch.func.jvp(plain, (w,), (batch[0],))
    assert_close(*tangents)


@every_function
def test_compiled_without_graph_breaks(function, plain):
    torch._dynamo.reset()
    w = matrix().requires_grad_()
    value = torch.compile(function, fullgraph=True, backend="aot_eager")(w)
    assert_close(value, plain(w))
    assert_close(torch.autograd.grad(value, w), torch.autograd.grad(plain(w), w))


@every_function
def test_half_precision_matches_float32_in_every_mode(function, plain):
    w = matrix(dtype=torch.bfloat16)
    expected = plain(w.float())
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for value in (function(w), compiled(w), torch.func.vmap(function)(w[None])[0]):
        assert_close(value.float(), expected, rtol=0.02, atol=0.0)
    assert torch.func.grad(function)(w).dtype == torch.bfloat16


@every_function
def test_autocast_does_not_lower_the_precision(function, plain):
    w = matrix(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        values = [function(w), compiled(w), torch.func.vmap(function)(w[None])[0]]
    for value in values:
        assert_close(value, plain(w), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("shape", [(1100, 1000), (20, 20)], ids=["large", "small"])
def test_second_derivatives_of_large_and_complex_tensors(shape):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.complex64):
        w = torch.randn(*shape, dtype=dtype, generator=generator)
        w[0, 0] = 0.0  # where the second derivative of ½|z|² is 1 too
        w.requires_grad_()
        direction = torch.randn(*shape, dtype=dtype, generator=generator)
        for value in (l2_penalty([w]), distance_penalty([w], [torch.ones_like(w)])):
            (first,) = torch.autograd.grad(value, w, create_graph=True)
            (product,) = torch.autograd.grad(first, w, direction)
            assert_close(product, direction)


def test_units_of_zeros_and_tiny_units_have_finite_derivatives():
    zeros = torch.zeros(2, 3, requires_grad=True)
    hessian = torch.autograd.functional.hessian(lambda w: group_lasso_penalty([w]), zeros)
    assert not hessian.any()
    tiny = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    expected = 2**0.5 * torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    assert_close(torch.func.grad(lambda w: group_lasso_penalty([w]))(tiny), expected)
    assert not torch.func.grad(lambda w: l1_penalty([w]))(zeros.detach()).any()
    assert group_lasso_penalty([torch.zeros(3, 0)]) == 0


def test_frozen_tensors_get_no_gradient():
    w, frozen = matrix().requires_grad_(), matrix()
    (first,) = torch.autograd.grad(l2_penalty([frozen, w]), w, create_graph=True)
    assert_close(torch.autograd.grad(first.sum(), w)[0], torch.ones_like(w))


# In a fit ------------------------------------------------------------------------------------------------------------

W = "net.weight"
PENALTIES = {
    "L1Penalty": (lambda **o: L1Penalty(0.1, params=W, **o), lambda w, start: 0.1 * w.abs().sum()),
    "L2Penalty": (lambda **o: L2Penalty(0.1, params=W, **o), lambda w, start: 0.05 * w.square().sum()),
    "ElasticNetPenalty": (
        lambda **o: ElasticNetPenalty(0.1, 0.2, params=W, **o),
        lambda w, start: 0.1 * (w.abs().sum() + w.square().sum()),
    ),
    "GroupLassoPenalty": (
        lambda **o: GroupLassoPenalty(0.1, params=W, **o),
        lambda w, start: 0.8 * w.square().sum(1).sqrt().sum(),
    ),
    "OrthogonalityPenalty": (
        lambda **o: OrthogonalityPenalty(0.1, params=W, **o),
        lambda w, start: 0.05 * (w @ w.t() - torch.eye(2)).square().sum(),
    ),
    "StartingPointPenalty": (
        lambda **o: StartingPointPenalty(0.1, params=W, **o),
        lambda w, start: 0.05 * (w - start).square().sum(),
    ),
}


class Regression(Classifier):
    """Two linear outputs, whose gradients can be differentiated again.

    Args:
        manual: Whether it uses manual optimization.
    """

    def __init__(self, manual=False):
        super().__init__(lr=0.1, momentum=0.0)
        self.automatic_optimization = not manual
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(64, 2, bias=False)
        self.start = self.net.weight.detach().clone()
        self.products = []

    def loss_of(self, weight, batch):
        images, labels = batch
        return mse_loss(nn.functional.linear(images, weight).tanh(), torch.stack([labels / 10, -labels / 10], 1))

    def training_step(self, batch, batch_idx):
        self.batch = batch
        loss = self.loss_of(self.net.weight, batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss, create_graph=True)
        optimizer.step()
        return None

    def backward(self, loss, *args, **options):
        loss.backward(create_graph=True)

    def on_before_optimizer_step(self, optimizer):
        """Compute a product with the Hessian, as a second-order optimizer does in its step."""
        w = self.net.weight
        (product,) = torch.autograd.grad(w.grad.sum(), w)
        self.products.append((w.detach().clone(), self.batch, product))
        w.grad = w.grad.detach()


@pytest.mark.filterwarnings("ignore:.*create_graph=True will create a reference cycle")
@pytest.mark.parametrize("route", ["loss", "gradient", "manual"])
@pytest.mark.parametrize(("make", "plain"), [pytest.param(*pair, id=name) for name, pair in PENALTIES.items()])
def test_second_order_optimizers_see_penalties(make, plain, route):
    model = Regression(manual=route == "manual")
    fit([make(inject="auto" if route == "manual" else route)], model, max_epochs=1)
    assert len(model.products) == 4
    for w, batch, product in model.products:

        def hessian_times_ones(value, w=w):
            w = w.clone().requires_grad_()
            (first,) = torch.autograd.grad(value(w), w, create_graph=True)
            return torch.autograd.grad(first.sum(), w)[0]

        data = hessian_times_ones(lambda w, batch=batch: model.loss_of(w, batch))
        both = hessian_times_ones(lambda w, batch=batch: model.loss_of(w, batch) + plain(w, model.start))
        assert_close(product, both, rtol=1e-4, atol=1e-6)
        if make is not PENALTIES["L1Penalty"][0]:  # whose second derivative is 0
            assert not torch.allclose(product, data, rtol=1e-3, atol=1e-5)


class Newton(torch.optim.Optimizer):
    """Newton's method for one parameter."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        (p,) = self.param_groups[0]["params"]
        gradient = p.grad.flatten()
        rows = [torch.autograd.grad(entry, p, retain_graph=True)[0].flatten() for entry in gradient]
        with torch.no_grad():
            p.sub_(torch.linalg.solve(torch.stack(rows), gradient).view_as(p))
        p.grad = None
        return loss


class Quadratic(Classifier):
    """Linear regression, which Newton's method solves in one step."""

    def __init__(self, manual):
        super().__init__()
        self.automatic_optimization = not manual
        self.net = nn.Linear(64, 1, bias=False, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = mse_loss(self.net(images.double()).squeeze(1), labels.double())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss, create_graph=True)
        optimizer.step()
        return None

    def backward(self, loss, *args, **options):
        loss.backward(create_graph=True)

    def configure_optimizers(self):
        return Newton(self.parameters())


@pytest.mark.filterwarnings("ignore:.*create_graph=True will create a reference cycle")
@pytest.mark.parametrize("route", ["loss", "gradient", "manual"])
def test_one_newton_step_solves_ridge(route):
    model = Quadratic(manual=route == "manual")
    fit([L2Penalty(0.5, inject="auto" if route == "manual" else route)], model, loader(64, batch_size=64), max_epochs=1)
    images, labels = (part.double() for part in next(iter(loader(64, batch_size=64))))
    gram = images.T @ images / 32 + 0.5 * torch.eye(64)
    truth = torch.linalg.solve(gram, images.T @ labels / 32)
    assert_close(model.net.weight[0].detach(), truth, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*create_graph=True will create a reference cycle")
@pytest.mark.parametrize("p", [1, 2])
def test_second_derivatives_of_activity_penalty(p):
    class Activations(Regression):
        def __init__(self):
            super().__init__()
            self.activation = nn.Tanh()

        def loss_of(self, weight, batch):
            images, labels = batch
            self.hidden = self.activation(nn.functional.linear(images, weight))
            return mse_loss(self.hidden, torch.stack([labels / 10, -labels / 10], 1))

    model = Activations()
    fit([ActivityPenalty(0.5, modules="Tanh", p=p)], model, max_epochs=1)
    for w, batch, product in model.products:
        w = w.requires_grad_()
        loss = model.loss_of(w, batch)
        term = model.hidden.abs().sum() if p == 1 else model.hidden.square().sum() / 2
        (first,) = torch.autograd.grad(loss + 0.5 * term / 16, w, create_graph=True)
        assert_close(product, torch.autograd.grad(first.sum(), w)[0], rtol=1e-4, atol=1e-6)
