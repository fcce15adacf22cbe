"""Dropout: put into a finished model by rule, and with a rate that changes over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop_elements
from torch.nn.modules.dropout import _DropoutNd

from lightning_reg.base import Phase
from lightning_reg.configuration import PROBABILITY
from lightning_reg.modules import ForwardHook, ModuleRegularizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lightning_reg.schedules import Value

__all__ = ["DropoutInjection", "DropoutScheduler", "dropout", "inject_dropout", "set_dropout_"]


def dropout(x: Tensor, p: float, channelwise: bool = False) -> Tensor:
    r"""Inverted dropout: :math:`y_i = x_i\,m_i / (1 - p)` with :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`.

    The expectation is x, so nothing needs to be rescaled when dropout is off.

    Args:
        x: Any shape; with ``channelwise`` a batch with channels in dimension 1.
        p: The probability of a zero, in [0, 1].
        channelwise: Whether whole channels are dropped, one draw for each of them.

    Returns:
        A tensor of the shape of ``x``; ``x`` itself where p is 0.

    Example:
        >>> kept = dropout(torch.ones(1000), 0.5)
        >>> sorted(set(kept.tolist())), 400 < kept.count_nonzero() < 600
        ([0.0, 2.0], tensor(True))

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; channels: J. Tompson
        et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """
    if p == 0:
        return x
    return torch.feature_dropout(x, p, True) if channelwise else drop_elements(x, p, training=True)


def inject_dropout(
    modules: Mapping[str, nn.Module], rate: Callable[[], float], channelwise: bool = False
) -> list[RemovableHandle]:
    """Drop parts of the outputs of modules while these are in training mode, through forward hooks: no key is renamed.

    Args:
        modules: The modules, by a name for error messages.
        rate: Asked for p in every forward pass.
        channelwise: Whether whole channels are dropped.

    Returns:
        Handles whose ``remove()`` takes the dropout out again.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> handles = inject_dropout({"layer": layer}, rate=lambda: 1.0)
        >>> layer(torch.ones(2, 4)).count_nonzero().item(), layer.eval()(torch.ones(2, 4)).count_nonzero().item()
        (0, 16)
    """

    def hook_of(name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not module.training:
                return None
            _check_output(name, module, output, channelwise)
            return dropout(output, rate(), channelwise)

        return ForwardHook(hook)

    return [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]


def set_dropout_(modules: Iterable[nn.Module], p: float) -> None:
    """Set the rate of dropout modules.

    Args:
        modules: Modules with an attribute ``p``, such as :class:`torch.nn.Dropout`.
        p: The probability of a zero, in [0, 1].

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> set_dropout_([layer], 0.1)
        >>> layer
        Dropout(p=0.1, inplace=False)
    """
    for module in modules:
        module.p = p  # type: ignore[assignment]


class DropoutInjection(ModuleRegularizer):
    r"""Put dropout behind modules of a finished model: :math:`y_i = x_i\,m_i / (1 - p)`.

    Here :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`, drawn anew for every entry or channel.

    Runs in: the forward pass of each matched module while it is in training mode; the rate is set in ``on_train_batch_start``.

    A forward hook does it, so no state-dict key is renamed, and it is gone after the fit: a checkpoint taken under it loads
    into the plain model. Each rank draws its own masks from torch's global generator.

    Args:
        p: The probability of a zero, in [0, 1], or a schedule.
        after: Name globs (``"encoder.layers.*"``) or class names (``"ReLU"``) of modules that return one float tensor.
        channelwise: Whether whole channels (dimension 1) are dropped.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For p outside [0, 1], or an ``after`` that matches nothing.
        TypeError: In the first forward pass, for a module that returns something else than a float tensor.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DropoutInjection(0.2, after="ReLU")], logger=False)

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
    """

    phase = Phase.DROPOUT
    limits = {"p": PROBABILITY}
    instead_of_deepspeed = None
    selector = "after"
    effect = "drop anything"

    def __init__(self, p: Value, *, after: str | list[str], channelwise: bool = False, name: str | None = None) -> None:
        if not after:
            raise ValueError("DropoutInjection: after must name modules or classes, as in after=['ReLU'], got nothing")
        self.p = p
        self.after = after
        self.channelwise = channelwise
        super().__init__(name)
        self._handles: list[RemovableHandle] = []

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules behind which it drops."""
        return self.matching(pl_module, self.after)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks."""
        super().attach(trainer, pl_module)
        self._handles = inject_dropout(self.modules_found, lambda: self.current["p"], self.channelwise)

    def detach(self) -> None:
        """Remove the hooks."""
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class DropoutScheduler(ModuleRegularizer):
    """Drive the rate of the dropout modules that a model has.

    Runs in: ``on_train_batch_start``, whenever the scheduled value has changed.

    It drives ``nn.Dropout``, its variants for channels, and ``nn.AlphaDropout``; their own rates come back after the fit.
    Early dropout is ``Steps([p, 0.0], at=["10ep"])``, late dropout ``Steps([0.0, p], at=["10ep"])``.

    Args:
        p: The probability of a zero, in [0, 1], or a schedule.
        modules: Globs on the names of dropout modules, or class names; ``"*"`` for all of them.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For p outside [0, 1], or a model without such modules.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_reg import Linear
        >>> trainer = Trainer(callbacks=[DropoutScheduler(Linear(0.0, 0.5, until=0.3))], logger=False)

    Reference:
        Z. Liu et al., "Dropout Reduces Underfitting", 2023; P. Morerio et al., "Curriculum Dropout", 2017.
    """

    phase = Phase.DROPOUT
    limits = {"p": PROBABILITY}
    instead_of_deepspeed = None
    selector = "modules"
    effect = "drop anything"

    def __init__(self, p: Value, *, modules: str | list[str] = "*", name: str | None = None) -> None:
        self.p = p
        self.modules = modules
        super().__init__(name)
        self._own_rates: dict[nn.Module, float] = {}

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the dropout modules that it drives."""
        matched = self.matching(pl_module, self.modules)
        found: dict[str, nn.Module] = {name: module for name, module in matched.items() if isinstance(module, _DropoutNd)}
        if not found:
            raise ValueError(
                f"DropoutScheduler: no dropout module matches {self.modules!r}; to put dropout into a model that has none, use "
                "DropoutInjection"
            )
        return found

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the modules' own rates."""
        super().attach(trainer, pl_module)
        self._own_rates = {module: module.p for module in self.modules_found.values()}  # type: ignore[misc]

    def values_changed(self) -> None:
        """Set the rate."""
        set_dropout_(self.modules_found.values(), self.current["p"])

    def detach(self) -> None:
        """Give the modules their own rates back."""
        super().detach()
        for module, p in self._own_rates.items():
            set_dropout_([module], p)
        self._own_rates.clear()


def _check_output(name: str, module: nn.Module, output: Any, channelwise: bool) -> None:
    what = f"dropout cannot follow {name!r} ({type(module).__name__})"
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"{what}: it returns {type(output).__name__}, expected one float tensor; name a module inside it")
    if not output.is_floating_point():
        raise TypeError(f"{what}: it returns a tensor of {output.dtype}, expected a float tensor")
    if channelwise and output.ndim < 2:
        raise TypeError(f"{what}: channels are in dimension 1, but its output has shape {tuple(output.shape)}")
