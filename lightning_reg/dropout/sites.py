"""Where a model keeps rates of dropout: in which attribute of which modules, and in what was injected."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_reg._engine.arguments import PROBABILITY
from lightning_reg._engine.selection import canonical_name, class_name
from lightning_reg.dropout.rates import Rate, restore_class_, swap_class_

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DROPOUT_ATTRIBUTES: dict[type[nn.Module] | str, str] = {
    _DropoutNd: "p",  # nn.Dropout, nn.Dropout1d to 3d, nn.AlphaDropout, nn.FeatureAlphaDropout
    nn.MultiheadAttention: "dropout",
    nn.RNNBase: "dropout",  # nn.RNN, nn.LSTM, nn.GRU; between layers, so inert with a single one
    "DropPath": "drop_prob",  # stochastic depth as timm and many others have it
    "StochasticDepth": "p",  # torchvision's
}
"""The attribute in which modules of a class, given itself or by its name, keep a float that is their rate of dropout.

Subclasses count as their bases do. Add your own, or name them to a callback: ``attributes={"Attention": "attention_dropout"}``.
"""


class DropoutSite(Protocol):
    """A rate of dropout somewhere in a model."""

    name: str
    """The qualified name of the module."""
    kind: str
    """The name of the module's class, or ``"DropoutInjection"``."""
    module: nn.Module

    @property
    def own(self) -> float:
        """The rate that it has of its own."""

    @property
    def key(self) -> tuple[int, str]:
        """What tells it apart from every other site."""

    def take(self, rate: Rate) -> None:
        """Read a rate instead of its own."""

    def set(self, p: float) -> None:
        """Take over a new value of the rate."""

    def release(self) -> None:
        """Have its own rate again."""


class ModuleSite:
    """A float attribute of a module that is its rate of dropout.

    Args:
        name: The module's qualified name.
        module: The module.
        attribute: The attribute.

    Raises:
        TypeError: If it holds no number.
        ValueError: If it holds no probability.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name, self.module, self.attribute = name, module, attribute
        self.kind = class_name(module)
        missing = "nothing of this name"
        self.own = PROBABILITY.check(f"{name}.{attribute} ({self.kind})", getattr(module, attribute, missing))

    @property
    def key(self) -> tuple[int, str]:
        """What tells it apart from every other site."""
        return id(self.module), self.attribute

    def take(self, rate: Rate) -> None:
        """Read a rate instead of its own: compiled code the tensor, if the module is one of torch's dropout modules."""
        swap_class_(self.module, self.attribute, rate)

    def set(self, p: float) -> None:
        """Write the attribute, which eager code reads."""
        setattr(self.module, self.attribute, p)

    def release(self) -> None:
        """Have its own rate again."""
        restore_class_(self.module, self.attribute)


def find_dropout(module: nn.Module, attributes: Mapping[Any, str] | None = None) -> list[ModuleSite]:
    """Return every site of a model that has a rate of dropout, in the model's order.

    Args:
        module: The model; it may be such a place itself.
        attributes: What to look for beside :data:`DROPOUT_ATTRIBUTES`, and before it: class or class name to attribute.

    Raises:
        TypeError: If an attribute holds no number.
        ValueError: If a class in ``attributes`` is that of no module.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, dropout=0.2)
        >>> [(site.name, site.attribute, site.own) for site in find_dropout(model)]
        [('self_attn', 'dropout', 0.2), ('dropout', 'p', 0.2), ('dropout1', 'p', 0.2), ('dropout2', 'p', 0.2)]
    """
    table = {**(attributes or {}), **{cls: name for cls, name in DROPOUT_ATTRIBUTES.items() if cls not in (attributes or {})}}
    sites, met = [], set()
    for name, each in module.named_modules():
        matched = next((cls for cls in table if _is_a(each, cls)), None)
        if matched is not None:
            met.add(matched)
            if not _is_inert(each):
                sites.append(ModuleSite(canonical_name(name), each, table[matched]))
    if unmet := [cls for cls in attributes or {} if cls not in met]:
        raise ValueError(f"attributes: no module is of the class {', '.join(map(str, unmet))}")
    return sites


def inert_dropout(module: nn.Module) -> str:
    """Say which recurrent modules have a rate of dropout that does nothing; nothing where there are none.

    Example:
        >>> inert_dropout(nn.ModuleDict({"rnn": nn.GRU(2, 2)}))
        'rnn has a single layer, and the dropout of a recurrent module is between its layers'
    """
    names = [canonical_name(name) for name, each in module.named_modules() if _is_inert(each)]
    what = f"{abbreviate(names)} {'have' if len(names) > 1 else 'has'} a single layer"
    return f"{what}, and the dropout of a recurrent module is between its layers" if names else ""


def set_dropout_(sites: Iterable[DropoutSite], p: float) -> None:
    """Set the rate of some sites.

    Args:
        sites: What :func:`find_dropout` returns.
        p: The probability of a zero, in [0, 1].

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> set_dropout_(find_dropout(layer), 0.1)
        >>> layer
        Dropout(p=0.1, inplace=False)
    """
    for site in sites:
        site.set(p)


def describe(sites: Iterable[DropoutSite], limit: int = 3) -> str:
    """Return a compact table of sites: kind, own rate and modules.

    Example:
        >>> describe(find_dropout(nn.TransformerEncoderLayer(8, 2, dropout=0.2)))
        'MultiheadAttention 0.2: self_attn; Dropout 0.2: dropout, dropout1, dropout2'
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        kinds[f"{site.kind} {site.own:g}"].append(site.name)
    return "; ".join(f"{kind}: {abbreviate(names, limit)}" for kind, names in kinds.items())


def abbreviate(names: list[str], limit: int = 3) -> str:
    """Return the first of some names, and how many more there are.

    Example:
        >>> abbreviate(list("abcdefg"))
        'a, b, c and 4 more'
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _is_a(module: nn.Module, cls: type[nn.Module] | str) -> bool:
    return cls in (base.__name__ for base in type(module).__mro__) if isinstance(cls, str) else isinstance(module, cls)


def _is_inert(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and module.num_layers == 1
