"""Selection of the parameters that a technique acts on. All techniques use the same rules."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_reg._engine.arguments import check_module, close_matches, described_value, quoting_hint, readable
from lightning_reg._engine.command_line import SelectionFunction, function_at, is_function_path, path_suggestion
from lightning_reg._engine.kinds import KEYWORDS, NamedParameter, named_kinds, named_parameters
from lightning_reg._engine.names import abbreviate, canonical_name, class_name

Params = str | Sequence[str] | SelectionFunction | Callable[[str, nn.Parameter, nn.Module], bool]
"""A keyword, a glob, a list of these with ``!`` for exclusion, or ``(name, parameter, module) -> bool`` or its import path."""

_FUNCTION = "(name, parameter, module) -> bool"


def select_parameters(module: nn.Module, params: Params = "weights") -> dict[str, nn.Parameter]:
    """Return the selected parameters, by name.

    ``"weights"`` means the matrices and filters of a model. The weights of known layers count regardless of their shape:
    linear, convolutional, recurrent, and attention layers, embeddings, and layers added to ``lightning_reg.WEIGHT_LAYERS``. In
    other modules, a parameter counts if at least two of its dimensions are larger than 1, or if its name is ``weight``,
    ``kernel``, or ``…_weight``. Biases, parameters of normalization layers, position embeddings, tokens, scales, and the
    parameters that a module's ``no_weight_decay()`` names never count. Neither do weights that a module computes from other
    parameters, as ``weight_norm`` does; a warning names them. Weights under a mask of ``torch.nn.utils.prune`` do count.

    A tied parameter counts once, under its first name. It is selected if any of its names is selected and none is excluded.

    Args:
        module: The module whose parameters are selected.
        params: ``"weights"``, ``"all"``, ``"biases"``, ``"norms"``, ``"embeddings"``, or a glob on qualified names such as
            ``"encoder.*"`` (``*`` also matches dots). ``"weights:encoder.*"`` selects the weights that match a glob. Or a list
            of these, in which a leading ``!`` excludes, or a callable ``(name, parameter, module) -> bool``, which may be
            given by its import path, as in ``"package.module:function"``.

    Returns:
        The parameters in the module's order, by names without the prefixes of wrappers such as ``_orig_mod.``. Frozen
        parameters are included: callbacks check at every step whether a parameter requires a gradient.

    Raises:
        TypeError: If ``module`` is not a module, or ``params`` has another type, such as a module or a class.
        ValueError: If nothing is selected; the message says what ``"weights"`` left out. If a glob matches nothing; the message
            suggests close names.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> list(select_parameters(model))
        ['0.weight', '2.weight']
        >>> list(select_parameters(model, ["all", "!norms"]))
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> list(select_parameters(model, "weights:2.*"))
        ['2.weight']
    """
    check_module("select_parameters", module)
    check_params("select_parameters", params)
    chosen = selection_mask(module, params)
    if not any(chosen.values()):
        raise ValueError(nothing_selected_message(module, params))
    if warning := parametrized_warning(module, params):
        rank_zero_warn(f"select_parameters: {warning}")
    return lookup(module, [name for name, selected in chosen.items() if selected])


def check_params(what: str, params: Any) -> None:
    """Raise an error if ``params`` is not valid for :func:`select_parameters`, as far as can be told without a module.

    Raises:
        TypeError: If it has another type. The message says what to write.
        ValueError: If it includes nothing, or an entry is malformed.
    """
    if callable(params) and not isinstance(params, (nn.Module, type)):
        _check_function(f"{what}: params={readable(params)}", params)
        return
    rules = [params] if isinstance(params, str) or not isinstance(params, Sequence) else params
    for rule in rules:
        if not isinstance(rule, str):
            raise TypeError(f"{what}: params must name parameters, got {described_value(rule)}: {_fix(rule)}")
    try:
        _check_texts(_parsed(rules))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _check_function(what: str, function: Callable[..., Any]) -> None:
    if not _takes_three(function):
        raise TypeError(f"{what} must be a function of three arguments, {_FUNCTION}")


def _takes_three(function: Callable[..., Any]) -> bool:
    """Return whether a function can be called with a name, a parameter, and a module."""
    try:
        inspect.signature(function).bind("", None, None)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _fix(rule: Any) -> str:
    """Return what to write instead of a value that does not name parameters."""
    if isinstance(rule, nn.Module):
        return f"write the name of this {type(rule).__name__} in the model, as in params='encoder.*'"
    if isinstance(rule, Tensor):
        return "write its name, as in params='head.weight'"
    if isinstance(rule, type) and issubclass(rule, nn.Module):
        return f"write a function, as in params={_of_class(rule.__name__)}"
    return f"write one of {', '.join(map(repr, KEYWORDS))}, a glob, a list of these, or {_FUNCTION}"


def _of_class(name: str) -> str:
    return f"lambda name, parameter, module: isinstance(module, {name})"


def lookup(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that have these names now. A tied parameter has only its first name."""
    wanted = set(names)
    return {name: p for name, (p, _) in _first_names(module).items() if name in wanted}


