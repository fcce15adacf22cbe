from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers import Classifier, Fused, Gan, Memory, fit, parameter, same
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close

from lightning_reg import (
    AdaptiveGradientClipping,
    GradientCentralization,
    GradientNoise,
    GradientNormClipping,
    GradientValueClipping,
    NonFiniteGradientGuard,
    PeakGradientDropping,
    QuantileGradientClipping,
    ZScoreGradientClipping,
)
from lightning_reg._engine import _lightning
from lightning_reg.functional import (
    clip_gradient_norm_,
    clip_gradient_norm_per_tensor_,
    clip_gradient_value_,
    drop_peak_gradients_,
    nonfinite_gradients,
    zero_nonfinite_gradients_,
)


def with_gradients(dtype=torch.float32):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(3, 4), (7,), (), (0, 5), (2, 3, 2)]]
    for p in params[:-1]:
        p.grad = torch.randn(p.shape).to(dtype)
    return params  # the last has no gradient


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_clipping_equals_torch(norm_type, max_norm, dtype):
    ours, theirs = with_gradients(dtype), with_gradients(dtype)
    theirs[3].grad = None  # empty: torch cannot take its maximum
    norm = clip_gradient_norm_(ours, max_norm, norm_type)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True) if q.grad is not None)
    assert ours[-1].grad is None


def test_norm_clipping_of_mixed_dtypes_equals_torch():
    both = [[*with_gradients(torch.float32), *with_gradients(torch.bfloat16)] for _ in range(2)]
    ours, theirs = ([p for p in params if p.grad is not None] for params in both)
    assert torch.equal(clip_gradient_norm_(ours, 0.7), nn.utils.clip_grad_norm_(theirs, 0.7))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True))


def test_cpu_clip_factor_equals_torch():
    """For random norms and bounds over the whole range of float32, and for extreme ones."""
    random = np.random.default_rng(0)
    norms = np.concatenate([10 ** random.uniform(-44, 38, 3000), random.uniform(0.5, 2, 3000), [0, math.inf, math.nan, 3e38]])
    bounds = np.concatenate([10 ** random.uniform(-38, 38, 3000), random.uniform(0.5, 2, 3000), [1e-3, 1.0, 1.0, math.inf]])
    doubles = 0
    for norm, bound in zip(norms, bounds, strict=True):
        ours, theirs = (parameter([1.0], grad=[norm]) for _ in range(2))
        clip_gradient_norm_([ours], bound)
        nn.utils.clip_grad_norm_([theirs], bound)
        assert_close(ours.grad, theirs.grad, rtol=0.0, atol=0.0, equal_nan=True)
        gradient = parameter([1.0], grad=[norm]).grad
        doubles += torch.equal(gradient * min(bound / (gradient.item() + 1e-6), 1.0), theirs.grad)
    assert doubles < 0.9 * len(norms)  # a factor in double precision would differ


def test_value_clipping_equals_torch():
    ours, theirs = with_gradients(), with_gradients()
    clip_gradient_value_(ours, 0.5)
    nn.utils.clip_grad_value_(theirs, 0.5)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours[:-1], theirs[:-1], strict=True))
    assert ours[-1].grad is None


def sparse_gradient():
    embedding = nn.Embedding(4, 2, sparse=True)
    (embedding(torch.tensor([1, 3, 1])) * 5).sum().backward()
    return embedding.weight


def test_clipping_of_sparse_gradients_matches_dense():
    for clip in (lambda p: clip_gradient_norm_([p], 2.0), lambda p: clip_gradient_value_([p], 6.0)):
        sparse, dense = sparse_gradient(), sparse_gradient()
        dense.grad = dense.grad.to_dense()
        clip(sparse)
        clip(dense)
        assert sparse.grad.is_sparse
        assert_close(sparse.grad.to_dense(), dense.grad)
        assert not torch.equal(dense.grad, sparse_gradient().grad.to_dense())


@pytest.mark.parametrize("k", [0, 1, 3])
def test_peak_dropping_zeros_largest_magnitudes(k):
    params = with_gradients()
    expected = []
    for p in params[:-1]:
        flat = p.grad.flatten().numpy().copy()
        flat[np.argsort(-np.abs(flat))[:k]] = 0
        expected.append(torch.tensor(flat).reshape(p.shape))
    drop_peak_gradients_(params, k)
    assert_close([p.grad for p in params[:-1]], expected, rtol=0.0, atol=0.0)


