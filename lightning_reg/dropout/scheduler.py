"""Dropout rates that change during training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import NON_NEGATIVE, PROBABILITY, close_matches, text_keys
from lightning_reg._engine.module_selection import check_patterns, split_patterns
from lightning_reg._engine.modules import ModuleRegularizer
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.regularizer import regularizers_of
from lightning_reg._engine.technique import Phase
from lightning_reg.dropout.injection import DropoutInjection, injections_of
from lightning_reg.dropout.rates import Rate, reads_tensor
from lightning_reg.dropout.readers import find_readers
from lightning_reg.dropout.sites import (
    DropoutSite,
    ModuleSite,
    check_attributes,
    describe,
    find_dropout,
    inert_dropout,
    set_dropout_,
)
from lightning_reg.dropout.unreached import (
    describe_placeholders,
    how_to_register,
    placeholders,
    unregistered,
    why_unmatched,
)
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg._engine.arguments import Interval
    from lightning_reg._engine.clock import Moment
    from lightning_reg._engine.module_selection import Patterns
    from lightning_reg._engine.regularizer import Regularizer
    from lightning_reg.dropout.readers import Reader
    from lightning_reg.schedules import Value, Values


class DropoutScheduler(ModuleRegularizer):
    """Schedule the dropout rates that a model already has: p ← p(t) at progress t.

    Runs in: ``on_train_batch_start``, whenever the scheduled value has changed.

    Sets the rates of ``nn.Dropout`` and its variants (including ``nn.AlphaDropout``), ``nn.MultiheadAttention``, recurrent
    modules with more than one layer, ``DropPath``, and ``StochasticDepth``. ``lightning_reg.DROPOUT_ATTRIBUTES`` lists these
    classes; ``attributes`` adds your own.
    Also sets the rate of dropout that a ``DropoutInjection`` has added, unless the injection has its own schedule. Select
    injected dropout by ``modules="DropoutInjection"`` or by the name of the module that it follows.
    The original rates are restored after the fit.
    Under ``torch.compile``, all values share one graph for torch's dropout modules and injected dropout. In other modules, the
    rate is a plain float in the graph, so torch recompiles for each value, and a warning says so. The same happens where code
    reads the rate of a dropout module as a number, as in ``dropout_p=self.drop.p``.
    Masks come from torch's global generator, which ``seed_everything`` seeds identically on all ranks.

    Recipes (the first three use the published rates for 300 epochs of ViT-T, ViT-T, and ViT-B):

    - early dropout: ``Linear(0.1, 0.0, until="50ep")``, or constant and then off, ``Steps([0.1, 0.0], at=["50ep"])``
    - early stochastic depth: ``Linear(0.5, 0.0, until="50ep")`` with ``modules="DropPath"``, which sets the same rate in all
      blocks; if the model's rates rise with depth up to 0.5, ``Linear(1.0, 0.0, until="50ep")`` with ``relative=True``
    - late stochastic depth, and late dropout likewise: ``Steps([0.0, 0.4], at=["50ep"])``
    - linear decay over all of training: ``Linear(0.5, 0.0)``
    - curriculum dropout, which rises quickly at first and approaches 0.5: ``lambda t: 0.5 * (1 - math.exp(-10 * t))``
    - a depth profile: ``{"encoder.layers.0.*": 0.0, "encoder.layers.1.*": Linear(0.0, 0.2)}``

    Args:
        p: The probability of dropping an entry, in [0, 1], or a schedule, or a mapping from patterns of module names or class
            names to these. Modules that match no pattern keep their rates.
        modules: Patterns of module names (``"encoder.*"``; ``*`` also matches dots) or class names (``"DropPath"``) of the
            modules to schedule. ``"*"`` selects all modules with dropout. In a list, a leading ``!`` excludes.
        attributes: A mapping from the names of further classes of modules to the attribute that holds the dropout rate, or to
            a list of attributes, as in ``{"Attention": "attention_dropout"}``.
        relative: Multiply each module's original rate by p, which is then in [0, ∞). Different rates keep their proportions,
            such as those of stochastic depth, which rise with depth.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If p is out of range, the model has no dropout, a pattern matches no dropout, another callback sets the
            same rate, or, with ``relative``, a product exceeds 1.
        TypeError: If an attribute is missing or is not a number.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Linear
        >>> trainer = Trainer(callbacks=[DropoutScheduler(Linear(0.0, 0.5, until=0.3))], logger=False)

    Reference:
        Z. Liu et al., "Dropout Reduces Underfitting", 2023.
        P. Morerio et al., "Curriculum Dropout", 2017.
    """

    phase = Phase.DROPOUT
    valid_ranges = {"p": PROBABILITY}
    fit_attributes = ("sites", "_rates", "_regularizers", "_placeholders")
    accept_mappings = frozenset({"p"})
    deepspeed_alternative = None
    selector = "modules"
    effect = "drop anything"

    def __init__(
        self,
        p: Values,
        *,
        modules: Patterns = "*",
        attributes: dict[str, str | list[str]] | None = None,
        relative: bool = False,
        name: str | None = None,
    ) -> None:
        if isinstance(p, Mapping) and not p:
            raise ValueError("DropoutScheduler: p must have at least one pattern, as in p={'encoder.*': 0.1}, got {}")
        if isinstance(p, Mapping):
            check_patterns("DropoutScheduler: the keys of p", list(text_keys(p)))
        check_attributes("DropoutScheduler", attributes)
        self.p = p
        self.modules = modules
        self.attributes = attributes
        self.relative = relative
        super().__init__(name)
        self.sites: dict[str, list[DropoutSite]] = {}
        self._rates: list[_SharedRate] = []
        self._regularizers: list[Regularizer] = []
        self._placeholders: list[str] = []

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules whose dropout rates the callback sets."""
        assigned = self.assign(pl_module, self._regularizers)
        self._check_conflicts(pl_module, assigned)
        for key, _, value in self._values_given() if self.relative else ():
            known = value.extremes if isinstance(value, Schedule) else () if callable(value) else (value,)
            _check_products(self.name, f"{key}={value!r}", assigned[key], max(known, default=0.0))
        return {site.name: site.module for sites in assigned.values() for site in sites}

    def assign(self, pl_module: LightningModule, regularizers: Sequence[Regularizer]) -> dict[str, list[DropoutSite]]:
        """Return the sites whose rates each value sets, keyed like ``self.current``.

        Args:
            pl_module: The model.
            regularizers: The regularizers of the trainer, which may inject dropout.

        Raises:
            ValueError: If there is no dropout, a pattern matches none, or two patterns match the same dropout.
        """
        try:
            in_modules = find_dropout(pl_module, self.attributes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"DropoutScheduler: {error}") from None
        injected = [site for callback in injections_of(regularizers) for site in callback.sites(pl_module)]
        sites: list[DropoutSite] = [*in_modules, *injected]
        if not sites:
            inert = f" ({inert_dropout(pl_module)})" if inert_dropout(pl_module) else ""
            raise ValueError(
                f"DropoutScheduler: the model has no dropout to schedule{inert}; to add some, use DropoutInjection; "
                f"{how_to_register(pl_module)}"
            )
        try:
            selected = _selected(sites, self.modules)
            return self._profile(selected, self.p) if isinstance(self.p, Mapping) else {"p": selected}
        except _NoMatchError as error:
            raise ValueError(f"{error}{why_unmatched(pl_module, error.pattern)}") from None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is dropout to schedule, as far as the modules exist."""
        self._regularizers = regularizers_of(trainer)
        super().prepare(trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the sites use the scheduled rates."""
        self._regularizers = regularizers_of(trainer)
        super().attach(trainer, pl_module)
        self.sites = self.assign(pl_module, self._regularizers)
        for key, sites in self.sites.items():
            self._rates += self._share(key, sites, pl_module)
        for shared in self._rates:
            for site in shared.sites:
                site.use(shared.rate, self.name)
        readers = find_readers(pl_module)
        self._warn_of_recompilation(pl_module, readers)
        self._warn_of_unknown_rates(readers, pl_module)
        self._placeholders = placeholders(pl_module) if self._takes_all else []
        if self.relative and not any(shared.original for shared in self._rates):
            rank_zero_warn(f"{self.name}: all original rates are 0, so multiplying them changes nothing: {self.acts_on()}")
        if inert := inert_dropout(pl_module):
            rank_zero_warn(f"{self.name}: {inert}; to apply dropout to its output, use DropoutInjection")

    @property
    def _takes_all(self) -> bool:
        """Whether all dropout of the model is to be scheduled."""
        return self.modules == "*" and not isinstance(self.p, Mapping)

    def values_changed(self) -> None:
        """Set the rates."""
        for shared in self._rates:
            p = self.current[shared.key]
            if self.relative:
                _check_products(self.name, f"{shared.key}={p:g}", shared.sites, p)
                p *= shared.original
            shared.rate.set(p)
            set_dropout_(shared.sites, p)

    def update(self, moment: Moment) -> None:
        """Set the rates to those of a moment, and log the progress."""
        super().update(moment)
        if self.logging:
            self.log_metrics(progress=moment.progress, sites=float(sum(map(len, self.sites.values()))))

    def detach(self) -> None:
        """Restore the original rates."""
        super().detach()
        for site in (site for sites in self.sites.values() for site in sites):
            site.restore()
        self.sites = {}
        self._rates = []
        self._regularizers = []
        self._placeholders = []

    def notes(self) -> list[str]:
        """Describe what the callback does not reach because there is no dropout."""
        hint = describe_placeholders(self._placeholders)
        return [*super().notes(), *([hint] if hint else [])]

    def acts_on(self) -> str:
        """List the modules, with their original rates."""
        return describe(site for sites in self.sites.values() for site in sites)

    def _share(self, key: str, sites: Sequence[DropoutSite], pl_module: LightningModule) -> list[_SharedRate]:
        """Return the rates of the sites that a value sets: one, or with ``relative``, one for each original rate."""
        groups: dict[float, list[DropoutSite]] = defaultdict(list)
        for site in sites:
            groups[site.original if self.relative else sites[0].original].append(site)
        return [_SharedRate(key, p, Rate(p, pl_module.device), group) for p, group in groups.items()]

    def _values_given(self) -> Iterator[tuple[str, Interval, Value]]:
        """Yield each value with its valid range, which is that of a factor if the values are relative."""
        for key, valid, value in super()._values_given():
            yield key, NON_NEGATIVE if self.relative else valid, value

    def _profile(self, sites: Sequence[DropoutSite], patterns: Iterable[str]) -> dict[str, list[DropoutSite]]:
        """Return the sites that match each pattern."""
        profile = {f"p/{pattern}": _matching(sites, pattern) for pattern in patterns}
        first: dict[tuple[int, str], str] = {}
        for key, matching in profile.items():
            for site in matching:
                other = first.setdefault(site.key, key)
                if other != key:
                    raise ValueError(f"DropoutScheduler: the dropout rate of {site.label} is set by both {other!r} and {key!r}")
        return profile

    def _check_conflicts(self, pl_module: LightningModule, assigned: Mapping[str, Sequence[DropoutSite]]) -> None:
        """Check that no other callback sets the same rates."""
        mine = {site.key: site for sites in assigned.values() for site in sites}
        for callback in self._regularizers:
            if isinstance(callback, DropoutInjection) and callable(callback.p):
                theirs = [site.key for site in callback.sites(pl_module)]
            elif isinstance(callback, DropoutScheduler) and callback is not self:
                theirs = [site.key for sites in callback.assign(pl_module, self._regularizers).values() for site in sites]
            else:
                continue
            if shared := [mine[key].label for key in theirs if key in mine]:
                raise ValueError(
                    f"the dropout rate of {', '.join(shared)} is set by both {self.name} and {callback.name}: use modules= to "
                    "select different modules, or give DropoutInjection a number instead of a schedule"
                )

    def _warn_of_recompilation(self, pl_module: LightningModule, readers: Sequence[Reader]) -> None:
        """Warn if scheduled rates are part of a compiled graph."""
        scheduled = [key for key, _, value in self._values_given() if callable(value)]
        sites = [site for key in scheduled for site in self.sites[key] if isinstance(site, ModuleSite)]
        read = {key: reader.name for reader in readers for key in reader.reads}
        # torch runs recurrent modules without compiling them
        slow = [
            site for site in sites if site.key in read or not (reads_tensor(site.module) or isinstance(site.module, nn.RNNBase))
        ]
        if slow and _lightning.is_compiled(pl_module):
            by = abbreviate(list(dict.fromkeys(read[site.key] for site in slow if site.key in read)))
            what = f"{describe(slow)} (read as a number by {by})" if by else describe(slow)
            rank_zero_warn(
                f"{self.name}: {what}: torch recompiles the model for each value of such an attribute, and gives up "
                "after a few: use a schedule with few values (Steps), or exclude these modules with modules="
            )

    def _warn_of_unknown_rates(self, readers: Sequence[Reader], pl_module: LightningModule) -> None:
        """Warn about rates in unregistered attributes, if all dropout is to be scheduled."""
        known = {site.key for sites in self.sites.values() for site in sites}
        found = unregistered((reader for reader in readers if any(reader.rates.values())), pl_module, known)
        if found and self._takes_all:
            rank_zero_warn(
                f"{self.name}: some modules keep dropout rates in attributes that are not scheduled; to schedule them too, "
                f"set attributes={found | (self.attributes or {})!r}"
            )