def owners(module: nn.Module) -> dict[int, nn.Module]:
    """Return the module that each parameter belongs to under its first name, keyed by the parameter's ``id``."""
    return {id(parameter): owner for parameter, owner in _first_names(module).values()}


def selection_mask(module: nn.Module, params: Params) -> dict[str, bool]:
    """Return whether each parameter is selected, keyed by its first name.

    Raises:
        ValueError: If a glob matches nothing although the module has parameters.
    """
    selected = _selected(module, named_kinds(module), params)
    return {name: id(p) in selected for name, (p, _) in _first_names(module).items()}


def effective_tensors(module: nn.Module, params: Params) -> dict[str, Tensor]:
    """Return the selected tensors as the forward pass uses them: computed weights replace their originals.

    A computed weight is selected by its own name and kind, or by the name of any of its originals.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        >>> list(effective_tensors(layer, "weights"))
        ['weight']
    """
    check_module("sparsity", module)
    check_params("sparsity", params)
    originals = named_kinds(module)
    selected = _selected(module, [*originals, *named_kinds(module, effective=True)], params)
    if not selected:
        raise ValueError(nothing_selected_message(module, params))
    tensors: dict[str, Tensor] = {}
    for p in originals:
        if id(p.parameter) in selected:
            selected.remove(id(p.parameter))  # under its first name
            if p.computed is None:
                tensors[p.name] = p.parameter
            elif p.computed.name not in tensors:
                tensors[p.computed.name] = p.computed.value()
    return tensors


def _selected(module: nn.Module, named: Sequence[NamedParameter], params: Params) -> set[int]:
    """Return the ``id`` of each selected parameter."""
    params = _imported(params, [p.name for p in named])
    if callable(params):
        return {id(p.parameter) for p in named if _says_yes(params, p)}
    rules = _parsed(params)
    _check_rules(module, rules, named)
    excluded = {id(p.parameter) for p in named if any(rule.excludes and rule.covers(p) for rule in rules)}
    included = {id(p.parameter) for p in named if any(not rule.excludes and rule.covers(p) for rule in rules)}
    return included - excluded


def _imported(params: Params, names: Sequence[str]) -> Params:
    """Return the function for an import path. A string with a colon may also name a parameter.

    Raises:
        ValueError: If the function cannot be imported.
        TypeError: If it takes other arguments.
    """
    if not isinstance(params, str) or not _names_function(params) or params in names:
        return params
    try:
        function: Params = function_at(params)
    except ValueError as error:
        raise ValueError(f"params={error}; {_keyword_hint(params)}") from error
    _check_function(f"params={params!r}", function)  # type: ignore[arg-type]
    return function