def test_peak_dropping_drops_exactly_k_of_tied_peaks():
    theta = parameter([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]], grad=[[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
    theta.grad = theta.grad.t().contiguous().t()
    drop_peak_gradients_([theta], 2)
    assert theta.grad.count_nonzero() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 5, 24, 30])
def test_peak_dropping_drops_the_first_of_tied_peaks(k, dtype):
    for number in range(20):
        values = torch.randint(-3, 4, (4, 6), generator=torch.Generator().manual_seed(number)).to(dtype)
        theta = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
        theta.grad = values.t().contiguous().t() if number % 2 else values.clone()
        order = values.abs().flatten().argsort(descending=True, stable=True)[:k]
        expected = values.flatten().index_fill(0, order, 0.0).view(4, 6)
        drop_peak_gradients_([theta], k)
        assert torch.equal(theta.grad, expected), number


@pytest.mark.parametrize("k", [1, 2])
def test_peak_dropping_is_deterministic(k):
    tied = [2.0, -2.0, 1.0, 2.0]
    theta = parameter([0.0] * 4, grad=tied)
    torch.use_deterministic_algorithms(True)
    try:
        drop_peak_gradients_([theta], k)
    finally:
        torch.use_deterministic_algorithms(False)
    assert theta.grad.tolist() == [0.0] * k + tied[k:]


def repeated_gradient(values=(0.1, 0.2, 0.3, 0.7)):
    """Return a parameter with a sparse gradient of three values for one index, and one for another."""
    p = nn.Parameter(torch.zeros(4, 1))
    p.grad = torch.sparse_coo_tensor([[1, 1, 1, 3]], torch.tensor(values).view(-1, 1), (4, 1), check_invariants=True)
    return p


def test_idle_bounds_keep_each_value_of_a_sparse_gradient():
    for act in (
        lambda p: clip_gradient_norm_([p], math.inf),
        lambda p: clip_gradient_norm_([p], 10.0),
        lambda p: clip_gradient_norm_per_tensor_([p], math.inf),
        lambda p: clip_gradient_value_([p], math.inf),
        lambda p: clip_gradient_value_([p], 0.8),
        lambda p: nonfinite_gradients([p]),
        lambda p: zero_nonfinite_gradients_([p]),
    ):
        p = repeated_gradient()
        act(p)
        assert not p.grad.is_coalesced()
        assert torch.equal(p.grad._values(), repeated_gradient().grad._values())


def test_repeated_indices_are_bounded_by_their_sum():
    p = repeated_gradient()
    clip_gradient_value_([p], 0.5)
    assert_close(p.grad.to_dense().flatten(), torch.tensor([0.0, 0.5, 0.0, 0.5]))
    p = repeated_gradient()
    assert_close(clip_gradient_norm_([p], 0.1), torch.tensor([0.6, 0.7]).norm())
    assert_close(p.grad.to_dense().norm(), torch.tensor(0.1), rtol=1e-4, atol=0.0)
    p = repeated_gradient((math.inf, 1.0, 2.0, 0.7))
    assert nonfinite_gradients([p]).tolist() == [True]
    zero_nonfinite_gradients_([p])
    assert_close(p.grad.to_dense().flatten(), torch.tensor([0.0, 0.0, 0.0, 0.7]))


def test_each_optimizer_has_its_own_norm():
    class Unequal(Gan):
        """The first optimizer steps while there are far larger gradients for the second one."""

        def training_step(self, batch, batch_idx):
            self.net[4].weight.grad = torch.full_like(self.net[4].weight, 1e3)
            super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            self.norm, self.other_norm = self.net[0].weight.grad.norm(), self.net[4].weight.grad.norm()

    free, clipped = (fit(cbs, Unequal((0,)), max_epochs=1) for cbs in ([], [GradientNormClipping(50.0)]))
    assert clipped.norm == free.norm < 50 < clipped.other_norm


def test_peak_dropping_of_sparse_gradient_raises():
    with pytest.raises(ValueError, match=r"peak dropping needs a dense gradient, got a sparse one: .* sparse=False"):
        drop_peak_gradients_([sparse_gradient()])


