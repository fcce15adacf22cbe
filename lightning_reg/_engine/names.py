"""User-facing names of modules and parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class. If sharding or a parametrization has subclassed it, the name of the original class.

    Example:
        >>> from torch import nn
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


def counted(count: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(0, "tensor"), counted(1, "tensor"), counted(1200, "tensor")
        ('0 tensors', '1 tensor', '1,200 tensors')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def abbreviate(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names of a list, and give the number of the rest.

    Example:
        >>> abbreviate(list("abcdefg"))
        'a, b, c and 4 more'
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
