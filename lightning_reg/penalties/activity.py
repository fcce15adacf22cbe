"""A penalty on what modules put out, not on their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_reg._engine.arguments import NON_NEGATIVE, check_choice
from lightning_reg._engine.modules import ForwardHook, ModuleRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.reductions import accumulation_dtype, sum_scalars

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from lightning_reg.schedules import Value


def activity_penalty(output: Tensor, p: Literal[1, 2] = 1) -> Tensor:
    r"""Return the mean over the batch of :math:`\|h\|_1` or :math:`\frac{1}{2} \|h\|_2^2`, h being the output for one sample.

    Args:
        output: A batch, its samples in dimension 0.
        p: 1 for the L1 norm, 2 for half the squared L2 norm.

    Returns:
        A scalar, in float32 or better.

    Example:
        >>> import torch
        >>> activity_penalty(torch.tensor([[1.0, -2.0], [0.0, 3.0]])), activity_penalty(torch.tensor([[3.0, 4.0]]), p=2)
        (tensor(3.), tensor(12.5000))
    """
    precise = output.to(accumulation_dtype(output.dtype))
    size = precise.abs().sum() if p == 1 else precise.square().sum() / 2
    return size / max(output.shape[0] if output.ndim else 1, 1)


class ActivityPenalty(ModuleRegularizer):
    r"""Keep the outputs of modules small or sparse: :math:`J = L + \lambda\,\mathrm{mean}_b \|h_b\|`.

    Runs in: the forward pass of each matched module while it is in training mode, and ``on_before_backward``, with every batch.

    :math:`\|h_b\|` is the L1 norm of the output for sample b, or half its squared L2 norm. It depends on the data, so each
    batch that a step accumulates counts with its share. Under DDP each rank penalises its own samples.

    Args:
        strength: λ ≥ 0, or a schedule.
        modules: Name globs (``"encoder.layers.?"``; ``*`` matches dots too) or class names (``"ReLU"``) of modules that return
            one float tensor.
        p: 1 or 2.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For a negative or NaN strength, another p, ``modules`` that match nothing, or manual optimization.
        TypeError: In the first forward pass, for a module that returns something else than a float tensor.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivityPenalty(1e-3, modules="ReLU")], logger=False)

    Reference:
        X. Glorot, A. Bordes, Y. Bengio, "Deep Sparse Rectifier Neural Networks", 2011.
    """

    phase = Phase.PENALTY
    valid_ranges = {"strength": NON_NEGATIVE}
    selector = "modules"
    effect = "be penalized"
    deepspeed_alternative = "add functional.activity_penalty to the loss in training_step, or use DDP or FSDP2"

    def __init__(self, strength: Value, *, modules: str | list[str], p: Literal[1, 2] = 1, name: str | None = None) -> None:
        check_choice("ActivityPenalty: p", p, (1, 2))
        if not modules:
            raise ValueError("ActivityPenalty: modules must name modules or classes, as in modules=['ReLU'], got nothing")
        self.strength = strength
        self.modules = modules
        self.p = p
        super().__init__(name)
        self._handles: list[RemovableHandle] = []
        self._seen: list[Tensor] = []
        self._term: tuple[Tensor, float] | None = None
        self._trainer: Trainer | None = None

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules whose outputs it penalises."""
        return self.matching(pl_module, self.modules)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse manual optimization, where a loss may be for any of the optimizers."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "ActivityPenalty adds to the loss, which in manual optimization may be for any of the optimizers: add "
                "lightning_reg.functional.activity_penalty to the right loss in training_step instead"
            )
        super().prepare(trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the modules."""
        super().attach(trainer, pl_module)
        self._trainer = trainer
        for name, module in self.modules_found.items():
            self._handles.append(module.register_forward_hook(self._listener(name)))

    def detach(self) -> None:
        """Stop has_logger."""
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._term = self._trainer = None

    def update(self, progress: float) -> None:
        """Move the strength, and reset a batch whose loss was ``None``: its activations are in no backward pass."""
        self._seen.clear()
        super().update(progress)

    def _listener(self, name: str) -> ForwardHook:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            if not module.training or not self.current["strength"]:
                return
            if not isinstance(output, Tensor) or not output.is_floating_point():
                kind = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
                raise TypeError(
                    f"ActivityPenalty: {name!r} ({type(module).__name__}) returns {kind}, expected one float tensor; name a "
                    "module inside it"
                )
            self._seen.append(activity_penalty(output, self.p))

        return ForwardHook(listen)

    @property
    def adds_to_loss(self) -> bool:
        """Always: it has no other route."""
        return True

    def loss_term(self, optimizer: Optimizer, last: bool) -> tuple[Tensor, float] | None:
        """Return mean ‖h‖ of this batch, and λ divided by the number of batches in a step as Lightning divides the loss."""
        if not self._seen or self._trainer is None:
            return None
        value = sum_scalars(self._seen)
        self._seen.clear()
        if self.logging:
            self.log_metrics(penalty=self.current["strength"] * value.detach())
        self._term = value.detach(), self.current["strength"] / self._trainer.accumulate_grad_batches
        return value, self._term[1]

    def objective(self, optimizer: Optimizer) -> Tensor | None:
        """Return what the last batch added."""
        return self._term and self._term[0] * self._term[1]

    def route(self) -> str:
        """Say that it has the loss route only."""
        return "loss"