@pytest.mark.parametrize(
    ("callback", "trainer"),
    [
        (GradientNormClipping(0.5), {"gradient_clip_val": 0.5}),
        (GradientValueClipping(0.05), {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
    ],
)
def test_clipping_equals_trainer(callback, trainer):
    for accumulate in (1, 3):
        ours = fit([callback], accumulate_grad_batches=accumulate)
        assert same(ours, fit(accumulate_grad_batches=accumulate, **trainer))
        assert not same(ours, fit(accumulate_grad_batches=accumulate))


def test_peak_dropping_equals_manual_hook():
    class ByHand(Classifier):
        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                p.grad.view(-1)[p.grad.abs().argmax()] = 0

    assert same(fit([PeakGradientDropping()]), fit(model=ByHand()))
    assert not same(fit([PeakGradientDropping()]), fit())


def test_norm_clipping_with_tensor_scope():
    class RecordsNorms(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.norms = [p.grad.norm() for p in self.parameters()]

    model = fit([GradientNormClipping(0.1, scope="tensor")], RecordsNorms(), max_epochs=1)
    assert max(model.norms) <= 0.1
    assert torch.stack(model.norms).norm() > 0.1  # a norm of the whole model would not allow this
    for p, q in zip(with_gradients()[:3], with_gradients()[:3], strict=True):
        assert_close(clip_gradient_norm_([p], 0.1), nn.utils.clip_grad_norm_([q], 0.1))


def test_two_clippings_on_separate_parts():
    class Recorder(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.norms = [torch.stack([p.grad.norm() for p in self.net[i].parameters()]).norm() for i in (0, 4)]

    callbacks = [GradientNormClipping(0.2, params="net.0.*"), GradientNormClipping(0.1, params="net.4.*")]
    assert [callback.name for callback in callbacks] == ["GradientNormClipping-net_0", "GradientNormClipping-net_4"]
    assert_close(torch.stack(fit(callbacks, Recorder(), max_epochs=1).norms), torch.tensor([0.2, 0.1]), rtol=1e-4, atol=0.0)


def test_gradients_are_unscaled_before_clipping():
    def scaled(**kwargs):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return fit(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **kwargs)

    ours = scaled(callbacks=[GradientNormClipping(0.5)])
    assert same(ours, scaled(gradient_clip_val=0.5))
    assert not same(ours, scaled())


PROCESSING = [
    AdaptiveGradientClipping(),
    GradientCentralization(),
    GradientNoise(0.1),
    GradientNormClipping(1.0),
    GradientNormClipping(1.0, scope="tensor", norm_type=math.inf),
    GradientValueClipping(1.0),
    NonFiniteGradientGuard(),
    PeakGradientDropping(),
    QuantileGradientClipping(),
    ZScoreGradientClipping(),
]


@pytest.mark.parametrize("callback", PROCESSING, ids=lambda callback: type(callback).__name__)
def test_fused_optimizer_raises_only_under_loss_scaling(callback):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    message = rf"{type(callback).__name__} acts before .* the fused Adam unscales .* fused=False, or set precision="
    with pytest.raises(ValueError, match=message):
        fit([callback], Fused(), plugins=[plugin])
    fit([callback], Fused(), max_epochs=1)


@pytest.mark.parametrize("callback", [GradientNormClipping(1.0), GradientValueClipping(1.0)])
def test_clipping_twice_warns(callback):
    with pytest.warns(UserWarning, match=rf"{callback.name} and Trainer\(gradient_clip_val=0.5\) both clip .* remove one"):
        fit([callback], gradient_clip_val=0.5)


def test_parameters_that_never_learn_warn():
    model = Classifier()
    model.net[4] = nn.Linear(16, 1)
    model.training_step = lambda batch, batch_idx: model.net(batch[0]).square().mean()
    with pytest.warns(UserWarning, match=r"with k=1 drops every entry of net.4.bias, .* params=\['all', '!net.4.bias'\]"):
        fit([PeakGradientDropping()], model)


@pytest.mark.filterwarnings("ignore:.*did not act in 4 batches")
@pytest.mark.parametrize("callback", PROCESSING, ids=lambda callback: type(callback).__name__)
def test_parameters_without_gradient_are_unchanged(callback):
    class Without(Classifier):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.SGD(self.unused.parameters(), lr=0.05)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                if batch_idx or optimizer.param_groups[0]["params"][0] is self.unused.weight:
                    optimizer.step()
            self.manual_backward(super().training_step(batch, batch_idx))

    model = Without()
    model.automatic_optimization = False
    before = model.unused.weight.clone()
    memory = Memory()
    fit([copy.deepcopy(callback)], model, max_epochs=1, logger=memory, log_every_n_steps=1)
    assert torch.equal(model.unused.weight, before)
    first = {key.rpartition("/")[2] for key in memory.steps.get(0, {})}
    assert not first & {"norm_before_1", "clipped_steps_1"}  # a missing gradient does not count as norm 0


@pytest.mark.parametrize("callback", PROCESSING, ids=lambda callback: type(callback).__name__)
def test_flattened_parameters_raise_unless_supported(callback, monkeypatch):
    """Lightning's FSDP1 needs CUDA, so it is simulated here."""
    monkeypatch.setattr(_lightning, "uses_fsdp1", lambda trainer: True)
    monkeypatch.setattr(_lightning, "fsdp1_root", lambda trainer: None)
    if callback.supports_fsdp1:
        fit([callback], max_epochs=1)
    else:
        with pytest.raises(
            ValueError, match=r"does not work with the flattened parameters of FSDPStrategy: use ModelParallelStrategy"
        ):
            fit([callback], max_epochs=1)


def test_fsdp1_root_clips_norm(monkeypatch):
    class Root:
        calls = []

        def clip_grad_norm_(self, max_norm, norm_type):
            self.calls.append((max_norm, norm_type))
            return torch.tensor(5.0)

    monkeypatch.setattr(_lightning, "fsdp1_root", lambda trainer: Root())
    memory = Memory()
    fit([GradientNormClipping(0.5, norm_type=3.0)], max_epochs=1, logger=memory, log_every_n_steps=1)
    assert Root.calls == [(0.5, 3.0)] * 4
    assert memory.steps[0]["reg/GradientNormClipping/norm_before"] == 5.0
    for part in ({"params": "weights"}, {"scope": "tensor"}):
        with pytest.raises(ValueError, match="clipping needs params='all' and scope='model', got params="):
            fit([GradientNormClipping(0.5, **part)])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_clipping_per_tensor_equals_torch(norm_type, dtype):
    ours, theirs = with_gradients(dtype), with_gradients(dtype)
    norms = clip_gradient_norm_per_tensor_(ours, 0.5, norm_type)
    expected = [nn.utils.clip_grad_norm_([q], 0.5, norm_type) for q in theirs if q.grad is not None and q.numel()]
    assert_close(norms, torch.stack(expected).to(norms.dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0.0)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert_close(p.grad, q.grad)
    joint = with_gradients(dtype)
    clip_gradient_norm_(joint, 0.5, norm_type)
    assert not all(torch.allclose(p.grad, q.grad) for p, q in zip(joint[:-1], ours[:-1], strict=True))


def test_clipping_without_any_gradient():
    params = [nn.Parameter(torch.zeros(3))]
    assert clip_gradient_norm_(params, 1.0) == 0
    clip_gradient_value_(params, 1.0)
    drop_peak_gradients_(params)
    assert params[0].grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientNormClipping(0.0), r"GradientNormClipping: max_norm must be a number in \(0, inf\], got 0.0"),
        (lambda: GradientNormClipping(float("nan")), "max_norm must be a number .* got nan"),
        (
            lambda: GradientNormClipping(1.0, norm_type=0),
            r"GradientNormClipping: norm_type must be a number in \(0, inf\], got 0",
        ),
        (lambda: GradientNormClipping(1.0, scope="layer"), "scope must be 'model' or 'tensor', got 'layer'"),
        (lambda: GradientValueClipping(-1), r"GradientValueClipping: clip_value must be a number in \(0, inf\], got -1"),
        (lambda: PeakGradientDropping(-1), "PeakGradientDropping: k must be an integer ≥ 0, got -1"),
        (lambda: PeakGradientDropping(0.5), "PeakGradientDropping: k must be an integer ≥ 0, got 0.5"),
    ],
    ids=[
        "max_norm of 0",
        "max_norm of NaN",
        "norm_type of 0",
        "unknown scope",
        "negative clip_value",
        "negative k",
        "fractional k",
    ],
)
def test_bounds_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