def _says_yes(function: Callable[[str, nn.Parameter, nn.Module], bool], p: NamedParameter) -> bool:
    """Return whether a function selects a parameter.

    Raises:
        TypeError: If it returns a tensor that is not a single truth value.
    """
    answer = function(p.name, p.parameter, p.owner)
    if isinstance(answer, Tensor) and (answer.dtype != torch.bool or answer.numel() != 1):
        raise TypeError(
            f"params={readable(function)} must return True or False, but returned {described_value(answer)} for {p.name!r}"
        )
    return bool(answer)


def uses_weights(params: Params) -> bool:
    """Return whether a selection includes ``"weights"``, or a part of them."""
    return not callable(params) and any(rule.keyword == "weights" and not rule.excludes for rule in _parsed(params))


def left_out(module: nn.Module, params: Params) -> dict[str, list[str]]:
    """Return the names of the parameters that ``"weights"`` has left out of a selection, by reason.

    Example:
        >>> left_out(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), "weights")
        {'biases': ['0.bias', '1.bias'], 'normalization': ['1.weight']}
    """
    if callable(params):
        return {}
    rules = _parsed(params)
    reasons: dict[str, list[str]] = {}
    chosen = selection_mask(module, params)
    for p in named_kinds(module):
        asked_for = any(rule.keyword == "weights" and not rule.excludes and fnmatchcase(p.name, rule.glob) for rule in rules)
        excluded = any(rule.excludes and rule.covers(p) for rule in rules)
        if p.reason and asked_for and not excluded and chosen.get(p.name) is False:
            reasons.setdefault(p.reason, []).append(p.name)
    return reasons


def parametrized_warning(module: nn.Module, params: Params) -> str:
    """Return a warning about weights that ``"weights"`` leaves out because they are computed, or an empty string."""
    names = left_out(module, params).get("parametrized")
    if not names:
        return ""
    tensors = dict.fromkeys(p.computed.name for p in named_kinds(module) if p.computed and p.name in names)
    return (
        f"'weights' leaves out {abbreviate(list(tensors), 10)}, which the model computes from {abbreviate(names, 10)}: acting "
        "on these is not acting on the weights. To act on them anyway, or to silence this warning, name them, as in "
        f"params=['weights', {names[0]!r}] or params=['weights', '!{names[0]}']"
    )


def described(reasons: dict[str, list[str]]) -> str:
    """Describe in one line what was left out, and why.

    Example:
        >>> described({"biases": ["0.bias", "1.bias"], "normalization": ["1.weight"]})
        'biases (0.bias, 1.bias), normalization (1.weight)'
    """
    return ", ".join(f"{reason} ({abbreviate(names)})" for reason, names in reasons.items())


def nothing_selected_message(module: nn.Module, params: Params) -> str:
    """Return the error message for an empty selection: what it left out, or close names."""
    what = f"params={readable(params)} selects no parameter"
    names = list(_first_names(module))
    params = _imported(params, names)
    if callable(params) and names:
        return f"{what}: it returned a false value for each of {abbreviate(names)}"
    reasons = left_out(module, params)
    if reasons:
        return f"{what}; 'weights' leaves out {described(reasons)}"
    rules = [] if callable(params) else [rule for rule in _parsed(params) if not rule.excludes]
    matching = [name for name in names if any(fnmatchcase(name, rule.glob) for rule in rules)]
    keywords = dict.fromkeys(repr(rule.keyword) for rule in rules)
    if matching and "'all'" not in keywords:
        return f"{what}: {' and '.join(keywords)} include none of {abbreviate(matching)}"
    close = close_matches(next((rule.glob for rule in rules if rule.glob != "*"), ""), names)
    return f"{what}; close matches: {close or 'none, the module has no parameters'}"


class _Rule(NamedTuple):
    """One entry of ``params``: a keyword and a glob. A parameter must satisfy both."""

    text: str
    excludes: bool
    keyword: str
    glob: str

    def covers(self, p: NamedParameter) -> bool:
        """Return whether the rule applies to a parameter."""
        return self.keyword in p.kinds and fnmatchcase(p.name, self.glob)


def _parsed(params: str | Sequence[str]) -> list[_Rule]:
    texts = [params] if isinstance(params, str) else list(params)
    return [_rule(text.removeprefix("!"), text.startswith("!")) for text in texts]


