"""Dropout that stays on for predictions, whose spread then shows how uncertain they are."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_reg import host
from lightning_reg.base import Phase, Regularizer, regularizers_of
from lightning_reg.dropout.injection import DropoutInjection
from lightning_reg.dropout.places import describe, find_dropout

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from lightning_reg.dropout.places import DropoutPlace

__all__ = ["MonteCarloDropout", "sample_predictions"]


def sample_predictions(predict: Callable[[], Any], samples: int) -> Any:
    """Predict several times, and stack what comes.

    Args:
        predict: A function whose results have the same structure each time.
        samples: How many times, at least 1.

    Returns:
        That structure: in place of each tensor one with a dimension more, the samples, in front; in place of anything else but
        ``None`` a list.

    Example:
        >>> layer = torch.nn.Dropout(0.5)
        >>> sample_predictions(lambda: {"y": layer(torch.ones(4, 2)), "id": 7}, samples=3)["y"].shape
        torch.Size([3, 4, 2])
    """
    flat, structures = zip(*(tree_flatten(predict()) for _ in range(samples)), strict=True)
    return tree_unflatten([_stack(leaves) for leaves in zip(*flat, strict=True)], structures[0])


class MonteCarloDropout(Regularizer):
    r"""Leave dropout on in ``trainer.predict``: :math:`y^{(s)} = f(x, m^{(s)})` with masks m of their own for each sample s.

    Runs in: ``on_predict_start`` to ``on_predict_end``; it does nothing in the fit.

    Only dropout is in training mode, never a whole model: batch normalisation keeps its statistics. What
    :class:`DropoutScheduler` could drive drops with its own rate. What a :class:`DropoutInjection` of the same trainer injects
    in the fit is injected for predictions too: with its p, or with what its schedule came to in the last fit. Afterwards every
    module is in the mode that it was found in.

    With n samples the mean and the spread of a batch's predictions are those over dimension 0; they take n times the time and
    the memory.

    Args:
        samples: How many predictions of each batch are stacked, in a new first dimension; ``None`` for one that is not stacked.
            What is no tensor comes as a list of as many.
        attributes: Other places of rates, class name to attribute, as in ``{"Attention": "attention_dropout"}``.
        name: What the checkpoint calls it.

    Raises:
        ValueError: For fewer samples than 1, a model without dropout, or an injection whose schedule no fit has followed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MonteCarloDropout(samples=20)], logger=False)

    Reference:
        Y. Gal, Z. Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning", 2016.
    """

    phase = Phase.DROPOUT
    instead_of_deepspeed = None

    def __init__(
        self, samples: int | None = None, *, attributes: dict[str, str] | None = None, name: str | None = None
    ) -> None:
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ValueError(f"MonteCarloDropout: samples must be a whole number of at least 1, or None, got {samples!r}")
        self.samples = samples
        self.attributes = attributes
        super().__init__(name)
        self._modes: list[tuple[nn.Module, bool]] = []
        self._injections: list[DropoutInjection] = []
        self._wrapped: tuple[LightningModule, dict[str, Any]] | None = None
        self._fast: bool | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to drop."""
        if not host.builds_modules_later(pl_module):
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._places(trainer, pl_module):
            raise ValueError("MonteCarloDropout: the model has no dropout; to put some in, use DropoutInjection beside it")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the configuration against the run."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self.prepare(trainer, pl_module)
        if self.samples and "dataloader_iter" in inspect.signature(pl_module.predict_step).parameters:
            raise ValueError(
                "MonteCarloDropout: predict_step(dataloader_iter) takes its batch itself, so no batch can be predicted "
                f"{self.samples} times: let it take a batch"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch dropout on, and let each batch be predicted several times."""
        self._check(trainer, pl_module)
        for callback in _injections(trainer):
            if not callback.rate_is_known:
                raise ValueError(
                    f"{self.name}: the rate of {callback.name} is not known, since no fit has followed p={callback.p!r} "
                    "yet: for predictions alone give it a number"
                )
            self._injections.append(callback)
            callback.inject(pl_module, always=True)
        self._warn_of_rates_of_zero(self._places(trainer, pl_module))
        for place in find_dropout(pl_module, self.attributes):
            self._modes.append((place.module, place.module.training))
            place.module.training = True  # not train(), which would reach its children
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # on which a transformer in eval mode passes its dropout by
        if self.samples:
            self._wrap_predict_step(pl_module, self.samples)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave everything as it was."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything as it was."""
        self._restore()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        self._restore()
        super().teardown(trainer, pl_module, stage)

    def acts_on(self) -> str:
        """Say when it acts."""
        return "predictions only"

    def route(self) -> str:
        """Say that it acts in the forward pass."""
        return "forward pass"

    def _places(self, trainer: Trainer, pl_module: LightningModule) -> list[DropoutPlace]:
        injected = [place for callback in _injections(trainer) for place in callback.places(pl_module)]
        return [*find_dropout(pl_module, self.attributes), *injected]

    def _warn_of_rates_of_zero(self, places: list[DropoutPlace]) -> None:
        if not any(place.own for place in places):
            rank_zero_warn(f"{self.name}: all rates are 0, so every prediction will be the same: {describe(places)}")

    def _wrap_predict_step(self, pl_module: LightningModule, samples: int) -> None:
        """Put a function around the step, on this one module, in the place of what it may already have there."""
        step = pl_module.predict_step
        self._wrapped = pl_module, {"predict_step": step} if "predict_step" in vars(pl_module) else {}

        @wraps(step)  # Lightning looks at its arguments
        def sampled(*args: Any, **kwargs: Any) -> Any:
            return sample_predictions(lambda: step(*args, **kwargs), samples)

        pl_module.predict_step = sampled  # type: ignore[method-assign]

    def _restore(self) -> None:
        for module, training in self._modes:
            module.training = training
        if self._fast is not None:
            torch.backends.mha.set_fastpath_enabled(self._fast)
        for callback in self._injections:
            callback.detach()
        if self._wrapped:
            module, before = self._wrapped
            del module.predict_step
            vars(module).update(before)
        self._modes, self._injections, self._wrapped, self._fast = [], [], None, None


def _injections(trainer: Trainer) -> list[DropoutInjection]:
    return [callback for callback in regularizers_of(trainer) if isinstance(callback, DropoutInjection)]


def _stack(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], torch.Tensor):
        return torch.stack(leaves)
    return None if leaves[0] is None else list(leaves)
