"""Shrinkage at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lightning_reg._engine.arguments import PROBABILITY, check_choice, check_seed
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.random import generator_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value


@torch.no_grad()
def shrink_randomly_(params: Sequence[Tensor], epsilon: float, generator: torch.Generator | None = None) -> None:
    r"""Shrink every entry by a random share of itself: :math:`\theta_i \leftarrow \theta_i - \epsilon\,u_i\,\theta_i`.

    Here :math:`u_i \sim U(0, 1)`, drawn anew for every entry.

    Args:
        params: Tensors, changed in place.
        epsilon: The largest share, in [0, 1].
        generator: Where the random numbers come from, on the tensors' device; torch's own by default.

    Example:
        >>> theta = torch.ones(1000)
        >>> shrink_randomly_([theta], 0.2, torch.Generator().manual_seed(0))
        >>> bool(theta.min() >= 0.8), bool(theta.max() <= 1.0), round(theta.mean().item(), 2)
        (True, True, 0.9)
    """
    for p in params:
        shares = torch.rand(p.shape, generator=generator, dtype=torch.float32, device=p.device).mul_(epsilon)
        p.mul_(shares.neg_().add_(1))


class RandomShrinkage(ParameterRegularizer):
    r"""Shrink every weight by a random share of itself: :math:`\theta \leftarrow \theta - \epsilon\,U(0, 1)\,\theta`.

    Runs in: right after each optimizer step (``register_step_post_hook``), or after the last batch of an epoch, before its
    validation.

    The rule of the article that this project grew from, under the name "weight clipping"; in the mean a decay of ε/2. The
    random numbers depend on ``seed``, ``name`` and the step alone: they are the same on every replica and after a resume, and
    training draws what it would draw without them.

    Args:
        epsilon: The largest share ε in [0, 1], or a schedule.
        every: ``"step"`` or ``"epoch"``.
        seed: Where its random numbers begin, ≥ 0.
        params: Which parameters: ``"weights"``, ``"all"``, globs, or a callable ``(name, parameter, module) -> bool``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For ε outside [0, 1], another period, a negative seed, a selection of nothing, or sharded parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomShrinkage(1e-3)], logger=False)
    """

    phase = Phase.SHRINKAGE
    valid_ranges = {"epsilon": PROBABILITY}
    needs_full_tensors = True

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
        """Shrink after the step."""
        if self.every == "step":
            self._shrink(params, step)

    def epoch_end(self, params: list[Parameter], step: Step) -> None:
        """Shrink after the epoch."""
        if self.every == "epoch":
            self._shrink(params, step)

    def _shrink(self, params: list[Parameter], step: Step) -> None:
        if params and self.current["epsilon"]:
            generator = generator_for(params[0].device, self.seed, self.name, *step)
            shrink_randomly_(params, self.current["epsilon"], generator)

    def route(self) -> str:
        """Say when it acts."""
        return f"after the {self.every}"
