"""Dropout that callbacks do not reach: placeholders for dropout of rate 0, and classes that are not registered."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from lightning_reg._engine.arguments import PROBABILITY
from lightning_reg._engine.names import abbreviate, canonical_name, class_name
from lightning_reg.dropout.readers import find_readers, suggested_attributes
from lightning_reg.dropout.sites import find_dropout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from lightning_reg.dropout.readers import Reader

_NAMES_OF_RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p", "dropout_prob", "dropout_rate", "prob", "rate")


def placeholders(module: nn.Module) -> list[str]:
    """Return the names of ``nn.Identity`` modules whose names suggest that they replace dropout.

    Libraries create one instead of dropout of rate 0: ``lora_dropout`` in peft, ``drop_path`` in timm.

    Example:
        >>> placeholders(nn.ModuleDict({"lora_dropout": nn.ModuleDict({"default": nn.Identity()}), "norm": nn.Identity()}))
        ['lora_dropout.default']
    """
    named = ((canonical_name(name), submodule) for name, submodule in module.named_modules())
    return [name for name, submodule in named if isinstance(submodule, nn.Identity) and _component(name)]


def describe_placeholders(names: list[str], pattern: str = "drop") -> str:
    """Describe placeholders for dropout and what to do about them, if a pattern is for dropout; otherwise an empty string.

    Example:
        >>> print(describe_placeholders(["lora_dropout.default"]))
        lora_dropout.default is nn.Identity instead of dropout of rate 0: create the model with a rate above 0, or add dropout
        there, as in DropoutInjection(0.1, after='*lora_dropout*')
    """
    if not names or not ("drop" in pattern.lower() or any(fnmatchcase(name, pattern) for name in names)):
        return ""
    verb = "are" if len(names) > 1 else "is"
    return (
        f"{abbreviate(names)} {verb} nn.Identity instead of dropout of rate 0: create the model with a rate above 0, or add "
        f"dropout there, as in DropoutInjection(0.1, after='*{_component(names[0])}*')"
    )


def unregistered(
    readers: Iterable[Reader], module: nn.Module, known: Collection[tuple[int, str]]
) -> dict[str, str | list[str]]:
    """Return ``attributes`` that register the unregistered rates, as far as code or names reveal them.

    Args:
        readers: The modules whose own code applies dropout, as ``find_readers`` returns them.
        module: The model.
        known: The keys of the dropout that is known.

    Example:
        >>> class DropBlock2d(nn.Module):
        ...     drop_prob = 0.1
        >>> unregistered([], DropBlock2d(), ())
        {'DropBlock2d': 'drop_prob'}
    """
    found = suggested_attributes(readers, known)
    for submodule in module.modules():
        kind = class_name(submodule)
        attribute = _rate_of(submodule) if "drop" in kind.lower() and kind not in found else None
        if attribute and (id(submodule), attribute) not in known:
            found[kind] = attribute
    return found


def how_to_register(module: nn.Module) -> str:
    """Explain how to register rates in attributes, for an error message about missing dropout.

    Example:
        >>> how_to_register(nn.Linear(2, 2))
        "if a module keeps its rate in an attribute, name both, as in attributes={'Attention': 'attention_dropout'}"
    """
    example = _not_registered(module) or {"Attention": "attention_dropout"}
    register = f"if a module keeps its rate in an attribute, name both, as in attributes={example!r}"
    missing = describe_placeholders(placeholders(module))
    return f"{missing}; {register}" if missing else register


def why_unmatched(module: nn.Module, pattern: str) -> str:
    """Return why a pattern may match no dropout, and what to do about it, to append to an error message."""
    found = _not_registered(module)
    reasons = [
        describe_placeholders(placeholders(module), pattern),
        f"to schedule rates in attributes, set attributes={found!r}" if found else "",
    ]
    return "".join(f"; {reason}" for reason in reasons if reason)


def _not_registered(module: nn.Module) -> dict[str, str | list[str]]:
    return unregistered(find_readers(module), module, {site.key for site in find_dropout(module)})


def _component(name: str) -> str:
    """Return the part of a qualified name that says that a module is for dropout: its last part, or the one before it."""
    return next((part for part in reversed(name.split(".")[-2:]) if "drop" in part.lower()), "")


def _rate_of(module: nn.Module) -> str | None:
    """Return the attribute that is a rate by its name and its value, or ``None``."""
    values = {name: getattr(module, name, None) for name in _NAMES_OF_RATES}
    return next((name for name, value in values.items() if isinstance(value, float) and value in PROBABILITY), None)
