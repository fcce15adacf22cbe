"""Dropout that stays on for predictions, whose spread then shows how uncertain they are."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import check_integer
from lightning_reg._engine.regularizer import Regularizer, regularizers_of
from lightning_reg._engine.technique import Phase
from lightning_reg.dropout.injection import injections_of
from lightning_reg.dropout.sites import describe, find_dropout

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.dropout.sites import DropoutSite


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
    deepspeed_alternative = None

    def __init__(
        self, samples: int | None = None, *, attributes: dict[str, str] | None = None, name: str | None = None
    ) -> None:
        if samples is not None:
            check_integer("MonteCarloDropout: samples", samples, 1)
        self.samples = samples
        self.attributes = attributes
        super().__init__(name)
        self._undo: list[Callable[[], None]] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to drop, and refuse a second one, which would sample the samples."""
        self.refuse_others(trainer, "both repeat the predictions of each batch: keep one of them")
        if not _lightning.builds_modules_later(pl_module):
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sites(trainer, pl_module):
            raise ValueError("MonteCarloDropout: the model has no dropout; to put some in, use DropoutInjection beside it")

    def start_predict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch dropout on, and predict each batch several times."""
        self._check(trainer, pl_module)
        if self.samples and "dataloader_iter" in inspect.signature(pl_module.predict_step).parameters:
            raise ValueError(
                "MonteCarloDropout: predict_step(dataloader_iter) takes its batches itself, so a batch cannot be predicted "
                f"{self.samples} times: let it take a batch"
            )
        for callback in injections_of(regularizers_of(trainer)):
            if not callback.rate_is_known:
                raise ValueError(
                    f"{self.name}: the rate of {callback.name} is not known, since no fit has followed p={callback.p!r} "
                    "yet: for predictions alone give it a number"
                )
            self._undo.append(callback.detach)
            callback.inject(pl_module, always=True)
        self._warn_of_rates_of_zero(self._sites(trainer, pl_module))
        for site in find_dropout(pl_module, self.attributes):
            self._undo.append(partial(setattr, site.module, "training", site.module.training))
            site.module.training = True  # not train(), which would also switch its children
        # A transformer in eval mode takes a fast path without dropout.
        self._undo.append(partial(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()))
        torch.backends.mha.set_fastpath_enabled(False)
        if self.samples:
            self._undo.append(_lightning.wrap_method(pl_module, "predict_step", partial(_sampled, samples=self.samples)))

    def stop_predict(self) -> None:
        """Leave everything as it was."""
        while self._undo:
            self._undo.pop()()

    def acts_on(self) -> str:
        """Say when it acts."""
        return "predictions only"

    def route(self) -> str:
        """Say that it acts in the forward pass."""
        return "forward pass"

    def _sites(self, trainer: Trainer, pl_module: LightningModule) -> list[DropoutSite]:
        injected = [site for callback in injections_of(regularizers_of(trainer)) for site in callback.sites(pl_module)]
        return [*find_dropout(pl_module, self.attributes), *injected]

    def _warn_of_rates_of_zero(self, sites: list[DropoutSite]) -> None:
        if not any(site.own for site in sites):
            rank_zero_warn(f"{self.name}: all rates are 0, so every prediction will be the same: {describe(sites)}")


def _sampled(predict_step: Callable[..., Any], samples: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: sample_predictions(lambda: predict_step(*args, **kwargs), samples)


def _stack(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], torch.Tensor):
        return torch.stack(leaves)
    return None if leaves[0] is None else list(leaves)
