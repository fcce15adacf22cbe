"""A model that records each training step, and independent reference checks to run after each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from helpers import Classifier
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Recording:
    """Mixin for a module with one optimizer: plain SGD. It records each training step and runs a check after it.

    Attributes:
        holds: The check. It gets the model after each training batch, and raises an error if something is wrong.
        weight_names: The parameters that ``params="weights"`` selects, as far as they are trained.
        columns: Those whose output units are columns.
        before: The weights before the step, by name.
        data_gradients: The gradients of the plain loss.
        gradients: The gradients that the optimizer used.
        norms: The norms of the data gradients, one per step.
        start: The weights before the first step.
        steps: The number of checked steps.
    """

    lr: float
    named_parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]]

    def record(self, holds: Callable[[Any], None], weight_names: Sequence[str], columns: Sequence[str] = ()) -> None:
        self.holds, self.weight_names, self.columns = holds, weight_names, columns
        self.start: dict[str, Tensor] = {}
        self.norms: list[float] = []
        self.steps = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.batch = batch
        self.gradients: dict[str, Tensor] = {}
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.start = self.start or self.before

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss_of(super().training_step(batch, batch_idx))
        self.data_gradients = self.gradients_of(loss)
        self.norms.append(norm_of(self.data_gradients))
        return loss

    def loss_of(self, output: Any) -> Tensor:
        """Return the loss in what ``training_step`` returns."""
        return output["loss"] if isinstance(output, dict) else output

    def gradients_of(self, value: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a value with respect to all trained parameters, and keep the graph."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(value, list(trained.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(trained, gradients, strict=True))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.holds(self)
        self.steps += 1

    @property
    def after(self) -> dict[str, Tensor]:
        """The current weights."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def updated(self) -> dict[str, Tensor]:
        """Return the weights after a plain SGD step with the recorded gradients, bit for bit."""
        gradients = self.gradients
        return {name: p.add(gradients[name], alpha=-self.lr) if name in gradients else p for name, p in self.before.items()}

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter, or a tensor of its shape, with a row for each output unit; a vector as it is."""
        if tensor.ndim < 2:
            return tensor
        return tensor.t() if name in self.columns else tensor.flatten(1)


class Observed(Recording, Classifier):
    """The test model under plain SGD, with its activations.

    Args:
        holds: The check after each step.

    Attributes:
        relu_output, dropout_input, dropout_output: Activations of the last forward pass.
    """

    def __init__(self, holds: Callable[[Observed], None], **options: float) -> None:
        super().__init__(**{"momentum": 0.0, **options})
        self.record(holds, ("net.0.weight", "net.4.weight"))
        self.net[2].register_forward_hook(self._record_relu)
        self.net[3].register_forward_pre_hook(self._record_dropout_input)
        self.net[3].register_forward_hook(self._record_dropout_output)

    def _record_relu(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.relu_output = output.detach()

    def _record_dropout_input(self, module: nn.Module, args: Any) -> None:
        self.dropout_input = args[0].detach()

    def _record_dropout_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.dropout_output = output.detach()


LR = 0.05
"""The learning rate of the test models."""


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def penalized(reference: Callable[[dict[str, Tensor], Observed], Tensor]) -> Callable[[Observed], None]:
    """The gradient is the data gradient plus autograd's gradient of a reference penalty in plain torch."""

    def holds(model: Observed) -> None:
        leaves = {name: p.clone().requires_grad_() for name, p in model.before.items()}
        value = reference(leaves, model)
        penalty_gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        for name, addend in zip(leaves, penalty_gradients, strict=True):
            if name in model.data_gradients:
                expected = model.data_gradients[name] + addend
                assert_close(model.gradients[name], expected, rtol=1e-4, atol=1e-6)
        optimizer_alone_moves(model)

    return holds


def optimizer_alone_moves(model: Observed) -> None:
    """The weights after the step are those of plain SGD with the recorded gradients, bit for bit."""
    for name, expected in model.updated().items():
        assert torch.equal(model.after[name], expected), f"{name} was changed by something other than the optimizer"


def gradients_are(check: Callable[[str, Tensor, Tensor, Tensor], None]) -> Callable[[Observed], None]:
    """A check of (name, weight before the step, data gradient, step gradient) passes for each parameter.

    The tensors have a row for each output unit.
    """

    def holds(model: Observed) -> None:
        assert model.gradients.keys() == model.data_gradients.keys()
        for name, gradient in model.gradients.items():
            check(name, *(model.rows(name, t) for t in (model.before[name], model.data_gradients[name], gradient)))
        optimizer_alone_moves(model)

    return holds


def weights_are(check: Callable[[Tensor, Tensor], None]) -> Callable[[Observed], None]:
    """A check of (weight after plain SGD, weight after the step) passes for each weight. The rest equals plain SGD.

    The weights have a row for each output unit.
    """

    def holds(model: Observed) -> None:
        for name, expected in model.updated().items():
            if name in model.weight_names:
                check(model.rows(name, expected), model.rows(name, model.after[name]))
            else:
                assert torch.equal(model.after[name], expected)

    return holds


