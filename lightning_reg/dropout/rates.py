"""Dropout rates that change without recompiling, and the subclasses through which modules read them.

A graph that was compiled before the fit ignores forward hooks that are registered later, because torch does not guard on them.
But torch does guard on the classes of modules. So while the dropout of a module is scheduled or injected, its class is replaced
by a subclass with the same name, and torch compiles a new graph. Copies and pickles of the module have the original class and
the original rate.
"""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn import functional as F  # noqa: N812 - torch.jit.script looks for it here

from lightning_reg._engine.arguments import PROBABILITY
from lightning_reg._engine.modules import ForwardHook
from lightning_reg.dropout.functions import alpha_dropout, dropout

if TYPE_CHECKING:
    from collections.abc import Callable

_STATE = "_swapped_class"  # the attribute of a module with a swapped class that holds its state
_KNOWS_EXPORTS = torch.__version__ >= "2.12"  # before, is_exporting() is also true under torch.compile


class Rate:
    """A dropout rate that can be changed at any time, in compiled code too.

    Args:
        p: The probability of dropping an entry, in [0, 1].
        device: The device of the forward pass. A rate on another device also works, but every pass copies it.

    Example:
        >>> rate = Rate(0.5)
        >>> rate.set(0.1)
        >>> rate.p
        0.1
    """

    def __init__(self, p: float, device: torch.device | str | None = None) -> None:
        self.number = PROBABILITY.check("Rate: p", p)
        self.to(device)

    @property
    def p(self) -> float | Tensor:
        """A number for torch's own kernels, or in compiled code a tensor, so that the value is not part of the graph."""
        return self.tensor if _reads_tensors() else self.number

    def set(self, p: float) -> None:
        """Change the probability."""
        self.number = p
        self.tensor.fill_(p)

    def to(self, device: torch.device | str | None) -> None:
        """Move the tensor to the device of the forward pass."""
        with torch.inference_mode(False):  # a tensor made during predictions could not be changed in a fit
            self.tensor = torch.tensor(self.number, dtype=torch.float32, device=device)


@dataclass
class _SwappedClass:
    """The state of a module whose class has been replaced by a subclass.

    Args:
        original: The original class.
        subclass: Its subclass.
        users: The number of callers that need the subclass.
        original_rates: The original rates, by attribute.
        rate: The rate that compiled code reads.
    """

    original: Any
    subclass: Any
    users: int = 0
    original_rates: dict[str, float] = field(default_factory=dict)
    rate: Rate | None = None


def swap_class_(module: nn.Module, attribute: str | None = None, rate: Rate | None = None) -> None:
    """Replace the class of a module by a subclass, so that torch does not use graphs that were compiled earlier.

    Args:
        module: Any module. In eager code, its forward pass stays the same.
        attribute: The attribute that holds the scheduled rate, if there is one.
        rate: The rate that compiled code reads instead, if the module is one of torch's dropout modules.
    """
    state: _SwappedClass | None = vars(module).get(_STATE)
    if state is None:
        original: Any = type(module)
        state = _SwappedClass(original, _subclass_of(original))
        setattr(module, _STATE, state)
        module.__class__ = state.subclass
    state.users += 1
    if attribute:
        state.original_rates[attribute], state.rate = getattr(module, attribute), rate


def restore_class_(module: nn.Module, attribute: str | None = None) -> None:
    """Undo one ``swap_class_``: restore the rate, and after the last one, the class too."""
    state: _SwappedClass | None = vars(module).get(_STATE)
    if state is None:  # the fit failed before the class was swapped
        return
    state.users -= 1
    if attribute:
        setattr(module, attribute, state.original_rates.pop(attribute))
        state.rate = None
    if not state.users:
        delattr(module, _STATE)
        if type(module) is state.subclass:  # no one else has changed the class since
            module.__class__ = state.original


