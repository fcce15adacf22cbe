"""A penalty on the outputs of modules, not on their weights."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import NON_NEGATIVE, check_choice
from lightning_reg._engine.modules import ForwardHook, ModuleRegularizer
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.outputs import batch_size, describe_output, is_float, main_output
from lightning_reg._engine.ranks import answers_of_all
from lightning_reg._engine.steps import sign_of_penalties
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import check_tensor
from lightning_reg._tensors.graphs import leaves
from lightning_reg._tensors.reductions import in_accumulation_dtype, real_pairs, sum_scalars
from lightning_reg._tensors.shards import full_tensor
from lightning_reg.dropout.rates import restore_class_, swap_class_

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from lightning_reg._engine.clock import Moment
    from lightning_reg._engine.module_selection import Patterns
    from lightning_reg.schedules import Value


def activity_penalty(output: Tensor, p: Literal[1, 2] = 1, samples: int | None = None) -> Tensor:
    """Return the mean over the batch of ‖h‖₁ or ½‖h‖₂², where h is the output for one sample.

    Args:
        output: A batch.
        p: 1 for the L1 norm, 2 for half the squared L2 norm.
        samples: The number of samples in the batch. By default the size of dimension 0.

    Returns:
        A scalar, in float32 or better.

    Example:
        >>> import torch
        >>> activity_penalty(torch.tensor([[1.0, -2.0], [0.0, 3.0]])), activity_penalty(torch.tensor([[3.0, 4.0]]), p=2)
        (tensor(3.), tensor(12.5000))
    """
    check_tensor("activity_penalty: output", output)
    precise = in_accumulation_dtype(output)
    total = precise.abs().sum() if p == 1 else real_pairs([precise])[0].square().sum() / 2
    if samples is None:
        samples = output.shape[0] if output.ndim else 1
    return total / max(samples, 1)


class ActivityPenalty(ModuleRegularizer):
    """Keep the outputs of modules small or sparse: J = L + λ · mean over the batch of ‖h‖₁ or ½‖h‖₂².

    Runs in: the forward pass of each selected module in training mode, and ``on_before_backward``, for every batch.

    h is the output of a module for one sample. With several modules, their penalties are added.
    For recurrent modules and ``nn.MultiheadAttention``, only the output is penalized, not the states or the attention weights;
    ``batch_first`` determines the batch dimension. The padding of a ``PackedSequence`` is not penalized.
    The callback keeps a copy of h until the backward pass, so the model may change h in place.
    The penalty depends on the data, so it acts on each accumulated batch, divided by ``accumulate_grad_batches`` like the loss.
    If your module accumulates gradients itself, divide λ by the same number as the loss.
    Under DDP, each rank penalizes the outputs for its own samples. The metric is the mean over all ranks.
    Forward passes under ``torch.no_grad`` are not penalized. Compiled models work. Activation checkpointing works with
    ``use_reentrant=False``.
    The loss that the module logs does not contain the penalty.

    Args:
        strength: The strength λ ≥ 0, or a schedule.
        modules: Patterns of module names (``"encoder.layers.?"``; ``*`` also matches dots) or class names (``"ReLU"``). A
            leading ``!`` excludes. ``"*"`` means all layers before the last one that has parameters. Each module must return
            one float tensor, or be a recurrent or attention module.
        p: 1 for the L1 norm, for sparse outputs. 2 for half the squared L2 norm, for small outputs.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``strength`` is negative or NaN, ``p`` is neither 1 nor 2, ``modules`` matches nothing, or the module
            uses manual optimization.
        TypeError: If ``modules`` contains a class or a module instead of a name. In the first forward pass, if a module
            returns anything other than one float tensor.
        RuntimeError: In the first backward pass, if a module runs under activation checkpointing with ``use_reentrant=True``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivityPenalty(1e-3, modules="ReLU")], logger=False)

    Reference:
        X. Glorot, A. Bordes, Y. Bengio, "Deep Sparse Rectifier Neural Networks", 2011.
    """

    phase = Phase.PENALTY
    valid_ranges = {"strength": NON_NEGATIVE}
    fit_attributes = ("_handles", "_values", "_logged", "_recorded", "_last_term", "_trainer")
    selector = "modules"
    effect = "be penalized"
    deepspeed_alternative = "add functional.activity_penalty to the loss in training_step, or use DDP or FSDP2"

    def __init__(self, strength: Value, *, modules: Patterns, p: Literal[1, 2] = 1, name: str | None = None) -> None:
        check_choice("ActivityPenalty: p", p, (1, 2))
        if not modules:
            raise ValueError("ActivityPenalty: modules must name modules or classes, as in modules=['ReLU'], got nothing")
        self.strength = strength
        self.modules = modules
        self.p = p
        super().__init__(name)
        self._handles: list[RemovableHandle] = []
        self._values: list[tuple[str, Tensor]] = []  # of the forward passes since the last backward pass, by module
        self._recorded: set[str] = set()  # the modules with a value in this batch
        self._logged: list[tuple[str, Tensor]] = []  # the values of the last logged batch
        self._last_term: tuple[Tensor, float] | None = None
        self._trainer: Trainer | None = None
        self._checks_loss = False  # whether to look for parameters that the loss ignores

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules whose outputs are penalized."""
        return self.matching(pl_module, self.modules)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error in manual optimization, where a loss may belong to any of the optimizers."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "ActivityPenalty adds to the loss, but in manual optimization a loss may belong to any of the optimizers: add "
                "lightning_reg.functional.activity_penalty to the right loss in training_step instead"
            )
        super().prepare(trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register a forward hook on each module."""
        super().attach(trainer, pl_module)
        if any(math.isnan(sign_of_penalties(optimizer)) for optimizer in trainer.optimizers):
            raise ValueError(
                f"{self.name} adds one term to the loss, but the optimizer maximizes only some of its parameter groups: set "
                "maximize for all groups or for none"
            )
        self._trainer = trainer
        self._checks_loss = _lightning.ddp_finds_unused_parameters(trainer)
        for name, module in self.modules_found.items():
            self._handles.append(module.register_forward_hook(self._forward_hook(name)))
            swap_class_(module)  # graphs that were compiled before would ignore the hook

    def detach(self) -> None:
        """Remove the forward hooks."""
        for module in list(self.modules_found.values())[: len(self._handles)]:
            restore_class_(module)
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._values.clear()
        self._logged.clear()
        self._recorded.clear()
        self._last_term = self._trainer = None

    def update(self, moment: Moment) -> None:
        """Update the strength, and discard the values of a batch whose loss was ``None``, so that it had no backward pass."""
        self._values.clear()
        self._recorded.clear()
        super().update(moment)

    def _forward_hook(self, name: str) -> ForwardHook:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not module.training or not self.current["strength"]:
                return
            if not torch.is_grad_enabled():
                return
            main = main_output(module, output)
            if not is_float(main):
                raise TypeError(
                    f"ActivityPenalty: {name!r} ({type(module).__name__}) returns {describe_output(main)}, expected one float "
                    f"tensor; select a module inside it, or exclude it with '!{name}'"
                )
            data = main.data if isinstance(main, PackedSequence) else main
            # a copy, since the model may change the output in place, as nn.ReLU(inplace=True) does
            value = activity_penalty(data.clone(), self.p, batch_size(module, main))
            if not is_compiling() and _is_backward():  # checkpointing recomputes what it did not save, the value included
                self._check_recomputed(name, module)
            else:
                self._values.append((name, value))
                self._recorded.add(name)

        return ForwardHook(record)

    def _check_recomputed(self, name: str, module: nn.Module) -> None:
        """Raise an error if an output has a graph only now, in the backward pass, when it is too late to penalize it."""
        if name not in self._recorded:
            raise RuntimeError(
                f"{self.name}: {name!r} ({type(module).__name__}) runs under activation checkpointing with use_reentrant=True, "
                "where its output has no gradient when the loss is computed: use use_reentrant=False, or exclude it with "
                f"'!{name}'"
            )

    @property
    def adds_to_loss(self) -> bool:
        """Whether the penalty is added to the loss: always, since its gradient depends on the forward pass."""
        return True

    def before_loss_term(self, loss: Tensor) -> None:
        """Raise an error in the first batch if only the penalty uses some parameters, which DDP then treats as unused.

        DDP looks for unused parameters in the graph of the loss, and would reduce their gradients twice.
        """
        if not self._checks_loss or not self._values:
            return
        self._checks_loss = False
        used = leaves(loss)
        if ignored := [name for name, value in self._values if leaves(value) - used]:
            raise ValueError(
                f"{self.name}: the loss does not depend on all parameters behind {abbreviate(ignored)}, and DDP with "
                "find_unused_parameters=True treats these as unused: use the output in the loss, exclude the module with "
                f"'!{ignored[0]}', or use find_unused_parameters=False"
            )

    def loss_term(self, optimizer: Optimizer, last: bool) -> tuple[Tensor, float] | None:
        """Return the mean over this batch, and λ divided by the number of accumulated batches, as the loss is divided."""
        if not self._values or self._trainer is None:
            return None
        value = sum_scalars([value for _, value in self._values])
        if self.logging:
            self._logged = [(name, self.current["strength"] * value.detach()) for name, value in self._values]
        self._values.clear()
        strength = sign_of_penalties(optimizer) * self.current["strength"]
        self._last_term = value.detach(), strength / self._trainer.accumulate_grad_batches
        return value, self._last_term[1]

    def collect_metrics(self) -> Iterator[tuple[str, float | Tensor]]:
        """Yield the metrics. The penalty covers the samples of all ranks."""
        if self._trainer is not None:
            answers = answers_of_all(self._trainer, _by_module(self._logged))
            self._logged.clear()
            if any(answers):
                self.log_metrics(penalty=penalty_of_all(answers, _lightning.tensor_parallel_size(self._trainer)))
        yield from super().collect_metrics()

    def objective(self, optimizer: Optimizer) -> Tensor | None:
        """Return the penalty that was added to the loss of the last batch."""
        return self._last_term and self._last_term[0] * self._last_term[1]

    def route(self) -> str:
        """Return where the penalty acts: always on the loss."""
        return "loss"


def penalty_of_all(answers: Sequence[dict[str, float]], parts: int) -> float:
    """Return the penalty on the samples of all ranks, from the values of each rank.

    Args:
        answers: For each rank, the value of each module that ran.
        parts: How many ranks in a row share their samples under tensor parallelism. Each has a part of a module's output, and
            then their values differ, or each has all of it.

    Example:
        >>> penalty_of_all([{"net.1": 1.0}, {"net.1": 2.0}], parts=1)  # a mean over samples
        1.5
        >>> penalty_of_all([{"net.1": 1.0, "net.2": 5.0}, {"net.1": 2.0, "net.2": 5.0}], parts=2)  # columns, and replicas
        8.0
    """
    groups = [answers[start : start + parts] for start in range(0, len(answers), parts)]
    means = []
    for module in dict.fromkeys(name for answer in answers for name in answer):
        of_groups = [[answer[module] for answer in group if module in answer] for group in groups]
        means.append(fmean(values[0] if len(set(values)) == 1 else sum(values) for values in of_groups if values))
    return sum(means)


def _by_module(values: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the sum of the values of each module, with a single transfer from the device."""
    numbers = torch.stack([full_tensor(value).float() for _, value in values]).tolist() if values else []
    sums: dict[str, float] = {}
    for (name, _), number in zip(values, numbers, strict=True):
        sums[name] = sums.get(name, 0.0) + number
    return sums


def _is_backward() -> bool:
    """Return whether a backward pass is running, in which checkpointed modules run again."""
    return bool(torch._C._current_graph_task_id() != -1)
