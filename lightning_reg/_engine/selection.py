"""Selection of the parameters and modules that a technique acts on. All techniques use the same rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import close_matches

Params = str | list[str] | Callable[[str, nn.Parameter, nn.Module], bool]
"""``"weights"``, ``"all"``, a glob, a list of these with ``!`` for exclusion, or ``(name, parameter, module) -> bool``."""

_KEYWORDS = ("weights", "all")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_NORM_NAME = re.compile(r"Norm(\d+d)?$")
_BIAS_NAME = re.compile(r"(^|_)bias($|_)|^b$")


def select_parameters(module: nn.Module, params: Params = "weights") -> dict[str, nn.Parameter]:
    """Return the selected parameters, by name.

    A tied parameter counts once, under its first name. It is selected if any of its names is selected and none is excluded.

    Args:
        module: The module whose parameters are selected.
        params: ``"weights"`` (everything but biases, parameters of normalization layers, and other parameters with fewer than
            two dimensions), ``"all"``, a glob on qualified names such as ``"encoder.*"`` (``*`` also matches dots), a list
            of these in which a leading ``!`` excludes, or a callable ``(name, parameter, module) -> bool``.

    Returns:
        The parameters in the module's order, by names without the prefixes of wrappers such as ``_orig_mod.``. Frozen
        parameters are included: callbacks check at every step whether a parameter requires a gradient.

    Raises:
        ValueError: If nothing is selected, or a glob matches nothing; the message suggests close names.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> list(select_parameters(model))
        ['0.weight', '2.weight']
        >>> list(select_parameters(model, ["0.*", "!*.bias"]))
        ['0.weight']
    """
    chosen = selection_mask(module, params)
    if not any(chosen.values()):
        raise ValueError(nothing_selected_message(module, params))
    return lookup(module, [name for name, selected in chosen.items() if selected])


def select_modules(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Return the submodules that match name globs or class names, by name.

    Args:
        module: The module whose submodules are selected; it is never selected itself.
        patterns: Globs on qualified names (``"encoder.layers.*"``) or names of classes (``"ReLU"``).

    Returns:
        The modules in the order of the model. A module with several names counts once, under its first selected name.

    Raises:
        ValueError: If a pattern matches nothing; the message suggests close names.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select_modules(model, ["ReLU", "2"]))
        ['1', '2']
    """
    names = ((canonical_name(name), m) for name, m in module.named_modules(remove_duplicate=False) if m is not module)
    known = dict(names)
    selected: set[str] = set()
    for pattern in patterns:
        matches = [name for name, m in known.items() if _matches(name, pattern) or class_name(m) == pattern]
        if not matches:
            close = close_matches(pattern, [*map(class_name, known.values()), *known])
            raise ValueError(f"no module has a name or class that matches {pattern!r}; close matches: {close}")
        selected.update(matches)
    first = {id(m): name for name, m in reversed(known.items()) if name in selected}
    return {name: m for name, m in known.items() if first.get(id(m)) == name}


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class. If sharding or a parametrization has subclassed it, the name of the original class.

    Example:
        >>> class_name(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        'Linear'
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    originals = {f"{prefix}{name}": name for name in names for prefix in ("FSDP", "Parametrized")}
    return originals.get(names[0], names[0])


def canonical_name(name: str) -> str:
    """Remove the parts that compilers and wrappers insert into a qualified name.

    Example:
        >>> canonical_name("_orig_mod.encoder._fsdp_wrapped_module.weight")
        'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def lookup(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that have these names now. A tied parameter has only its first name."""
    wanted = set(names)
    return {name: p for name, p, _ in _first_names(module) if name in wanted}


def owners(module: nn.Module) -> dict[int, nn.Module]:
    """Return the module that each parameter belongs to under its first name, keyed by the parameter's ``id``."""
    return {id(parameter): owner for _, parameter, owner in _first_names(module)}


def selection_mask(module: nn.Module, params: Params) -> dict[str, bool]:
    """Return whether each parameter is selected, keyed by its first name.

    Raises:
        ValueError: If a glob matches nothing although the module has parameters.
    """
    rules = [params] if isinstance(params, str) else params
    if not callable(rules):
        _check_rules(module, rules)
    selected: set[int] = set()
    excluded: set[int] = set()
    for name, parameter, owner in _named(module):
        if callable(rules):
            includes, excludes = rules(name, parameter, owner), False
        else:
            includes = any(_covers(rule, name, parameter, owner) for rule in rules)
            excludes = any(_covers(rule[1:], name, parameter, owner) for rule in rules if rule.startswith("!"))
        (excluded if excludes else selected if includes else set()).add(id(parameter))
    return {name: id(p) in selected and id(p) not in excluded for name, p, _ in _first_names(module)}


def nothing_selected_message(module: nn.Module, params: Params) -> str:
    """Return the error message for a selection that selects nothing; it suggests close names."""
    rules = [] if callable(params) else [params] if isinstance(params, str) else params
    wanted = next((rule for rule in rules if rule not in _KEYWORDS), "")
    shown = getattr(params, "__name__", repr(params)) if callable(params) else repr(params)
    close = close_matches(wanted, [name for name, _, _ in _first_names(module)])
    return f"params={shown} selects no parameter; close matches: {close or 'none, the module has no parameters'}"


def _covers(rule: str, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    if rule == "weights":
        return is_weight(name, parameter, owner)
    return rule == "all" or _matches(name, rule)


def is_weight(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Return whether a parameter is a weight: not a bias, not in a normalization layer, and with at least two dimensions."""
    if _BIAS_NAME.search(name.rpartition(".")[2]):
        return False
    if isinstance(owner, _NORMS) or _NORM_NAME.search(type(owner).__name__):
        return False
    return is_lazy(parameter) or parameter.ndim >= 2


def _check_rules(module: nn.Module, rules: Sequence[str]) -> None:
    if not rules or all(rule.startswith("!") for rule in rules):
        raise ValueError(f"params={list(rules)} selects no parameter: start with what to include, as in ['weights', '!head.*']")
    names = [name for name, _, _ in _named(module)]
    for rule in rules:
        glob = rule.removeprefix("!")
        if names and glob not in _KEYWORDS and not any(_matches(name, glob) for name in names):
            raise ValueError(
                f"params: no parameter has a name that matches {rule!r}; close matches: {close_matches(glob, names)}"
            )


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield every name of every parameter, with the parameter and the module that it belongs to under this name."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield canonical_name(f"{prefix}.{name}" if prefix else name), parameter, owner


def _first_names(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield the first name of every parameter, with the parameter and its module."""
    seen: set[int] = set()
    for name, parameter, owner in _named(module):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter, owner