def reads_tensor(module: nn.Module) -> bool:
    """Return whether compiled code reads the scheduled rate of a module from a tensor, so that all values share one graph."""
    state: _SwappedClass | None = vars(module).get(_STATE)
    return state is not None and state.original.forward in _COMPILED


@lru_cache(maxsize=256)  # the same subclass each time, so that a second fit reuses the graph of the first
def _subclass_of(original: Any) -> Any:
    body: dict[str, Any] = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    body["__reduce_ex__"] = _reduce_as_original
    if original.forward in _COMPILED:
        body["forward"] = _forward_of(original)
    subclass = type(original)(original.__name__, (nn.Module,), body)
    try:
        subclass.__bases__ = (original,)  # set afterward, so that a class that registers its subclasses does not see it
    except TypeError:  # not for a class with another base before nn.Module, as in class Cell(ABC, nn.LSTM)
        subclass = type(original)(original.__name__, (original,), body)
    return subclass


def _forward_of(original: Any) -> Callable[[Any, Tensor], Tensor]:
    """Return a forward pass that reads the rate from a tensor in compiled code, and is the original one in eager code."""
    drop, eager = _COMPILED[original.forward], original.forward

    @wraps(eager)  # torch.jit.script reads the source code of the original
    def forward(self: Any, input: Tensor) -> Any:  # noqa: A002  the name in torch
        if not _reads_tensors() or not self.training:
            return eager(self, input)
        state: _SwappedClass | None = vars(self).get(_STATE)
        if state is None or state.rate is None:
            return eager(self, input)
        dropped = drop(input, state.rate.p)
        return input.copy_(dropped) if self.inplace else dropped

    return forward


def _reduce_as_original(self: Any, protocol: Any) -> Any:
    """Copy or pickle a module with its original class and rates, and without this package's hooks."""
    reduced: Any = super(type(self), self).__reduce_ex__(protocol)
    state: _SwappedClass | None = vars(self).get(_STATE)
    if state is None or len(reduced) < 3 or not isinstance(reduced[2], dict):  # the class defines how it is copied
        return reduced
    attributes = {key: value for key, value in reduced[2].items() if key != _STATE}
    if hooks := attributes.get("_forward_hooks"):
        attributes["_forward_hooks"] = OrderedDict((k, hook) for k, hook in hooks.items() if not isinstance(hook, ForwardHook))
    attributes.update(state.original_rates)
    return copyreg._reconstructor, (state.original, object, None), attributes  # type: ignore[attr-defined]


def _reads_tensors() -> bool:
    """Return whether compiled code must also run at other rates. An exported program keeps the rate of its export."""
    return is_compiling() and not (is_exporting() if _KNOWS_EXPORTS else torch.compiler._is_exporting_flag)


def _drop_channels(x: Tensor, p: float | Tensor, batch_ndim: int) -> Tensor:
    """Drop channels of a batch, or of a single sample, as torch does."""
    return dropout(x, p, channelwise=True) if x.ndim == batch_ndim else dropout(x.unsqueeze(0), p, channelwise=True).squeeze(0)


_Drop: TypeAlias = "Callable[[Tensor, float | Tensor], Tensor]"
# Keyed by forward pass, not by class: a subclass that overrides the forward pass drops in its own way.
_COMPILED: dict[Any, _Drop] = {
    nn.Dropout.forward: dropout,
    # Out of training mode, torch's functions only check the number of dimensions.
    nn.Dropout1d.forward: lambda x, p: _drop_channels(F.dropout1d(x, 0.0, training=False), p, 3),
    nn.Dropout2d.forward: lambda x, p: dropout(F.dropout2d(x, 0.0, training=False), p, channelwise=True),  # always a batch
    nn.Dropout3d.forward: lambda x, p: _drop_channels(F.dropout3d(x, 0.0, training=False), p, 5),
    nn.AlphaDropout.forward: alpha_dropout,
    nn.FeatureAlphaDropout.forward: lambda x, p: alpha_dropout(x, p, channelwise=True),
}
