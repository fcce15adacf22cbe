"""Selection of the modules that a technique acts on, by name or by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric

from lightning_reg._engine.arguments import close_matches, described_value, quoting_hint
from lightning_reg._engine.names import canonical_name, class_name
from lightning_reg._tensors.layers import layer_units

Patterns = str | Sequence[str]
"""A glob on names of modules, the name of a class, or a list of these with ``!`` for exclusion."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def select_modules(module: nn.Module, patterns: Patterns) -> dict[str, nn.Module]:
    """Return the submodules that match name globs or class names, by name.

    ``"*"`` alone means the layers inside the model: the modules without children, up to the last one that has parameters, in
    the order in which the model defines them. That one computes the output of the model, so it is left out, and so are the
    modules after it. Losses and metrics are left out too.

    Args:
        module: The module whose submodules are selected. The module itself is never selected.
        patterns: A glob on qualified names (``"encoder.layers.*"``), the name of a class (``"ReLU"``), or a list of these, in
            which a leading ``!`` excludes.

    Returns:
        The modules in the order of the model. A module with several names counts once, under its first selected name. It is
        selected if any of its names is selected and none is excluded.

    Raises:
        ValueError: If a pattern matches nothing (the message suggests close names), or everything included is excluded.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select_modules(model, ["ReLU", "2"]))
        ['1', '2']
        >>> list(select_modules(model, "*"))
        ['0', '1']
    """
    named = {canonical_name(name): m for name, m in module.named_modules(remove_duplicate=False) if m is not module}
    included, excluded = split_patterns(patterns)
    chosen = {name for pattern in included for name in _matching(module, named, pattern)}
    barred = {id(named[name]) for pattern in excluded for name in _matching(module, named, pattern)}
    first = {id(m): name for name, m in reversed(named.items()) if name in chosen and id(m) not in barred}
    if not first:
        raise ValueError(f"{patterns!r} selects no module: everything that it includes is excluded")
    return {name: m for name, m in named.items() if first.get(id(m)) == name}


def split_patterns(patterns: Patterns) -> tuple[list[str], list[str]]:
    """Return the patterns that include, and those that exclude, without their ``!``.

    Raises:
        ValueError: If none includes anything.

    Example:
        >>> split_patterns(["encoder.*", "!encoder.0"])
        (['encoder.*'], ['encoder.0'])
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    included = [canonical_name(pattern) for pattern in listed if pattern and not pattern.startswith("!")]
    if not included:
        raise ValueError(f"{listed} selects no module: start with what to include, as in ['ReLU', '!head.*']")
    return included, [canonical_name(pattern[1:]) for pattern in listed if pattern.startswith("!")]


def check_patterns(what: str, patterns: Any) -> None:
    """Raise an error if patterns are not valid for :func:`select_modules`, as far as can be told without a module.

    Raises:
        TypeError: If they have another type, such as a class. The message says what to write.
        ValueError: If they include nothing.
    """
    listed = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Sequence) else patterns
    for pattern in listed:
        if isinstance(pattern, str):
            continue
        if isinstance(pattern, type):
            fix = f"write the name of the class, {pattern.__name__!r}"
        elif isinstance(pattern, nn.Module):
            fix = f"write its name in the model, such as 'encoder.0', or the name of its class, {class_name(pattern)!r}"
        else:
            fix = "write a name such as 'encoder.*', a class such as 'ReLU', or a list of these"
        raise TypeError(f"{what} must name modules, got {described_value(pattern)}: {fix}")
    try:
        split_patterns(patterns)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def inner_layers(module: nn.Module) -> list[str]:
    """Return the names of the layers inside a model: those before the last one that has parameters.

    Example:
        >>> inner_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(-1)))
        ['0', '1']
    """
    layers = list(_leaves(module, ""))
    last = max((index for index, (_, m) in enumerate(layers) if next(m.parameters(), None) is not None), default=len(layers))
    return [name for name, _ in layers[:last]]


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules without children, and known layers as a whole, since their children are not called as modules."""
    for name, child in module.named_children():
        if isinstance(child, (_Loss, Metric)):
            continue
        qualified = f"{prefix}.{name}" if prefix else name
        if layer_units(child) is not None or next(child.children(), None) is None:
            if not isinstance(child, _CONTAINERS):  # an empty one
                yield canonical_name(qualified), child
        else:
            yield from _leaves(child, qualified)


def _matching(module: nn.Module, named: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """Return the names that match a pattern.

    Raises:
        ValueError: If there are none.
    """
    if pattern == "*":
        matches = inner_layers(module)
        if not matches and named:
            raise ValueError(
                "'*' means the layers before the last one that has parameters, but the model has none; name modules, as in "
                f"{next(iter(named))!r}"
            )
    else:
        matches = [name for name, m in named.items() if fnmatchcase(name, pattern) or class_name(m) == pattern]
    if not matches and pattern.startswith("["):
        raise ValueError(f"no module has a name or class that matches {pattern!r}; {quoting_hint('ReLU')}")
    if not matches:
        close = close_matches(pattern, [*map(class_name, named.values()), *named])
        raise ValueError(f"no module has a name or class that matches {pattern!r}; close matches: {close}")
    return matches
