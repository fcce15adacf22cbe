"""Known layers: modules whose parameters are weights regardless of shape, and the location of their output units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_reg._engine.arguments import check_module
from lightning_reg._tensors.units import Units

Layout: TypeAlias = Units | Callable[[Any], Units]
"""The location of a layer's output units, or a function of the module that returns it."""

WEIGHT_LAYERS: dict[type[nn.Module] | str, Layout] = {
    nn.Linear: Units(),
    nn.Bilinear: Units(),
    nn.modules.conv._ConvNd: Units(),
    nn.modules.conv._ConvTransposeNd: lambda module: Units(1, module.groups),  # the weight has shape (in, out / groups, …)
    nn.RNNBase: Units(),
    nn.RNNCellBase: Units(),
    nn.MultiheadAttention: Units(),
    nn.Embedding: Units(),
    nn.EmbeddingBag: Units(),
    # Hugging Face's linear layer of GPT-2, whose weight has shape (in, out); others use the name for a convolution
    "Conv1D": lambda module: Units() if isinstance(module, nn.modules.conv._ConvNd) else Units(1),
}
"""Layers whose parameters are weights regardless of shape, by class or class name, each with its output units.

An entry also covers subclasses. Add your own layers here. ``Units(1)`` from ``lightning_reg.functional`` is for a weight of
shape (in, out), as in ``WEIGHT_LAYERS["TransposedLinear"] = Units(1)``.
"""


def layer_units(module: nn.Module) -> Units | None:
    """Return where the weights of a known layer have their output units, or ``None`` for any other module.

    The entry of the closest class applies.

    Args:
        module: The module.

    Raises:
        TypeError: If its entry in ``WEIGHT_LAYERS`` is neither ``Units`` nor a function that returns them.

    Example:
        >>> layer_units(nn.ConvTranspose2d(4, 6, 3, groups=2)), layer_units(nn.ReLU())
        (Units(dim=1, groups=2), None)
    """
    for cls in type(module).__mro__:
        key = next((key for key in (cls, cls.__name__) if key in WEIGHT_LAYERS), None)
        if key is not None:
            layout = WEIGHT_LAYERS[key]
            units = layout(module) if callable(layout) else layout
            if not isinstance(units, Units):
                raise TypeError(
                    f"WEIGHT_LAYERS[{_shown(key)}] must be Units, or a function (module) -> Units, such as Units(1) for a "
                    f"weight of shape (in, out), got {units!r}"
                )
            return units
    return None


def units_of(module: nn.Module) -> Units:
    """Return where a module's weight has its output units: in dimension 0 unless ``WEIGHT_LAYERS`` says otherwise.

    Args:
        module: The module that owns the weight.

    Example:
        >>> units_of(nn.Linear(2, 3)), units_of(nn.ConvTranspose2d(4, 6, 3, groups=2))
        (Units(dim=0, groups=1), Units(dim=1, groups=2))
    """
    check_module("units_of", module)
    return layer_units(module) or Units()


def checked_units(name: str, p: Tensor, owner: nn.Module) -> Units:
    """Return where a parameter has its output units.

    Raises:
        ValueError: If the parameter does not have the dimension that ``WEIGHT_LAYERS`` says.
    """
    units = units_of(owner)
    if not is_lazy(p) and 2 <= p.ndim <= units.dim:
        raise ValueError(
            f"WEIGHT_LAYERS says that the output units of {type(owner).__name__} are in dimension {units.dim}, but {name!r} "
            f"has shape {tuple(p.shape)}"
        )
    return units


def padding_rows(module: nn.Module) -> dict[int, int]:
    """Return the rows of embeddings that never get a gradient (``padding_idx``), by the ``id`` of the weight.

    A weight that other modules share may get gradients there, so it has no such row.

    Args:
        module: The model.

    Example:
        >>> embedding = nn.Embedding(4, 2, padding_idx=3)
        >>> padding_rows(embedding) == {id(embedding.weight): 3}
        True
    """
    found: dict[int, set[int | None]] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                is_table = isinstance(owner, nn.Embedding | nn.EmbeddingBag) and name == "weight"
                found.setdefault(id(p), set()).add(owner.padding_idx if is_table else None)  # type: ignore[arg-type]
    return {key: row for key, rows in found.items() if len(rows) == 1 and (row := next(iter(rows))) is not None}


def check_layers() -> None:
    """Raise an error for an invalid key in ``WEIGHT_LAYERS``.

    Raises:
        TypeError: If a key is neither a class of modules nor the name of one.
    """
    for key in WEIGHT_LAYERS:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(
                f"WEIGHT_LAYERS: each key must be a class of modules or its name, such as 'Conv1D', got {key!r:.80}"
            )


def _shown(key: type[nn.Module] | str) -> str:
    return repr(key) if isinstance(key, str) else key.__name__
