"""Dropout whose rate changes over training."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import PROBABILITY, close_matches
from lightning_reg._engine.modules import ModuleRegularizer
from lightning_reg._engine.regularizer import regularizers_of
from lightning_reg._engine.technique import Phase
from lightning_reg.dropout.injection import DropoutInjection, injections_of
from lightning_reg.dropout.rates import Rate, reads_tensor
from lightning_reg.dropout.sites import DropoutSite, ModuleSite, describe, find_dropout, inert_dropout, set_dropout_

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.regularizer import Regularizer
    from lightning_reg.schedules import Value


class DropoutScheduler(ModuleRegularizer):
    r"""Drive the rates of dropout that a model has: :math:`p \leftarrow p(t)` at progress t.

    Runs in: ``on_train_batch_start``, whenever the scheduled value has changed.

    It drives what :data:`~lightning_reg.dropout.DROPOUT_ATTRIBUTES` lists: ``nn.Dropout`` and its variants for channels,
    ``nn.AlphaDropout`` and ``nn.FeatureAlphaDropout``, ``nn.MultiheadAttention``, RNNs of several layers, ``DropPath`` and
    ``StochasticDepth``; classes of your own by ``attributes``. What :class:`DropoutInjection` put in is driven too, unless
    it has a schedule itself: name it by its class (``modules="DropoutInjection"``) or by the module that it follows. All have
    their own rates back after the fit. Under ``torch.compile`` torch's dropout modules and injected dropout need one graph for
    all values; a float attribute of another module is part of the graph, which is compiled anew for each value: a warning
    says so. Masks are drawn from torch's global generator, which ``seed_everything`` seeds alike on all ranks.

    Recipes, the first three with the rates published for 300 epochs (ViT-T; its stochastic depth; that of ViT-B):

    - early dropout: ``Linear(0.1, 0.0, until="50ep")``, or constant and then off ``Steps([0.1, 0.0], at=["50ep"])``;
    - early stochastic depth: ``Linear(0.5, 0.0, until="50ep")`` with ``modules="DropPath"``;
    - late stochastic depth: ``Steps([0.0, 0.4], at=["50ep"])``, and late dropout alike;
    - linear decay over all of training: ``Linear(0.5, 0.0)``;
    - curriculum dropout, which approaches 0.5 as 1 - exp(-10 t) does 1: ``lambda t: 0.5 * (1 - math.exp(-10 * t))``;
    - a depth profile: ``{"encoder.layers.0.*": 0.0, "encoder.layers.1.*": Linear(0.0, 0.2)}``.

    Args:
        p: The probability of a zero, in [0, 1], or a schedule; or a mapping from globs (or class names) to such values, which
            leaves alone what no glob matches.
        modules: Globs on the names of modules, or class names, that it drives; ``"*"`` for all that have dropout.
        attributes: Other places of rates, class name to attribute, as in ``{"Attention": "attention_dropout"}``.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For p outside [0, 1], a model or glob without dropout, or a rate that two schedulers drive.
        TypeError: For an attribute that holds no number.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Linear
        >>> trainer = Trainer(callbacks=[DropoutScheduler(Linear(0.0, 0.5, until=0.3))], logger=False)

    Reference:
        Z. Liu et al., "Dropout Reduces Underfitting", 2023; P. Morerio et al., "Curriculum Dropout", 2017.
    """

    phase = Phase.DROPOUT
    valid_ranges = {"p": PROBABILITY}
    accept_mappings = frozenset({"p"})
    deepspeed_alternative = None
    selector = "modules"
    effect = "drop anything"

    def __init__(
        self,
        p: Value | dict[str, Value],
        *,
        modules: str | list[str] = "*",
        attributes: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(p, Mapping) and not p:
            raise ValueError("DropoutScheduler: p must hold at least one glob, as in p={'encoder.*': 0.1}, got none")
        self.p = p
        self.modules = modules
        self.attributes = attributes
        super().__init__(name)
        self.sites: dict[str, list[DropoutSite]] = {}
        self._rates: dict[str, Rate] = {}
        self._regularizers: list[Regularizer] = []

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules whose dropout it drives."""
        assigned = self.assign(pl_module, self._regularizers)
        self._refuse_second_driver(pl_module, assigned)
        return {site.name: site.module for sites in assigned.values() for site in sites}

    def assign(self, pl_module: LightningModule, regularizers: Sequence[Regularizer]) -> dict[str, list[DropoutSite]]:
        """Return the sites that each of its values drives, by the key of the value.

        Args:
            pl_module: The model.
            regularizers: Those of the trainer, among them what injects dropout.

        Raises:
            ValueError: If there is no dropout, a glob matches none, or two globs match the same.
        """
        try:
            own = find_dropout(pl_module, self.attributes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"DropoutScheduler: {error}") from None
        known: list[DropoutSite] = [*own, *(site for cb in injections_of(regularizers) for site in cb.sites(pl_module))]
        if not known:
            inert = f" ({inert_dropout(pl_module)})" if inert_dropout(pl_module) else ""
            raise ValueError(
                f"DropoutScheduler: the model has no dropout to drive{inert}; to put some in, use DropoutInjection"
            )
        meant = list({site.key: site for glob in _list(self.modules) for site in _matching(known, glob)}.values())
        if not isinstance(self.p, Mapping):
            return {"p": meant}
        return self._profile(meant, self.p)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is dropout to drive, as far as the modules exist."""
        self._regularizers = regularizers_of(trainer)
        super().prepare(trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the rates read from here, and keep the modules' own."""
        self._regularizers = regularizers_of(trainer)
        super().attach(trainer, pl_module)
        self.sites = self.assign(pl_module, self._regularizers)
        for key, sites in self.sites.items():
            self._rates[key] = Rate(sites[0].own, pl_module.device)  # until the first batch
            for site in sites:
                site.take(self._rates[key])
        self._warn_of_recompilation(pl_module)
        if inert := inert_dropout(pl_module):
            rank_zero_warn(f"{self.name}: {inert}; to drop its output, use DropoutInjection")

    def values_changed(self) -> None:
        """Set the rates."""
        for key, rate in self._rates.items():
            rate.set(self.current[key])
            set_dropout_(self.sites[key], self.current[key])

    def update(self, progress: float) -> None:
        """Move the rates to a progress, and log where training is."""
        super().update(progress)
        if self.logging:
            self.log_metrics(progress=progress, sites=float(sum(map(len, self.sites.values()))))

    def detach(self) -> None:
        """Give all their own rates back."""
        super().detach()
        for site in (site for sites in self.sites.values() for site in sites):
            site.release()
        self.sites = {}
        self._rates = {}
        self._regularizers = []

    def acts_on(self) -> str:
        """List the modules, with the rates of their own."""
        return describe(site for sites in self.sites.values() for site in sites)

    def _profile(self, sites: Sequence[DropoutSite], globs: Iterable[str]) -> dict[str, list[DropoutSite]]:
        """Divide sites by the globs of a profile."""
        profile = {f"p/{glob}": _matching(sites, glob) for glob in globs}
        first: dict[tuple[int, str], str] = {}
        for key, matching in profile.items():
            for site in matching:
                other = first.setdefault(site.key, key)
                if other != key:
                    raise ValueError(f"DropoutScheduler: the dropout of {site.name} is driven by both {other!r} and {key!r}")
        return profile

    def _refuse_second_driver(self, pl_module: LightningModule, assigned: Mapping[str, Sequence[DropoutSite]]) -> None:
        mine = {site.key: site for sites in assigned.values() for site in sites}
        for callback in self._regularizers:
            if isinstance(callback, DropoutInjection) and callable(callback.p):
                theirs = [site.key for site in callback.sites(pl_module)]
            elif isinstance(callback, DropoutScheduler) and callback is not self:
                theirs = [site.key for sites in callback.assign(pl_module, self._regularizers).values() for site in sites]
            else:
                continue
            if twice := [mine[key].name for key in theirs if key in mine]:
                raise ValueError(
                    f"the dropout of {', '.join(twice)} is driven by both {self.name} and {callback.name}: say with modules= "
                    "which of them drives what, or give DropoutInjection a number"
                )

    def _warn_of_recompilation(self, pl_module: LightningModule) -> None:
        floats = [site for key in self._values_scheduled() for site in self.sites[key] if isinstance(site, ModuleSite)]
        # torch runs RNNs without compiling them
        slow = [site for site in floats if not (reads_tensor(site.module) or isinstance(site.module, nn.RNNBase))]
        if slow and _lightning.is_compiled(pl_module):
            rank_zero_warn(
                f"{self.name}: {describe(slow)}: torch compiles the model anew for each value of such an attribute, and gives "
                "up after a few; let its schedule take few values (Steps), or leave it out with modules="
            )

    def _values_scheduled(self) -> list[str]:
        return [key for key, _, value in self._values_given() if callable(value)]


def _list(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _matching(sites: Sequence[DropoutSite], pattern: str) -> list[DropoutSite]:
    """Return the sites whose module has a name that matches, or whose kind it is."""
    matching = [site for site in sites if fnmatchcase(site.name, pattern) or site.kind == pattern]
    if not matching:
        close = close_matches(pattern, [*(site.name for site in sites), *(site.kind for site in sites)])
        raise ValueError(f"DropoutScheduler: no dropout is in a module that matches {pattern!r}; close matches: {close}")
    return matching
