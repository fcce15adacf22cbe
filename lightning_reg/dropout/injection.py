"""Dropout put into a finished model by rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_reg._engine.arguments import PROBABILITY
from lightning_reg._engine.modules import ForwardHook, ModuleRegularizer
from lightning_reg._engine.technique import Phase
from lightning_reg.dropout.functions import dropout
from lightning_reg.dropout.rates import Rate, restore_class_, swap_class_
from lightning_reg.dropout.sites import abbreviate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lightning_reg._engine.regularizer import Regularizer
    from lightning_reg.schedules import Value

_OUTPUT_FIRST = (nn.RNNBase, nn.MultiheadAttention)  # they return their output and something else


class InjectedDropout:
    """Dropout behind a module, through a forward hook.

    Args:
        name: The module's qualified name.
        module: The module.
        rate: The rate that it reads in every forward pass.
        channelwise: Whether whole channels are dropped.
        samplewise: Whether whole samples are dropped.
        always: Whether it drops in eval mode too.
    """

    kind = "DropoutInjection"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rate: Rate,
        channelwise: bool = False,
        samplewise: bool = False,
        always: bool = False,
    ) -> None:
        self.name, self.module, self.rate = name, module, rate
        self.channelwise, self.samplewise, self.always = channelwise, samplewise, always
        self._own = rate
        self._handle: RemovableHandle | None = None

    @property
    def own(self) -> float:
        """The rate that it was injected with."""
        return self._own.number

    @property
    def key(self) -> tuple[int, str]:
        """What tells it apart from every other site."""
        return id(self.module), f"injected {id(self._own)}"

    def take(self, rate: Rate) -> None:
        """Read another rate than its own."""
        self.rate = rate

    def set(self, p: float) -> None:
        """Nothing: it reads the rate itself."""

    def release(self) -> None:
        """Read its own rate again."""
        self.rate = self._own

    def insert(self) -> None:
        """Put the dropout in, behind the hooks that the module has."""
        self._handle = self.module.register_forward_hook(ForwardHook(self._drop))
        swap_class_(self.module)  # for graphs that were compiled without the hook

    def remove(self) -> None:
        """Take the dropout out again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            restore_class_(self.module)

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (module.training or self.always):
            return None
        if isinstance(module, _OUTPUT_FIRST) and isinstance(output, tuple):
            return (self._dropped(output[0]), *output[1:])
        return self._dropped(output)

    def _dropped(self, output: Any) -> Tensor:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or (self.channelwise and output.ndim < 2):
            raise TypeError(self._misfit(output))
        return dropout(output, self.rate.p, self.channelwise, self.samplewise)

    def _misfit(self, output: Any) -> str:
        what = f"dropout cannot follow {self.name!r} ({type(self.module).__name__})"
        if not isinstance(output, torch.Tensor):
            return f"{what}: it returns {type(output).__name__}, expected one float tensor; name a module inside it"
        if not output.is_floating_point():
            return f"{what}: it returns a tensor of {output.dtype}, expected a float tensor"
        return f"{what}: channels are in dimension 1, but its output has shape {tuple(output.shape)}"


def inject_dropout(
    modules: Mapping[str, nn.Module],
    rate: float | Rate,
    channelwise: bool = False,
    samplewise: bool = False,
    always: bool = False,
) -> list[InjectedDropout]:
    """Drop parts of the outputs of modules while these are in training mode, through forward hooks: no key is renamed.

    It also works in a model that has been compiled, and run, before. Of what an RNN or ``nn.MultiheadAttention`` returns, the
    output is dropped, not the states or the attention weights.

    Args:
        modules: The modules, by a name for error messages.
        rate: The probability of a zero, in [0, 1], or a :class:`Rate` that may be changed later.
        channelwise: Whether whole channels (dimension 1) are dropped.
        samplewise: Whether whole samples (dimension 0) are dropped.
        always: Whether to drop in eval mode too.

    Returns:
        What was injected; ``remove()`` takes it out again.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> (injected,) = inject_dropout({"layer": layer}, rate=1.0)
        >>> layer(torch.ones(2, 4)).count_nonzero().item(), layer.eval()(torch.ones(2, 4)).count_nonzero().item()
        (0, 16)
    """
    shared = rate if isinstance(rate, Rate) else Rate(rate)
    injected = [InjectedDropout(name, module, shared, channelwise, samplewise, always) for name, module in modules.items()]
    for site in injected:
        site.insert()
    return injected