@dataclass
class _SharedRate:
    """A rate that several sites share.

    Args:
        key: The key of the value that sets it.
        original: The original rate of the sites; of the first one if they differ.
        rate: The rate, which starts as the original one.
        sites: The sites.
    """

    key: str
    original: float
    rate: Rate
    sites: list[DropoutSite]


def _check_products(name: str, what: str, sites: Iterable[DropoutSite], factor: float) -> None:
    """Raise an error if a factor times an original rate is above 1."""
    for site in sites:
        if factor * site.original > 1:
            raise ValueError(
                f"{name}: {what} times the rate of {site.label} ({site.kind}), {site.original:g}, is "
                f"{factor * site.original:g}, which is above 1; with relative=True, p is a factor"
            )


def _selected(sites: Sequence[DropoutSite], patterns: Patterns) -> list[DropoutSite]:
    """Return the sites that patterns include and do not exclude."""
    included, excluded = split_patterns(patterns)
    barred = {site.key for pattern in excluded for site in _matching(sites, pattern)}
    found = {site.key: site for pattern in included for site in _matching(sites, pattern)}
    return [site for key, site in found.items() if key not in barred]


def _matching(sites: Sequence[DropoutSite], pattern: str) -> list[DropoutSite]:
    """Return the sites that match a pattern by the name of the module, or by its class."""
    matching = [site for site in sites if fnmatchcase(site.name, pattern) or site.kind == pattern]
    if not matching:
        close = close_matches(pattern, [*(site.name for site in sites), *(site.kind for site in sites)])
        raise _NoMatchError(pattern, close)
    return matching


class _NoMatchError(ValueError):
    """A pattern that matches no dropout."""

    def __init__(self, pattern: str, close: str) -> None:
        self.pattern = pattern
        super().__init__(
            f"DropoutScheduler: no module with dropout has a name or class that matches {pattern!r}; close matches: {close}"
        )
