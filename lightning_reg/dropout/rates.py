"""A rate of dropout that compiled code reads without a recompilation, and how modules are made to read it.

A graph that was compiled before the fit does not see a hook that comes later: torch does not guard that there is none. It does
guard the classes of modules, so a module whose dropout is driven gets, for as long, a class of its own: a subclass of its
class, with the same name. Copies and pickles of it are of the plain class and have the module's own rate.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_reg.dropout.functions import alpha_dropout, dropout

if TYPE_CHECKING:
    from collections.abc import Callable

_STATE = "_driven_dropout"


class Rate:
    """A probability of dropout that may be changed at any time, in compiled code too.

    Args:
        p: The probability of a zero, in [0, 1].
        device: Where the forward pass runs; a rate elsewhere is right as well, but copied in every pass.

    Example:
        >>> rate = Rate(0.5)
        >>> rate.set(0.1)
        >>> rate.p
        0.1
    """

    def __init__(self, p: float, device: torch.device | str | None = None) -> None:
        self.number = p
        self.to(device)

    @property
    def p(self) -> float | Tensor:
        """The number, for torch's own kernels; in code that is being compiled the tensor, whose value is not in the graph."""
        return self.tensor if is_compiling() else self.number

    def set(self, p: float) -> None:
        """Change the probability."""
        self.number = p
        self.tensor.fill_(p)

    def to(self, device: torch.device | str | None) -> None:
        """Move the tensor to where the forward pass runs."""
        with torch.inference_mode(False):  # one that predictions have made could not be changed in a fit
            self.tensor = torch.tensor(self.number, dtype=torch.float32, device=device)


@dataclass
class _Driven:
    """What a module with a class of its own keeps: both classes, how many need the made one, and the rate that it reads."""

    plain: Any
    made: Any
    users: int = 0
    own: dict[str, float] = field(default_factory=dict)
    rate: Rate | None = None


def swap_class_(module: nn.Module, attribute: str | None = None, rate: Rate | None = None) -> None:
    """Give a module a class of its own, so that graphs compiled earlier are not used for it.

    Args:
        module: Any module; its forward pass stays what it is in eager code.
        attribute: Where it keeps the rate that is driven, if it does.
        rate: What a dropout module of torch's reads instead in compiled code.
    """
    state: _Driven | None = vars(module).get(_STATE)
    if state is None:
        plain: Any = type(module)
        state = _Driven(plain, _class_of_its_own(plain))
        setattr(module, _STATE, state)
        module.__class__ = state.made
    state.users += 1
    if attribute:
        state.own[attribute], state.rate = getattr(module, attribute), rate


def restore_class_(module: nn.Module, attribute: str | None = None) -> None:
    """Undo one :func:`swap_class_`: the rate is the module's own again, after the last one the class too."""
    state: _Driven | None = vars(module).get(_STATE)
    if state is None:  # the fit failed before it was driven
        return
    state.users -= 1
    if attribute:
        setattr(module, attribute, state.own.pop(attribute))
        state.rate = None
    if not state.users:
        delattr(module, _STATE)
        if type(module) is state.made:  # nobody has changed it since
            module.__class__ = state.plain


def reads_tensor(module: nn.Module) -> bool:
    """Return whether compiled code reads the driven rate of a module from a tensor, so that no value is part of its graph."""
    state: _Driven | None = vars(module).get(_STATE)
    return state is not None and state.plain.forward in _COMPILED


@lru_cache(maxsize=256)  # the same class each time, so that a second fit finds the graph of the first
def _class_of_its_own(plain: Any) -> Any:
    body: dict[str, Any] = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
    body["__reduce_ex__"] = _reduce_to_plain
    if plain.forward in _COMPILED:
        body["forward"] = _forward_of(plain)
    made = type(plain)(plain.__name__, (nn.Module,), body)
    made.__bases__ = (plain,)  # only now: a base that keeps a register of its subclasses need not hear of this one
    return made


def _forward_of(plain: Any) -> Callable[[Any, Tensor], Tensor]:
    """Return a forward pass that is the plain one in eager code, and in compiled code reads the rate from a tensor."""
    drop, eager = _COMPILED[plain.forward], plain.forward

    def forward(self: Any, input: Tensor) -> Any:  # noqa: A002  torch calls it so
        if not is_compiling() or not self.training:
            return eager(self, input)
        state: _Driven | None = vars(self).get(_STATE)
        if state is None or state.rate is None:
            return eager(self, input)
        dropped = drop(input, state.rate.p)
        return input.copy_(dropped) if self.inplace else dropped

    return forward


def _reduce_to_plain(self: Any, protocol: Any) -> Any:
    """Copy and pickle as the plain module with its own rate."""
    reduced: Any = super(type(self), self).__reduce_ex__(protocol)
    state: _Driven | None = vars(self).get(_STATE)
    if state is None or len(reduced) < 3 or not isinstance(reduced[2], dict):  # a class that says itself how it is copied
        return reduced
    kept = {**{key: value for key, value in reduced[2].items() if key != _STATE}, **state.own}
    return copyreg._reconstructor, (state.plain, object, None), kept  # type: ignore[attr-defined]


def _drop_channels(x: Tensor, p: float | Tensor, batched: int) -> Tensor:
    """Drop channels of a batch, or of a single sample, which has a dimension less."""
    return dropout(x, p, channelwise=True) if x.ndim >= batched else dropout(x.unsqueeze(0), p, channelwise=True).squeeze(0)


_Drop: TypeAlias = "Callable[[Tensor, float | Tensor], Tensor]"
# by the forward pass, not by the class: a subclass that has one of its own drops in its own way
_COMPILED: dict[Any, _Drop] = {
    nn.Dropout.forward: dropout,
    nn.Dropout1d.forward: lambda x, p: _drop_channels(x, p, 3),
    nn.Dropout2d.forward: lambda x, p: dropout(x, p, channelwise=True),  # torch takes the first dimension for the batch
    nn.Dropout3d.forward: lambda x, p: _drop_channels(x, p, 5),
    nn.AlphaDropout.forward: alpha_dropout,
    nn.FeatureAlphaDropout.forward: lambda x, p: alpha_dropout(x, p, channelwise=True),
}