class DropoutInjection(ModuleRegularizer):
    r"""Put dropout behind modules of a finished model: :math:`y_i = x_i\,m_i / (1 - p)`.

    Here :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`, drawn anew for every entry, channel or sample.

    Runs in: the forward pass of each matched module while it is in training mode; the rate is set in ``on_train_batch_start``.

    A forward hook does it, so no state-dict key is renamed, and it is gone after the fit: a checkpoint taken under it loads
    into the plain model. Under ``torch.compile`` all values of p share one graph. Of what an RNN or ``nn.MultiheadAttention``
    returns, the output is dropped. Masks are drawn from torch's global generator, as those of ``nn.Dropout`` are: ranks that
    were seeded alike (``seed_everything`` does so) draw the same ones, each for its own samples.

    Behind the branch of a residual block ``samplewise=True`` is stochastic depth.

    Args:
        p: The probability of a zero, in [0, 1], or a schedule.
        after: Name globs (``"encoder.layers.?"``; ``*`` matches dots too) or class names (``"ReLU"``) of modules that return
            one float tensor.
        channelwise: Whether whole channels (dimension 1) are dropped.
        samplewise: Whether whole samples (dimension 0) are dropped.
        name: What metrics and the checkpoint call it.

    Raises:
        ValueError: For p outside [0, 1], an ``after`` that matches nothing, or both ``channelwise`` and ``samplewise``.
        TypeError: In the first forward pass, for a module that returns something else than a float tensor.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DropoutInjection(0.2, after="ReLU")], logger=False)

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; samples: G. Huang et
        al., "Deep Networks with Stochastic Depth", 2016.
    """

    phase = Phase.DROPOUT
    valid_ranges = {"p": PROBABILITY}
    deepspeed_alternative = None
    selector = "after"
    effect = "drop anything"

    def __init__(
        self,
        p: Value,
        *,
        after: str | list[str],
        channelwise: bool = False,
        samplewise: bool = False,
        name: str | None = None,
    ) -> None:
        if not after:
            raise ValueError("DropoutInjection: after must name modules or classes, as in after=['ReLU'], got nothing")
        if channelwise and samplewise:
            raise ValueError("DropoutInjection: it drops either channels or samples, got channelwise=True and samplewise=True")
        self.p = p
        self.after = after
        self.channelwise = channelwise
        self.samplewise = samplewise
        super().__init__(name)
        self.injected: list[InjectedDropout] = []
        self._rate = Rate(self.current["p"])

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules behind which it drops."""
        return self.matching(pl_module, self.after)

    @property
    def rate_is_known(self) -> bool:
        """Whether p is a number, or a schedule that a fit has followed: the rate is then the last one."""
        return not callable(self.p) or self._applied is not None

    def sites(self, pl_module: LightningModule) -> list[InjectedDropout]:
        """Return what it has injected, or would inject if there is no fit yet."""
        return self.injected or [
            InjectedDropout(name, module, self._rate, self.channelwise, self.samplewise)
            for name, module in self.find(pl_module).items()
        ]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks."""
        super().attach(trainer, pl_module)
        self.inject(pl_module)

    def inject(self, pl_module: LightningModule, always: bool = False) -> None:
        """Put the dropout in."""
        self._rate.to(pl_module.device)
        self._rate.set(self.current["p"] if self.rate_is_known else 0.0)  # until the first batch
        self.injected = inject_dropout(self.find(pl_module), self._rate, self.channelwise, self.samplewise, always)

    def values_changed(self) -> None:
        """Set the rate."""
        self._rate.set(self.current["p"])

    def update(self, progress: float) -> None:
        """Move the rate to a progress, and log where training is."""
        super().update(progress)
        if self.logging:
            self.log_metrics(progress=progress)

    def collect_metrics(self) -> Iterator[tuple[str, float | Tensor]]:
        """Yield its rate, unless a scheduler drives all of it and shows it."""
        driven = bool(self.injected) and all(site.rate is not self._rate for site in self.injected)
        yield from ((key, value) for key, value in super().collect_metrics() if key != "p" or not driven)

    def detach(self) -> None:
        """Take the dropout out."""
        super().detach()
        for site in self.injected:
            site.remove()
        self.injected = []

    def acts_on(self) -> str:
        """List the modules behind which it drops."""
        return f"after {abbreviate([site.name for site in self.injected])}"


def injections_of(regularizers: Iterable[Regularizer]) -> list[DropoutInjection]:
    """Return the callbacks that inject dropout."""
    return [callback for callback in regularizers if isinstance(callback, DropoutInjection)]
