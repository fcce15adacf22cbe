"""Dropout sites: the attributes of modules, and the injected dropout, that have a dropout rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_reg._engine.arguments import PROBABILITY, check_module, close_matches, described_value
from lightning_reg._engine.names import abbreviate, canonical_name, class_name
from lightning_reg.dropout.rates import Rate, restore_class_, swap_class_

DROPOUT_ATTRIBUTES: dict[type[nn.Module] | str, str | list[str]] = {
    _DropoutNd: "p",  # nn.Dropout, nn.Dropout1d to 3d, nn.AlphaDropout, nn.FeatureAlphaDropout
    nn.MultiheadAttention: "dropout",
    nn.RNNBase: "dropout",  # nn.RNN, nn.LSTM, nn.GRU: between layers, so it has no effect with a single layer
    "DropPath": "drop_prob",  # stochastic depth in timm and many other libraries
    "StochasticDepth": "p",  # stochastic depth in torchvision
}
"""The attribute with the dropout rate, a float, for each class of modules: the class itself or its name.

A class with several rates has a list of attributes. An entry also covers subclasses. Add your own classes here, or pass them to
a callback, as in ``attributes={"Attention": "attention_dropout"}``.
"""


class DropoutSite(Protocol):
    """A place in a model that has a dropout rate."""

    name: str
    """The qualified name of the module."""
    kind: str
    """The name of the module's class, or ``"DropoutInjection"``."""
    module: nn.Module

    @property
    def label(self) -> str:
        """The name in messages: of the module, and of the attribute where the module has several rates."""

    @property
    def original(self) -> float:
        """The original rate."""

    @property
    def key(self) -> tuple[int, str]:
        """A key that is unique among the sites of a model."""

    def use(self, rate: Rate, by: str = "") -> None:
        """Use a scheduled rate instead of the original one; ``by`` names the callback that sets it."""

    def set(self, p: float) -> None:
        """Update the site after its scheduled rate has changed."""

    def restore(self) -> None:
        """Restore the original rate."""


class ModuleSite:
    """A module with a float attribute that is its dropout rate.

    Args:
        name: The qualified name of the module.
        module: The module.
        attribute: The name of the attribute.
        is_only: Whether the module has no other rate.

    Raises:
        TypeError: If there is no such attribute, or the attribute is not a number.
        ValueError: If it is not in [0, 1].
    """

    def __init__(self, name: str, module: nn.Module, attribute: str, is_only: bool = True) -> None:
        self.name, self.module, self.attribute = name, module, attribute
        self.label = name if is_only else f"{name}.{attribute}"
        self.kind = class_name(module)
        what = f"{name}.{attribute} ({self.kind})"
        if not hasattr(module, attribute):
            raise TypeError(f"{what} must be a number in {PROBABILITY}, but the module has no attribute {attribute!r}")
        self.original = PROBABILITY.check(what, getattr(module, attribute))

    @property
    def key(self) -> tuple[int, str]:
        """A key that is unique among the sites of a model."""
        return id(self.module), self.attribute

    def use(self, rate: Rate, by: str = "") -> None:
        """Use a scheduled rate instead of the original one. In compiled code, torch's dropout modules read it as a tensor."""
        swap_class_(self.module, self.attribute, rate)

    def set(self, p: float) -> None:
        """Set the attribute, which eager code reads."""
        setattr(self.module, self.attribute, p)

    def restore(self) -> None:
        """Restore the original rate."""
        restore_class_(self.module, self.attribute)


def find_dropout(module: nn.Module, attributes: Mapping[Any, str | list[str]] | None = None) -> list[ModuleSite]:
    """Return the modules of a model that have a dropout rate, in the order of the model.

    Recurrent modules with a single layer are left out, because their dropout has no effect.

    Args:
        module: The model. It may be a dropout module itself.
        attributes: Further classes or class names, each with its attribute or a list of attributes. They take precedence over
            ``DROPOUT_ATTRIBUTES``.

    Returns:
        A site for each rate, with the name of the module, the attribute, and the ``original`` rate.

    Raises:
        TypeError: If a module lacks its attribute, or the attribute is not a number.
        ValueError: If a rate is not in [0, 1], or no module has a class in ``attributes``.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, dropout=0.2)
        >>> [(site.name, site.attribute, site.original) for site in find_dropout(model)]
        [('self_attn', 'dropout', 0.2), ('dropout', 'p', 0.2), ('dropout1', 'p', 0.2), ('dropout2', 'p', 0.2)]
    """
    check_module("find_dropout", module)
    added = {cls: _list_of_names(cls, names) for cls, names in (attributes or {}).items()}
    table = {**added, **{cls: _list_of_names(cls, names) for cls, names in DROPOUT_ATTRIBUTES.items() if cls not in added}}
    sites, used = [], set()
    for name, submodule in module.named_modules():
        matched = next((cls for cls in table if _is_a(submodule, cls)), None)
        if matched is not None:
            used.add(matched)
            if not _is_inert(submodule):
                names = table[matched]
                sites += [ModuleSite(canonical_name(name), submodule, attribute, len(names) == 1) for attribute in names]
    for cls in added:
        if cls not in used:
            raise ValueError(_unused_message(module, cls))
    return sites


