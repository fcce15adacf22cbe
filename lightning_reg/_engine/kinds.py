"""What a parameter is: a weight, a bias, a parameter of a normalization layer, an embedding, or none of these.

For known modules (``WEIGHT_LAYERS``), the type decides. For other modules, the name and the dimensions do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_reg._engine.computed import Computed, computed_tensors
from lightning_reg._engine.names import canonical_name
from lightning_reg._tensors.layers import check_layers, layer_units

KEYWORDS = ("weights", "all", "biases", "norms", "embeddings")
"""The kinds of parameters that ``params`` can name."""

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORM_CLASS = re.compile(r"Norm(\d+d)?$|RevIN")  # reversible instance normalization, in forecasting models
_NORM_PART = re.compile(r"[Nn]orm(?![a-z])|[Nn]ormalization")  # RMSNormGated, but not NormalizedLinear
_SCALE_PART = re.compile(r"Scale(?![a-z])")
_BIAS = re.compile(r"(^|_)bias($|_)|^b$")
_LAYER_WEIGHT = re.compile(r"(^|_)(weight|kernel)($|_)")
_WEIGHT = re.compile(r"(^|_)weight$|^kernel$")
_POSITION = r"(^|_)pos|(pos|position|positional)_(emb|embed|embedding|enc|encoding)s?"
_EMBEDDING = re.compile(rf"(tokens?|{_POSITION})$")
_SCALE = re.compile(r"(relative_position_bias_table|scale|gamma|alpha|temperature|A_log|dt_bias|(^|_)D)$")


class NamedParameter(NamedTuple):
    """A parameter under one of its names.

    Args:
        name: The qualified name, without the parts that wrappers insert.
        parameter: The parameter.
        owner: The module that it belongs to under this name.
        kinds: The keywords that select it.
        reason: Why it is not a weight, or an empty string if it is one.
        computed: The tensor that is computed from it, if any.
    """

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    kinds: frozenset[str]
    reason: str
    computed: Computed | None = None


def named_kinds(module: nn.Module, effective: bool = False) -> list[NamedParameter]:
    """Return every name of every parameter, with its kinds.

    Args:
        module: The module that has the parameters.
        effective: Use the names and kinds of the tensors that are computed from parameters. Otherwise, such parameters are not
            weights, except under a mask.

    Example:
        >>> [(p.name, p.reason) for p in named_kinds(nn.Linear(2, 1))]
        [('weight', ''), ('bias', 'biases')]
    """
    check_layers()
    exempt, computed = _exempt(module), computed_tensors(module)
    found = []
    for name, p, owner in named_parameters(module):
        tensor = computed.get(id(p))
        kinds, reason = _judged(tensor.name if tensor else name, p, tensor.owner if tensor else owner, id(p) in exempt)
        if tensor and not (effective or tensor.is_masked or reason):
            kinds, reason = kinds - {"weights"}, "parametrized"
        found.append(NamedParameter(tensor.name if tensor and effective else name, p, owner, kinds, reason, tensor))
    return found


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield every name of every parameter, with the parameter and the module that it belongs to under this name."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield canonical_name(f"{prefix}.{name}" if prefix else name), parameter, owner


def _judged(name: str, p: nn.Parameter, owner: nn.Module, is_exempt: bool) -> tuple[frozenset[str], str]:
    """Return the keywords that select a parameter, and why it is not a weight."""
    own_name = _own_name(name)
    reason = "no_weight_decay()" if is_exempt else why_no_weight(own_name, p, owner)
    holds = {
        "all": True,
        "weights": not reason,
        "biases": _BIAS.search(own_name),
        "norms": _is_norm(p, owner),
        "embeddings": isinstance(owner, _EMBEDDINGS) or _EMBEDDING.search(own_name),
    }
    return frozenset(keyword for keyword in KEYWORDS if holds[keyword]), reason


def why_no_weight(name: str, p: nn.Parameter, owner: nn.Module) -> str:
    """Return why a parameter is not a weight, or an empty string if it is one.

    Args:
        name: Its name in the module that it belongs to.
        p: The parameter.
        owner: The module that it belongs to.

    Example:
        >>> layer = nn.Linear(16, 1)
        >>> why_no_weight("weight", layer.weight, layer), why_no_weight("bias", layer.bias, layer)
        ('', 'biases')
        >>> why_no_weight("cls_token", nn.Parameter(layer.weight), nn.Module())
        'position embeddings and tokens'
    """
    is_known = layer_units(owner) is not None
    if _BIAS.search(name):
        return "biases"
    if _is_norm(p, owner):
        return "normalization"
    if is_known and _LAYER_WEIGHT.search(name):
        return ""
    if _EMBEDDING.search(name):
        return "position embeddings and tokens"
    is_vector = _is_vector(p)
    if _SCALE.search(name) or (is_vector and _has_name(owner, _SCALE_PART)):
        return "scales"
    if isinstance(owner, nn.PReLU):
        return "slopes"
    is_weight = _WEIGHT.search(name) or not is_vector or (is_known and p.ndim >= 2)
    return "" if is_weight else "vectors"


def _is_norm(p: nn.Parameter, owner: nn.Module) -> bool:
    if isinstance(owner, _NORMS):
        return True
    if layer_units(owner) is not None:
        return False
    return _has_name(owner, _NORM_CLASS) or (_is_vector(p) and _has_name(owner, _NORM_PART))


def _has_name(owner: nn.Module, pattern: re.Pattern[str]) -> bool:
    """Return whether the name of a module's class, or of a parent, matches a pattern."""
    return any(pattern.search(cls.__name__) for cls in type(owner).__mro__)


def _is_vector(p: nn.Parameter) -> bool:
    """Return whether at most one dimension of a parameter is known to be larger than 1."""
    return not is_lazy(p) and sum(size > 1 for size in p.shape) < 2


def _own_name(name: str) -> str:
    """Return a parameter's name in its module, or the name of its list: ``tokens`` for ``encoder.tokens.0``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name


def _exempt(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that a module's ``no_weight_decay()`` names, relative to the module, as in timm."""
    exempt: set[int] = set()
    for owner in module.modules():
        named = getattr(owner, "no_weight_decay", None)
        patterns = named() if callable(named) else named
        if not isinstance(patterns, Iterable) or isinstance(patterns, str):
            continue
        globs = [canonical_name(pattern) for pattern in patterns]
        names = owner.named_parameters(remove_duplicate=False)
        exempt |= {id(p) for name, p in names if any(fnmatchcase(canonical_name(name), glob) for glob in globs)}
    return exempt