def _rule(text: str, excludes: bool) -> _Rule:
    keyword, colon, glob = text.partition(":")
    if keyword in KEYWORDS:
        return _Rule(text, excludes, keyword, canonical_name(glob) if colon else "*")
    return _Rule(text, excludes, "all", canonical_name(text))


def _check_texts(rules: Sequence[_Rule]) -> None:
    """Raise an error if there is nothing to include, or a glob is missing or malformed."""
    if not any(not rule.excludes for rule in rules):
        texts = ["!" + rule.text for rule in rules]
        raise ValueError(f"params={texts} selects no parameter: start with what to include, as in ['weights', '!head.*']")
    for rule in rules:
        if not rule.glob:
            fix = f"write {rule.keyword!r}, or a glob after the colon" if rule.text else "write 'weights' or a glob"
            raise ValueError(f"params has {rule.text!r}, which names no parameter: {fix}")
        if rule.glob.startswith("!"):
            fix = repr([rule.keyword, rule.glob]) if not rule.excludes else f"a single '!' in {'!' + rule.text!r}"
            raise ValueError(f"params has {rule.text!r}: to exclude, write {fix}")


def _check_rules(module: nn.Module, rules: Sequence[_Rule], named: Sequence[NamedParameter]) -> None:
    _check_texts(rules)
    names = [p.name for p in named]
    for rule in rules:
        if names and not any(fnmatchcase(name, rule.glob) for name in names):
            text = f"{'!' * rule.excludes}{rule.text}"
            raise ValueError(f"params: no parameter has a name that matches {text!r}; {_hint(module, rule, text, names)}")


def _hint(module: nn.Module, rule: _Rule, text: str, names: Sequence[str]) -> str:
    """Suggest a fix for a rule whose glob matches nothing."""
    if text.startswith("["):
        return quoting_hint("weights")
    if _names_function(rule.text):
        return f"to select by a function, write its import path alone, as in params={rule.text!r}"
    if ":" in rule.text and rule.keyword == "all" and rule.text.partition(":")[0] not in KEYWORDS:
        return _keyword_hint(rule.text)
    if (without_spaces := re.sub(r"\s", "", text)) != text and "," not in text and "!" not in text[1:]:
        return f"write {without_spaces!r}, without spaces"
    separate = [part for part in re.split(r"[,\s]+", text) if part.strip("!")]
    if len(separate) > 1:
        return f"to name several, write a list: {separate}"
    submodules = {canonical_name(name): m for name, m in module.named_modules() if name}
    if rule.glob in submodules:
        return f"it is a module: write '{text}.*'"
    if any(class_name(m) == rule.glob for m in submodules.values()):
        return f"it is a class of modules: write params={_of_class(rule.glob)}"
    path = path_suggestion(rule.glob)
    function = f"to import a function, write {path!r}; " if path else ""
    return f"{function}close matches: {close_matches(rule.glob, [*names, *KEYWORDS], shown=names)}"


def _names_function(text: str) -> bool:
    """Return whether a string is the import path of a function rather than a keyword with a glob."""
    return is_function_path(text) and text.partition(":")[0] not in KEYWORDS


def _keyword_hint(text: str) -> str:
    """Suggest a replacement for a word before a colon that is not a keyword."""
    keyword, _, glob = text.partition(":")
    close = get_close_matches(keyword.lower(), KEYWORDS, n=1)
    fix = f"write {f'{close[0]}:{glob}'!r}" if close else f"the keywords are {', '.join(map(repr, KEYWORDS))}"
    return f"{keyword!r} is not a keyword: {fix}"


def _first_names(module: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Module]]:
    """Return every parameter with its module, by its first name."""
    first: dict[int, tuple[str, nn.Parameter, nn.Module]] = {}
    for name, parameter, owner in named_parameters(module):
        first.setdefault(id(parameter), (name, parameter, owner))
    return {name: (p, owner) for name, p, owner in first.values()}