def inert_dropout(module: nn.Module) -> str:
    """Describe the recurrent modules whose dropout rate has no effect, or return an empty string if there are none.

    Example:
        >>> inert_dropout(nn.ModuleDict({"rnn": nn.GRU(2, 2)}))
        'rnn has a single layer, but a recurrent module applies dropout only between its layers'
    """
    names = [canonical_name(name) for name, submodule in module.named_modules() if _is_inert(submodule)]
    what = f"{abbreviate(names)} {'have' if len(names) > 1 else 'has'} a single layer"
    return f"{what}, but a recurrent module applies dropout only between its layers" if names else ""


def set_dropout_(sites: DropoutSite | Iterable[DropoutSite], p: float) -> None:
    """Set the dropout rate of sites.

    Args:
        sites: What ``find_dropout`` returned, or one of these.
        p: The probability of dropping an entry, in [0, 1].

    Raises:
        TypeError: If ``sites`` is anything else.
        ValueError: If p is not in [0, 1].

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> set_dropout_(find_dropout(layer), 0.1)
        >>> layer
        Dropout(p=0.1, inplace=False)
    """
    PROBABILITY.check("set_dropout_: p", p)
    listed: list[Any] = list(sites) if isinstance(sites, Iterable) and not isinstance(sites, nn.Module) else [sites]
    if wrong := [site for site in listed if not callable(getattr(site, "set", None))]:
        raise TypeError(f"set_dropout_: sites must be what find_dropout(model) returns, got {described_value(wrong[0])}")
    for site in listed:
        site.set(p)


def describe(sites: Iterable[DropoutSite], limit: int = 3) -> str:
    """Describe sites in one line: class, original rate, and names of the modules.

    Example:
        >>> describe(find_dropout(nn.TransformerEncoderLayer(8, 2, dropout=0.2)))
        'MultiheadAttention 0.2: self_attn; Dropout 0.2: dropout, dropout1, dropout2'
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        kinds[f"{site.kind} {site.original:g}"].append(site.label)
    return "; ".join(f"{kind}: {abbreviate(names, limit)}" for kind, names in kinds.items())


def check_attributes(what: str, attributes: Any) -> None:
    """Raise an error if ``attributes`` is not what :func:`find_dropout` takes.

    Raises:
        TypeError: If it is not a dictionary from classes of modules, or their names, to names of attributes.
    """
    if not isinstance(attributes, (Mapping, type(None))):
        example = "attributes={'Attention': 'dropout_rate'}"
        raise TypeError(f"{what}: attributes must be a dictionary, as in {example}, got {described_value(attributes)}")
    for cls, names in (attributes or {}).items():
        if not (isinstance(cls, str) or (isinstance(cls, type) and issubclass(cls, nn.Module))):
            raise TypeError(
                f"{what}: each key of attributes must be a class of modules or its name, got {described_value(cls)}"
            )
        try:
            _list_of_names(cls, names)
        except TypeError as error:
            raise TypeError(f"{what}: {error}") from None


def _list_of_names(cls: Any, names: Any) -> list[str]:
    """Return the attributes of a class as a list."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(name, str) for name in listed):
        what = f"attributes: {getattr(cls, '__name__', cls)}"
        raise TypeError(f"{what} must have the name of an attribute or a list of names, got {names!r}")
    return list(dict.fromkeys(listed))


def _unused_message(module: nn.Module, cls: Any) -> str:
    name = getattr(cls, "__name__", str(cls))
    close = close_matches(name, [class_name(submodule) for submodule in module.modules()])
    return f"attributes: the model has no module of class {name}; close matches: {close}"


def _is_a(module: nn.Module, cls: type[nn.Module] | str) -> bool:
    return cls in (base.__name__ for base in type(module).__mro__) if isinstance(cls, str) else isinstance(module, cls)


def _is_inert(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and module.num_layers == 1