def unchanged(model: Observed) -> None:
    """Gradients and weights are those of training without the callback."""
    for name, gradient in model.gradients.items():
        assert_close(gradient, model.data_gradients[name], rtol=1e-6, atol=1e-8)
    optimizer_alone_moves(model)


def row_norms(low: float, high: float, tolerance: float = 2e-5) -> Callable[[Observed], None]:
    """Each output unit's norm is in an interval, and its direction is that of plain SGD. A unit of zeros has none."""

    def check(expected: Tensor, after: Tensor) -> None:
        nonzero = expected.norm(dim=1) > 0
        assert not after[~nonzero].any()
        norms = after[nonzero].double().norm(dim=1)
        assert bool((norms >= low - tolerance).all()), norms
        assert bool((norms <= high + tolerance).all()), norms
        cosines = torch.cosine_similarity(after[nonzero], expected[nonzero], dim=1)
        assert_close(cosines, torch.ones_like(cosines), rtol=0.0, atol=1e-5)

    return weights_are(check)


def norm_clipped(bound: Callable[[Observed], float]) -> Callable[[Observed], None]:
    """All gradients are the data gradients times one factor, which scales a larger norm to the bound."""

    def holds(model: Observed) -> None:
        factor = min(1.0, bound(model) / (model.norms[-1] + 1e-6))
        for name, gradient in model.gradients.items():
            assert_close(gradient, model.data_gradients[name] * factor, rtol=1e-4, atol=1e-7)
        optimizer_alone_moves(model)

    return holds


def quantile_so_far(quantile: float) -> Callable[[Observed], float]:
    return lambda model: float(torch.tensor(model.norms, dtype=torch.float64).quantile(quantile))


def z_score_so_far(z: float, decay: float) -> Callable[[Observed], float]:
    """Return the bound of the z-score rule by its definition, for a warmup of one step."""

    def bound(model: Observed) -> float:
        mean, variance = model.norms[0], 0.0
        allowed = math.inf
        for norm in model.norms[1:]:
            deviation = math.sqrt(variance)
            score = (norm - mean) / (deviation + 1e-6)
            allowed = mean + z * deviation * z / score if score > z else math.inf
            clipped = min(norm, allowed)
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        return allowed

    return bound


def adaptive_clipped(factor: float, eps: float) -> Callable[[Observed], None]:
    """Each unit's gradient norm is at most a fraction of the unit's norm. A vector is one unit."""

    def check(name: str, weight: Tensor, data: Tensor, gradient: Tensor) -> None:
        dims = 1 if weight.ndim > 1 else 0
        bound = factor * weight.norm(dim=dims, keepdim=True).clamp(min=eps)
        expected = data * (bound / data.norm(dim=dims, keepdim=True)).clamp(max=1)
        assert_close(gradient, expected, rtol=1e-4, atol=1e-8)

    return gradients_are(check)


def centered(name: str, weight: Tensor, data: Tensor, gradient: Tensor) -> None:
    """Each row of a matrix gradient has mean 0. Other gradients are unchanged."""
    expected = data - data.mean(dim=1, keepdim=True) if weight.ndim > 1 else data
    assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def noisy(std: float, decay: float) -> Callable[[Observed], None]:
    """The gradient is the data gradient plus Gaussian noise of the expected standard deviation."""

    def holds(model: Observed) -> None:
        noise = torch.cat([(model.gradients[name] - data).flatten() for name, data in model.data_gradients.items()])
        expected = std / (1 + model.steps) ** (decay / 2)
        assert abs(float(noise.std()) / expected - 1) < 6 / math.sqrt(2 * len(noise))  # six standard errors
        assert abs(float(noise.mean())) < 4 * expected / math.sqrt(len(noise))
        optimizer_alone_moves(model)

    return holds


def peak_dropped(name: str, weight: Tensor, data: Tensor, gradient: Tensor) -> None:
    """The largest entry of the gradient is 0. The others are unchanged."""
    expected = data.clone(memory_format=torch.contiguous_format)
    expected.view(-1)[data.abs().argmax()] = 0.0
    assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def value_clipped(bound: float) -> Callable[[Observed], None]:
    def check(name: str, weight: Tensor, data: Tensor, gradient: Tensor) -> None:
        assert_close(gradient, data.clamp(-bound, bound), rtol=1e-6, atol=1e-8)

    return gradients_are(check)


def soft_thresholded(strength: float) -> Callable[[Observed], None]:
    def check(expected: Tensor, after: Tensor) -> None:
        assert_close(after, expected.sign() * (expected.abs() - LR * strength).clamp(min=0))

    return weights_are(check)


