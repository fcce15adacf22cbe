"""Random shrinkage of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lightning_reg._engine.arguments import PROBABILITY, check_choice, check_seed
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg._engine.tensor_arguments import tensor_list
from lightning_reg._tensors.random import generator_for
from lightning_reg._tensors.shards import local_tensor, shard_like

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg._engine.tensor_arguments import Tensors
    from lightning_reg.schedules import Value


@torch.no_grad()
def shrink_randomly_(params: Tensors, epsilon: float, generator: torch.Generator | None = None) -> None:
    """Shrink each entry by a random fraction of itself: θ ← θ − ε·U(0, 1)·θ, with an independent U for each entry.

    Args:
        params: Tensors, sharded or not, which are changed in place.
        epsilon: The largest fraction ε in [0, 1].
        generator: The random generator, on the device of the tensors and in the same state on every rank; torch's global
            generator by default.

    Example:
        >>> theta = torch.ones(1000)
        >>> shrink_randomly_([theta], 0.2, torch.Generator().manual_seed(0))
        >>> bool(theta.min() >= 0.8), bool(theta.max() <= 1.0), round(theta.mean().item(), 2)
        (True, True, 0.9)
    """
    params = tensor_list("shrink_randomly_: params", params)
    for p in params:
        fractions = torch.rand(p.shape, generator=generator, dtype=torch.float32, device=p.device).mul_(epsilon)
        local_tensor(p).mul_(local_tensor(shard_like(fractions.neg_().add_(1), p)))


class RandomShrinkage(ParameterRegularizer):
    """Shrink each weight by a random fraction of itself: θ ← θ − ε·U(0, 1)·θ, with an independent U for each weight.

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips. With
    ``every="epoch"``, the end of each epoch, before its validation.

    On average, each step decays the weights by ε/2. This is sometimes called weight clipping. For bounds on the weights, see
    ``WeightClipping``.
    The random numbers depend only on ``seed``, ``name``, and the step. They are the same on every rank, for sharded parameters
    (FSDP2), and after a resume. Global random generators stay untouched.

    Args:
        epsilon: The largest fraction ε in [0, 1], or a schedule.
        every: ``"step"`` or ``"epoch"``.
        seed: The seed of the random numbers, an integer in [0, 2³¹).
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If ``epsilon`` is outside [0, 1], ``every`` is neither ``"step"`` nor ``"epoch"``, ``seed`` is out of range,
            nothing is selected, or FSDP1 has flattened the parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomShrinkage(1e-3)], logger=False)
    """

    phase = Phase.SHRINKAGE
    valid_ranges = {"epsilon": PROBABILITY}
    supports_fsdp1 = False

    def __init__(
        self,
        epsilon: Value,
        *,
        every: Literal["step", "epoch"] = "step",
        seed: int = 0,
        params: Params = "weights",
        name: str | None = None,
    ) -> None:
        check_choice("RandomShrinkage: every", every, ("step", "epoch"))
        self.epsilon = epsilon
        self.every = every
        self.seed = check_seed("RandomShrinkage: seed", seed)
        super().__init__(params, name)

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Shrink the weights after a step, unless ``every="epoch"``."""
        if self.every == "step":
            self._shrink(params, step)

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Shrink the weights after an epoch, if ``every="epoch"``."""
        if self.every == "epoch":
            self._shrink(params, step)

    def _shrink(self, params: list[Parameter], step: Step) -> None:
        if params and self.current["epsilon"]:
            generator = generator_for(params[0].device, self.seed, self.name, *step.key)
            shrink_randomly_(params, self.current["epsilon"], generator)

    def epoch_metrics(self) -> dict[str, float]:
        """Return ε if weights are shrunk after an epoch."""
        return dict(self.current) if self.every == "epoch" else {}

    def route(self) -> str:
        """Return where the callback acts: after the step or the epoch."""
        return f"after the {self.every}"
