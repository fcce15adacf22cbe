"""Dropout that stays on in predictions, so their spread shows how uncertain they are."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import check_integer, described_value
from lightning_reg._engine.modules import ForwardPreHook
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.regularizer import Regularizer, regularizers_of
from lightning_reg._engine.technique import Phase
from lightning_reg.dropout.injection import InjectedDropout, injections_of
from lightning_reg.dropout.readers import find_readers
from lightning_reg.dropout.sites import describe, find_dropout
from lightning_reg.dropout.unreached import how_to_register

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lightning_reg.dropout.readers import Reader
    from lightning_reg.dropout.sites import DropoutSite, ModuleSite


def sample_predictions(predict: Callable[[], Any], samples: int) -> Any:
    """Predict several times, and stack the results.

    Args:
        predict: A function that returns the same structure of tensors each time.
        samples: The number of calls, at least 1.

    Returns:
        The same structure. Tensors are stacked in a new dimension 0. ``None`` stays ``None``, and anything else becomes a list.

    Raises:
        TypeError: If ``predict`` is not a function.
        ValueError: If ``samples`` is not an integer ≥ 1.

    Example:
        >>> layer = torch.nn.Dropout(0.5)
        >>> sample_predictions(lambda: {"y": layer(torch.ones(4, 2)), "id": 7}, samples=3)["y"].shape
        torch.Size([3, 4, 2])
    """
    if not callable(predict):
        example = "sample_predictions(lambda: model(batch), 10)"
        raise TypeError(f"sample_predictions: predict must be a function, as in {example}, got {described_value(predict)}")
    check_integer("sample_predictions: samples", samples, 1)
    flat, structures = zip(*(tree_flatten(predict()) for _ in range(samples)), strict=True)
    return tree_unflatten([_stack(leaves) for leaves in zip(*flat, strict=True)], structures[0])


class MonteCarloDropout(Regularizer):
    """Keep dropout on in ``trainer.predict``: yₛ = f(x, mₛ), with new masks mₛ for each sample s.

    Runs in: ``on_predict_start`` to ``on_predict_end``, around each ``predict_step``. Does nothing during the fit.

    Only dropout is in training mode, so batch normalization uses its stored statistics.
    A module whose own code applies dropout, as in ``dropout_p=self.drop.p if self.training else 0.0``, is in training mode too
    if its source code shows that this changes nothing but dropout. Otherwise, a warning names it. Another warning names
    dropout that was switched on but never ran in the first batch.
    Dropout modules use their original rates. A ``DropoutInjection`` in the same trainer is active too. If its rate follows a
    schedule, predictions use the last rate of the fit.
    Afterward, all modules return to their previous modes. The mean over dimension 0 is the prediction, and the spread shows
    how uncertain it is.
    Time and memory grow with ``samples``.

    Args:
        samples: The number of predictions for each batch, ≥ 1. They are stacked in a new dimension 0. Anything other than a
            tensor becomes a list. ``None`` predicts once and does not stack.
        attributes: A mapping from the names of further classes of modules to the attribute that holds the dropout rate, or to
            a list of attributes, as in ``{"Attention": "attention_dropout"}``.
        name: The name in checkpoints. The name of the class by default.

    Raises:
        ValueError: If ``samples`` is not an integer ≥ 1, the model has no dropout, a class in ``attributes`` does not exist, or
            a ``DropoutInjection`` has a schedule that no fit has used yet.
        TypeError: If an attribute is missing or is not a number.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MonteCarloDropout(samples=20)], logger=False)

    Reference:
        Y. Gal, Z. Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning", 2016.
    """

    phase = Phase.DROPOUT
    fit_attributes = ("_undo",)
    deepspeed_alternative = None

    def __init__(
        self, samples: int | None = None, *, attributes: dict[str, str | list[str]] | None = None, name: str | None = None
    ) -> None:
        if samples is not None:
            check_integer("MonteCarloDropout: samples", samples, 1)
        self.samples = samples
        self.attributes = attributes
        super().__init__(name)
        self._undo: list[Callable[[], None]] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the model has dropout, and refuse a second callback, which would repeat the repetitions."""
        self.refuse_others(trainer, "both repeat the predictions of each batch: keep one of them")
        if not _lightning.builds_modules_later(pl_module):
            self._check(trainer, pl_module)

    def prepare_predict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the model has dropout, and that its batches can be predicted several times."""
        self.prepare(trainer, pl_module)
        if self.samples and "dataloader_iter" in inspect.signature(pl_module.predict_step).parameters:
            raise ValueError(
                "MonteCarloDropout: predict_step(dataloader_iter) fetches its batches itself, so a batch cannot be predicted "
                f"{self.samples} times: write predict_step(batch, batch_idx) instead"
            )

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sites(trainer, pl_module) and not any(reader.rates for reader in find_readers(pl_module)):
            raise ValueError(
                "MonteCarloDropout: the model has no dropout; to add some, pass DropoutInjection to the same trainer; "
                f"{how_to_register(pl_module)}"
            )

    def start_predict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch dropout on, and predict each batch several times."""
        self._check(trainer, pl_module)
        for callback in injections_of(regularizers_of(trainer)):
            if not callback.rate_is_known:
                raise ValueError(
                    f"{self.name}: the rate of {callback.name} is unknown, because no fit has used its schedule "
                    f"p={callback.p!r} yet: fit first, or set p to a number"
                )
            self._undo.append(callback.detach)
            callback.inject(pl_module, always=True)
        sites, readers = self._sites(trainer, pl_module), find_readers(pl_module)
        self._warn_of_rates_of_zero(sites, readers)
        for site in self._own_sites(pl_module):
            self._switch_on(site.module)
        for reader in readers:
            if reader.is_switchable:
                self._switch_on(reader.module)
        self._warn_of_what_stays_off(sites, readers)
        # In eval mode, a transformer layer takes a fast path that skips dropout.
        self._undo.append(partial(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()))
        torch.backends.mha.set_fastpath_enabled(False)
        if self.samples:
            self._undo.append(_lightning.wrap_method(pl_module, "predict_step", partial(_sampled, samples=self.samples)))
        if not _lightning.is_compiled(pl_module):  # graphs that were compiled before would ignore the hooks
            self._watch_first_batch(pl_module, sites, readers)

    def _switch_on(self, module: nn.Module) -> None:
        self._undo.append(partial(setattr, module, "training", module.training))
        module.training = True  # not train(), which would also change the mode of its children

    def _watch_first_batch(self, pl_module: LightningModule, sites: list[DropoutSite], readers: list[Reader]) -> None:
        """Warn after the first batch of dropout that did not run."""
        ran: dict[int, bool] = {}  # whether a module was in training mode when it was called
        handles: list[RemovableHandle] = []

        def record(module: nn.Module, args: Any) -> None:
            ran[id(module)] = ran.get(id(module), False) or module.training

        def check() -> None:
            _remove(handles)
            read = {key for reader in readers if id(reader.module) in ran or reader.stays_off for key in reader.reads}
            injected = {id(site.module) for site in sites if isinstance(site, InjectedDropout)} & ran.keys()
            on = injected | {module for module, training in ran.items() if training}
            if idle := [site for site in sites if site.original and id(site.module) not in on and site.key not in read]:
                found = abbreviate([f"{site.label} ({site.kind} {site.original:g})" for site in idle])
                rank_zero_warn(
                    f"{self.name}: dropout was switched on, but never ran in the first predicted batch: {found}. The model may "
                    "not use it, or other modules may read its rate and keep it off in predictions"
                )

        watched = [*(site.module for site in sites), *(reader.module for reader in readers)]
        modules = {id(module): module for module in watched}
        handles += [module.register_forward_pre_hook(ForwardPreHook(record)) for module in modules.values()]
        self._undo.append(partial(_remove, handles))
        self._undo.append(_lightning.wrap_method(pl_module, "predict_step", partial(_checked_once, check=check)))

    def stop_predict(self) -> None:
        """Restore the modes, the forward hooks, and ``predict_step``."""
        while self._undo:
            self._undo.pop()()

    def acts_on(self) -> str:
        """Return what the callback acts on: only predictions."""
        return "predictions only"

    def route(self) -> str:
        """Return where the callback acts: in the forward pass."""
        return "forward pass"

    def _sites(self, trainer: Trainer, pl_module: LightningModule) -> list[DropoutSite]:
        injected = [site for callback in injections_of(regularizers_of(trainer)) for site in callback.sites(pl_module)]
        return [*self._own_sites(pl_module), *injected]

    def _own_sites(self, pl_module: LightningModule) -> list[ModuleSite]:
        try:
            return find_dropout(pl_module, self.attributes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"MonteCarloDropout: {error}") from None

    def _warn_of_rates_of_zero(self, sites: list[DropoutSite], readers: list[Reader]) -> None:
        if not any(site.original for site in sites) and not any(rate for reader in readers for rate in reader.rates.values()):
            found = describe(sites) or "; ".join(f"{reader.kind}: {reader.name}" for reader in readers)
            rank_zero_warn(f"{self.name}: all dropout rates are 0, so all predictions of a batch will be equal: {found}")

    def _warn_of_what_stays_off(self, sites: list[DropoutSite], readers: list[Reader]) -> None:
        on = {id(site.module) for site in sites}
        kept_off = [reader for reader in readers if reader.stays_off and id(reader.module) not in on]
        for kind, names, why in _by_kind(kept_off):
            rank_zero_warn(
                f"{self.name}: cannot switch on the dropout that {kind} applies itself ({abbreviate(names)}), because training "
                f"mode also changes other things there: {why!r}. To switch it on anyway, set .training = True on these modules "
                "in on_predict_start"
            )


def _sampled(predict_step: Callable[..., Any], samples: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: sample_predictions(lambda: predict_step(*args, **kwargs), samples)


def _checked_once(predict_step: Callable[..., Any], check: Callable[[], None]) -> Callable[..., Any]:
    checks = [check]

    def predict(*args: Any, **kwargs: Any) -> Any:
        prediction = predict_step(*args, **kwargs)
        while checks:
            checks.pop()()
        return prediction

    return predict


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _by_kind(readers: list[Reader]) -> Iterator[tuple[str, list[str], str]]:
    """Yield each class with the names of its modules and what else it does in training mode."""
    for kind in dict.fromkeys(reader.kind for reader in readers):
        of_kind = [reader for reader in readers if reader.kind == kind]
        yield kind, [reader.name for reader in of_kind], of_kind[0].others[0]


def _stack(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], torch.Tensor):
        return torch.stack(leaves)
    return None if leaves[0] is None else list(leaves)