def units_soft_thresholded(strength: float) -> Callable[[Observed], None]:
    def check(expected: Tensor, after: Tensor) -> None:
        shrinkage = LR * strength * math.sqrt(expected.shape[1])
        assert_close(after, expected * (1 - shrinkage / expected.norm(dim=1, keepdim=True)).clamp(min=0))

    return weights_are(check)


def shrunk(epsilon: float) -> Callable[[Observed], None]:
    """Each weight has lost a random fraction of itself: at most epsilon, and half of that on average."""

    def check(expected: Tensor, after: Tensor) -> None:
        assert not after[expected == 0].any()
        fractions = 1 - (after / expected)[expected != 0]
        assert float(fractions.min()) >= -1e-5
        assert float(fractions.max()) <= epsilon + 1e-5
        assert abs(float(fractions.mean()) - epsilon / 2) < 6 * epsilon / math.sqrt(12 * fractions.numel())

    return weights_are(check)


def decayed(weight_decay: float) -> Callable[[Observed], None]:
    """Decoupled weight decay: θ ← (1 − η·w)·θ − η·g on the weights."""

    def holds(model: Observed) -> None:
        for name, before in model.before.items():
            factor = 1 - model.lr * weight_decay if name in model.weight_names else 1.0
            expected = before * factor - model.lr * model.gradients[name] if name in model.gradients else before
            assert_close(model.after[name], expected, rtol=1e-5, atol=1e-7)

    return holds


def optimizer_decays(weight_decay: float) -> Callable[[Observed], None]:
    """The optimizer's own weight decay applies to all of its parameters."""

    def holds(model: Observed) -> None:
        for name, before in model.before.items():
            step = model.gradients[name] + weight_decay * before if name in model.gradients else 0.0
            assert_close(model.after[name], before - model.lr * step, rtol=1e-5, atol=1e-7)

    return holds


def clamped(low: float, high: float) -> Callable[[Observed], None]:
    return weights_are(lambda expected, after: assert_close(after, expected.clamp(low, high), rtol=0.0, atol=0.0))


def dropped_after_relu(p: float) -> Callable[[Observed], None]:
    """Between the ReLU and the model's own dropout, some entries are 0 and the others are scaled by 1/(1 − p)."""

    def holds(model: Observed) -> None:
        alive = model.relu_output != 0
        dropped = alive & (model.dropout_input == 0)
        assert 0.4 * p < float(dropped.sum() / alive.sum()) < 2 * p
        kept = alive & ~dropped
        assert_close(model.dropout_input[kept], model.relu_output[kept] / (1 - p))
        optimizer_alone_moves(model)

    return holds


def drops_at_rate(p: float) -> Callable[[Observed], None]:
    """The model's own dropout runs at rate p."""

    def holds(model: Observed) -> None:
        alive = model.dropout_input != 0
        dropped = alive & (model.dropout_output == 0)
        assert model.net[3].p == p
        assert 0.4 * p < float(dropped.sum() / alive.sum()) < 2 * p
        kept = alive & ~dropped
        assert_close(model.dropout_output[kept], model.dropout_input[kept] / (1 - p))
        optimizer_alone_moves(model)

    return holds


def pruned(fraction: float, steps_per_epoch: int = 4) -> Callable[[Observed], None]:
    """From the end of the first epoch on, exactly this fraction of the weights is 0, and always the same weights."""

    def holds(model: Observed) -> None:
        zeros = torch.cat([model.after[name].flatten() == 0 for name in model.weight_names])
        if model.steps + 1 < steps_per_epoch:
            optimizer_alone_moves(model)
            return
        assert int(zeros.sum()) == round(fraction * zeros.numel())
        model.zeros = getattr(model, "zeros", zeros)
        assert torch.equal(model.zeros, zeros)

    return holds


def activity_l1(strength: float) -> Callable[[dict[str, Tensor], Observed], Tensor]:
    """Return a reference penalty: the batch mean of the L1 norm of the ReLU's output."""

    def reference(leaves: dict[str, Tensor], model: Observed) -> Tensor:
        own = {name.removeprefix("net."): p for name, p in leaves.items() if name.startswith(("net.0.", "net.1."))}
        hidden = functional_call(model.net[:2], own, (model.batch[0],))
        return strength * hidden.relu().abs().sum(dim=1).mean()

    return reference


def of_matrices(function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], Observed], Tensor]:
    """Return a reference penalty: the sum of a function over the weights, with a row for each output unit."""
    return lambda leaves, model: torch.stack([function(model.rows(name, leaves[name])) for name in model.weight_names]).sum()


def half_gram_distance(matrix: Tensor) -> Tensor:
    """Return ½‖WWᵀ − I‖² of the smaller Gram matrix."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    return ((matrix @ matrix.t() - torch.eye(len(matrix))) ** 2).sum() / 2


def distance_from_start(leaves: dict[str, Tensor], model: Observed) -> Tensor:
    return torch.stack([((leaves[name] - model.start[name]) ** 2).sum() / 2 for name in model.weight_names]).sum()
