"""Which parameters are pruned together: all that are selected, or those that each pattern of a mapping matches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_reg._engine.arguments import readable, text_keys
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.selection import check_params, selection_mask

if TYPE_CHECKING:
    from torch import nn

    from lightning_reg._engine.selection import Params
    from lightning_reg.schedules import Value, Values


def check_mapping(what: str, values: Values) -> None:
    """Check the patterns of a mapping, as far as that can be done without a module.

    Raises:
        ValueError: If there are none, or one is malformed.
        TypeError: If one is not a string.
    """
    if not isinstance(values, Mapping):
        return
    if not values:
        raise ValueError(f"{what}: sparsity must have at least one pattern, as in sparsity={{'encoder.*': 0.9}}, got {{}}")
    for pattern in text_keys(values):
        check_params(f"{what}: the keys of sparsity", pattern)


def keyed(values: Values) -> dict[str, Value]:
    """Return the values of a mapping, or the only value, under the keys of ``WeightPruning.current``.

    Example:
        >>> keyed(0.5), keyed({"encoder.*": 0.9})
        ({'sparsity': 0.5}, {'sparsity/encoder.*': 0.9})
    """
    if isinstance(values, Mapping):
        return {f"sparsity/{pattern}": value for pattern, value in text_keys(values).items()}
    return {"sparsity": values}


def assign(module: nn.Module, params: Params, values: Values) -> dict[str, str]:
    """Return the key of the value that applies to each selected parameter, by name.

    Args:
        module: The module.
        params: Which parameters are selected.
        values: A value for all of them, or one for each pattern.

    Returns:
        The keys as in ``keyed``. A parameter that matches no pattern is left out.

    Raises:
        ValueError: If a pattern matches nothing, or nothing that is selected, or two patterns match the same parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> assign(model, "weights", {"0.*": 0.9, "1.*": 0.5})
        {'0.weight': 'sparsity/0.*', '1.weight': 'sparsity/1.*'}
    """
    selected = [name for name, chosen in selection_mask(module, params).items() if chosen]
    if not isinstance(values, Mapping):
        return dict.fromkeys(selected, "sparsity")
    keys: dict[str, str] = {}
    for pattern in values:
        matching = [name for name, chosen in selection_mask(module, pattern).items() if chosen]
        _check_selected(pattern, matching, selected, params)
        for name in (name for name in matching if name in selected):
            if name in keys:
                raise ValueError(
                    f"two patterns of sparsity match {name!r}: {keys[name].removeprefix('sparsity/')!r} and {pattern!r}; use "
                    "patterns that do not overlap"
                )
            keys[name] = f"sparsity/{pattern}"
    return {name: keys[name] for name in selected if name in keys}


def _check_selected(pattern: str, matching: list[str], selected: list[str], params: Params) -> None:
    if matching and not set(matching) & set(selected):
        raise ValueError(
            f"the pattern {pattern!r} of sparsity matches only parameters that params={readable(params)} leaves out: "
            f"{abbreviate(matching)}"
        )
