"""Dropout that is added after modules of an existing model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import PROBABILITY, check_module, described_value
from lightning_reg._engine.module_selection import split_patterns
from lightning_reg._engine.modules import ForwardHook, ModuleRegularizer
from lightning_reg._engine.names import abbreviate
from lightning_reg._engine.outputs import batch_dim, batch_first, describe_output, is_float, main_output
from lightning_reg._engine.technique import Phase
from lightning_reg.dropout.functions import dropout, packed_dropout
from lightning_reg.dropout.output_check import OutputCheck
from lightning_reg.dropout.rates import Rate, restore_class_, swap_class_
from lightning_reg.dropout.unreached import describe_placeholders, placeholders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.hooks import RemovableHandle

    from lightning_reg._engine.clock import Moment
    from lightning_reg._engine.module_selection import Patterns
    from lightning_reg._engine.regularizer import Regularizer
    from lightning_reg.schedules import Value


class InjectedDropout:
    """Dropout after a module, through a forward hook.

    Args:
        name: The qualified name of the module.
        module: The module.
        rate: The dropout rate, which every forward pass reads.
        channelwise: Drop whole channels.
        samplewise: Drop whole samples.
        always: Drop in eval mode too.
        shared_dims: Dimensions of the output along which one mask is shared.
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
        shared_dims: Sequence[int] = (),
    ) -> None:
        self.name = self.label = name
        self.module, self.rate = module, rate
        self.channelwise, self.samplewise, self.shared_dims, self.always = channelwise, samplewise, shared_dims, always
        self.set_by = ""
        self.on_drop: Callable[[str, Any], None] | None = None  # called with the name and the output that a forward pass drops
        self._original_rate = rate
        self._handle: RemovableHandle | None = None

    @property
    def original(self) -> float:
        """The original rate."""
        return self._original_rate.number

    @property
    def key(self) -> tuple[int, str]:
        """A key that is unique among the sites of a model."""
        return id(self.module), f"injected {id(self._original_rate)}"

    def use(self, rate: Rate, by: str = "") -> None:
        """Use a scheduled rate instead of the original one. ``by`` names the callback that sets it."""
        self.rate, self.set_by = rate, by

    def set(self, p: float) -> None:
        """Do nothing: the forward pass reads the scheduled rate directly."""

    def restore(self) -> None:
        """Restore the original rate."""
        self.rate, self.set_by = self._original_rate, ""

    def insert(self) -> None:
        """Register the forward hook, after the module's existing hooks."""
        self._handle = self.module.register_forward_hook(ForwardHook(self._drop))
        swap_class_(self.module)  # graphs that were compiled before would ignore the hook

    def remove(self) -> None:
        """Remove the forward hook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            restore_class_(self.module)

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (module.training or self.always):
            return None
        main = main_output(module, output)
        dropped = self._dropped(main)
        if self.on_drop is not None and not is_compiling():
            self.on_drop(self.name, dropped)
        return dropped if main is output else (dropped, *output[1:])

    def _dropped(self, output: Any) -> Any:
        if not is_float(output):
            expected = "a float tensor;" if isinstance(output, Tensor) else "one float tensor; select a module inside it, or"
            why = f"it returns {describe_output(output)}, expected {expected} exclude it with '!{self.name}'"
            raise TypeError(self._wrong_output_message(why))
        ndim = output.data.ndim + 1 if isinstance(output, PackedSequence) else output.ndim
        if self.channelwise and (ndim < 2 or isinstance(output, PackedSequence)):
            raise TypeError(self._wrong_output_message(f"channels are in dimension 1, but the output {_shape_of(output)}"))
        if missing := [dim for dim in self.shared_dims if not -ndim <= dim < ndim]:
            raise TypeError(
                self._wrong_output_message(f"shared_dims has the dimension {missing[0]}, but the output {_shape_of(output)}")
            )
        if isinstance(output, PackedSequence):
            first = batch_first(self.module)
            return packed_dropout(output, self.rate.p, self._shared(ndim, 0 if first else 1), first)
        if self.samplewise and (samples := batch_dim(self.module, output)) != 0:
            return dropout(output, self.rate.p, shared_dims=self._shared(ndim, samples))
        return dropout(output, self.rate.p, self.channelwise, self.samplewise, self.shared_dims)

    def _shared(self, ndim: int, samples: int | None) -> Sequence[int]:
        """Return the dimensions along which one mask is shared, given the batch dimension if it is known."""
        return [dim for dim in range(ndim) if dim != samples] if self.samplewise else self.shared_dims

    def _wrong_output_message(self, why: str) -> str:
        return f"cannot apply dropout to the output of {self.name!r} ({type(self.module).__name__}): {why}"


def inject_dropout(
    modules: Mapping[str, nn.Module],
    rate: float | Rate,
    channelwise: bool = False,
    samplewise: bool = False,
    always: bool = False,
    shared_dims: Sequence[int] = (),
) -> list[InjectedDropout]:
    """Add dropout after modules while they are in training mode: yᵢ = xᵢ · mᵢ / (1 − p) with mᵢ ~ Bernoulli(1 − p).

    It uses forward hooks, so the keys of the state dict stay the same. It also works in a model that has already been compiled
    and run. For recurrent modules and ``nn.MultiheadAttention``, dropout applies only to the output, not to the hidden states
    or the attention weights. A ``PackedSequence`` is treated as if it were padded.

    Args:
        modules: A mapping from names, for error messages, to modules.
        rate: The probability of dropping an entry, in [0, 1], or a ``Rate`` that can be changed later.
        channelwise: Drop whole channels (dimension 1).
        samplewise: Drop whole samples. The batch dimension is 0, unless the ``batch_first`` of a recurrent or attention module
            says otherwise.
        always: Drop in eval mode too.
        shared_dims: Dimensions of the output along which one mask is shared.

    Returns:
        The injected dropout of each module. Call ``remove()`` on it to remove it.

    Raises:
        TypeError: If ``modules`` is not a mapping of modules. In the forward pass, if a module returns anything other than one
            float tensor.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 8)
        >>> (injected,) = inject_dropout({"layer": layer}, rate=1.0)
        >>> layer(torch.ones(2, 4)).count_nonzero().item(), layer.eval()(torch.ones(2, 4)).count_nonzero().item()
        (0, 16)
    """
    if not isinstance(modules, (Mapping, nn.ModuleDict)):
        example = "inject_dropout({'layer': model.layer}, 0.5)"
        raise TypeError(f"inject_dropout: modules must map names to modules, as in {example}, got {described_value(modules)}")
    for name, module in modules.items():
        check_module(f"inject_dropout: {name}", module)
    shared = rate if isinstance(rate, Rate) else Rate(rate)
    how = channelwise, samplewise, always, shared_dims
    injected = [InjectedDropout(name, module, shared, *how) for name, module in modules.items()]
    for site in injected:
        site.insert()
    return injected


class DropoutInjection(ModuleRegularizer):
    """Add dropout after modules of an existing model: yᵢ = xᵢ · mᵢ / (1 − p) with mᵢ ~ Bernoulli(1 − p).

    Runs in: the forward pass of each matched module in training mode. Sets the rate in ``on_train_batch_start``.

    The dropout is a forward hook, so the keys of the state dict stay the same, and checkpoints load into the plain model.
    The hook is removed after the fit.
    Under ``torch.compile``, all values of p share one graph.
    For recurrent modules and ``nn.MultiheadAttention``, dropout applies only to the output; for ``nn.LSTMCell``, to h.
    A ``PackedSequence`` is treated as if it were padded, so its dimensions are those of a padded batch.
    Masks come from torch's global generator, as with ``nn.Dropout``. ``seed_everything`` gives all ranks the same seed, so
    they draw the same masks, each for its own samples.

    Args:
        p: The probability of dropping an entry, in [0, 1], or a schedule. Srivastava et al. recommend 0.5 after hidden layers.
        after: Patterns of module names (``"encoder.layers.?"``; ``*`` also matches dots) or class names (``"ReLU"``). A leading
            ``!`` excludes. ``"*"`` means all layers before the last one that has parameters. A warning names layers among them
            whose output the model returns. Each module must return one float tensor, or be a recurrent or attention module.
        channelwise: Drop whole channels (dimension 1) instead of single entries.
        samplewise: Drop whole samples. After the branch of a residual block, this is stochastic depth. The batch dimension is
            0, unless the ``batch_first`` of a recurrent or attention module says otherwise.
        shared_dims: Dimensions of the output along which one mask is shared. ``[1]`` after ``nn.LSTM(batch_first=True)`` is
            locked dropout: the same entries are dropped in every time step of a sample. By default, every entry has its own
            mask.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If p is outside [0, 1], ``after`` matches nothing, or more than one of ``channelwise``, ``samplewise``, and
            ``shared_dims`` is set.
        TypeError: If ``after`` contains a class or a module instead of a name, or ``shared_dims`` is not a list of integers.
            In the first forward pass, if a module returns anything other than one float tensor, or the tensor lacks a
            dimension.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DropoutInjection(0.2, after="ReLU")], logger=False)

    Reference:
        N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
        G. Huang et al., "Deep Networks with Stochastic Depth", 2016 (samples).
        Y. Gal, Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016 (time).
    """

    phase = Phase.DROPOUT
    valid_ranges = {"p": PROBABILITY}
    fit_attributes = ("injected",)
    deepspeed_alternative = None
    selector = "after"
    effect = "drop anything"

    def __init__(
        self,
        p: Value,
        *,
        after: Patterns,
        channelwise: bool = False,
        samplewise: bool = False,
        shared_dims: list[int] | tuple[int, ...] | None = None,
        name: str | None = None,
    ) -> None:
        if not after:
            raise ValueError("DropoutInjection: after must name modules or classes, as in after=['ReLU'], got nothing")
        _check_sharing(channelwise, samplewise, shared_dims)
        self.p = p
        self.after = after
        self.channelwise = channelwise
        self.samplewise = samplewise
        self.shared_dims = shared_dims
        super().__init__(name)
        self.injected: list[InjectedDropout] = []
        self._output_check: OutputCheck | None = None
        self._rate = Rate(self.current["p"])

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules after which dropout is added."""
        try:
            return self.matching(pl_module, self.after)
        except ValueError as error:
            hint = describe_placeholders(placeholders(pl_module), str(self.after))
            raise ValueError(f"{error}; {hint}" if hint else str(error)) from None

    @property
    def rate_is_known(self) -> bool:
        """Whether the rate is known: p is a number, or a fit has used its schedule."""
        return not callable(self.p) or self._applied is not None

    def sites(self, pl_module: LightningModule) -> list[InjectedDropout]:
        """Return the injected dropout. Outside a fit, return the dropout that a fit would inject."""
        return self.injected or [
            InjectedDropout(name, module, self._rate, self.channelwise, self.samplewise)
            for name, module in self.find(pl_module).items()
        ]

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, and add dropout after them."""
        super().attach(trainer, pl_module)
        self.inject(pl_module)
        if "*" in split_patterns(self.after)[0] and not _lightning.is_compiled(pl_module):
            self._output_check = OutputCheck(self.name, pl_module)
            for site in self.injected:
                site.on_drop = self._output_check.remember

    def inject(self, pl_module: LightningModule, always: bool = False) -> None:
        """Add dropout after the modules, with ``always`` in eval mode too."""
        self._rate.to(pl_module.device)
        self._rate.set(self.current["p"] if self.rate_is_known else 0.0)  # the rate until the first batch
        how = self.channelwise, self.samplewise, always, self.shared_dims or ()
        self.injected = inject_dropout(self.find(pl_module), self._rate, *how)

    def values_changed(self) -> None:
        """Set the rate."""
        self._rate.set(self.current["p"])

    def update(self, moment: Moment) -> None:
        """Set the rate to that of a moment, and log the progress."""
        super().update(moment)
        if self.logging:
            self.log_metrics(progress=moment.progress)

    def collect_metrics(self) -> Iterator[tuple[str, float | Tensor]]:
        """Yield the metrics, without the rate if a scheduler has replaced it, because the scheduler logs its own."""
        is_replaced = bool(self.injected) and all(site.rate is not self._rate for site in self.injected)
        yield from ((key, value) for key, value in super().collect_metrics() if key != "p" or not is_replaced)

    def detach(self) -> None:
        """Remove the dropout."""
        super().detach()
        if self._output_check is not None:
            self._output_check.end()
            self._output_check = None
        for site in self.injected:
            site.remove()
        self.injected = []

    def acts_on(self) -> str:
        """List the modules after which dropout is added."""
        return f"after {abbreviate([site.name for site in self.injected])}"

    def settings(self) -> list[str]:
        """Describe the arguments. If a scheduler sets the rates, it takes the place of p."""
        setters = list(dict.fromkeys(site.set_by for site in self.injected))
        names = {by: [site.name for site in self.injected if site.set_by == by] for by in setters if by}
        set_here = super().settings()
        own = [setting for setting in set_here if setting.startswith("p=")]
        by_others = [f"p{f' of {abbreviate(of)}' if len(setters) > 1 else ''} by {by}" for by, of in names.items()]
        is_used = not setters or "" in setters
        return [*(own if is_used else []), *by_others, *(setting for setting in set_here if setting not in own)]


def injections_of(regularizers: Iterable[Regularizer]) -> list[DropoutInjection]:
    """Return the callbacks that inject dropout."""
    return [callback for callback in regularizers if isinstance(callback, DropoutInjection)]


def _check_sharing(channelwise: bool, samplewise: bool, shared_dims: Any) -> None:
    """Raise an error if several arguments define shared masks, or ``shared_dims`` is not a list of integers."""
    given = {"channelwise": channelwise, "samplewise": samplewise, "shared_dims": shared_dims}
    if len(said := [f"{key}={value!r}" for key, value in given.items() if value]) > 1:
        raise ValueError(
            f"DropoutInjection: set only one of channelwise, samplewise, and shared_dims, got {' and '.join(said)}"
        )
    is_list = isinstance(shared_dims, (list, tuple)) and all(type(dim) is int for dim in shared_dims)
    if not (shared_dims is None or is_list):
        raise TypeError(
            f"DropoutInjection: shared_dims must be a list of dimensions, as in shared_dims=[1], got {shared_dims!r}"
        )


def _shape_of(output: Tensor | PackedSequence) -> str:
    if isinstance(output, PackedSequence):
        return f"is a PackedSequence with data of shape {tuple(output.data.shape)}"
    return f"has shape {tuple(output.shape)}"
