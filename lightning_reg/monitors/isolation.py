"""Contexts that leave no trace: they restore random numbers, modes, gradients, buffers, attributes, and metrics."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric

from lightning_reg.monitors.attributes import Attributes, entries, reachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


SEED = 201_711
"""The seed for drawing and evaluating samples. Its value does not matter."""

_DEPTH = 6  # how deep to look for random generators in a dataset
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


# Random numbers -----------------------------------------------------------------------------------------------------


@contextmanager
def own_random_numbers(device: torch.device, *holders: Any) -> Iterator[None]:
    """Draw the same random numbers each time, and restore all generators afterward.

    Args:
        device: The device whose generator is also used.
        holders: Objects that may hold generators of their own, such as a dataset with random augmentations.
    """
    devices = [device] if device.type != "cpu" else []
    generators = list(generators_of(holders))
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002  the global one is what must not change
        for generator in generators:
            stack.callback(_restoring(generator))
            _seed(generator)
        torch.default_generator.manual_seed(SEED)
        if devices:
            getattr(torch, device.type).manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        yield


def generators_of(held: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yield the random generators in an object, in its attributes, and in theirs.

    Example:
        >>> class Flips:
        ...     def __init__(self):
        ...         self.rng = np.random.default_rng(0)
        >>> [type(generator).__name__ for generator in generators_of([Flips()])]
        ['Generator']
    """
    return (obj for obj in reachable(held, _parts, depth) if isinstance(obj, _GENERATORS))


def _parts(obj: Any) -> Iterable[Any]:
    if isinstance(obj, (str, bytes, torch.Tensor, np.ndarray, type, *_GENERATORS)):
        return ()
    if isinstance(obj, (dict, list, tuple)):
        return entries(obj)
    return getattr(obj, "__dict__", {}).values()


def _restoring(generator: Any) -> Callable[[], None]:
    """Return a function that restores the current state of a generator."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return partial(_set_state, generator, state)
    if isinstance(generator, random.Random):
        numbers = generator.getstate()
        return lambda: generator.setstate(numbers)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    bits, of_bits = generator.bit_generator, generator.bit_generator.state
    return lambda: setattr(bits, "state", of_bits)


def _set_state(generator: torch.Generator, state: Any) -> None:
    generator.set_state(state)


def _seed(generator: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(SEED)
    elif isinstance(generator, (random.Random, np.random.RandomState)):
        generator.seed(SEED)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(SEED).state


# The module ---------------------------------------------------------------------------------------------------------


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode, and restore the mode of each one afterward."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def gradients_put_aside(module: nn.Module) -> Iterator[None]:
    """Set the gradients aside, so that a step that computes gradients cannot change them."""
    gradients = [(p, p.grad) for p in module.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore all buffers, including those that a forward pass in eval mode changes."""
    buffers = [(part, name, b, b.clone()) for part in module.modules() for name, b in part._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in buffers:
                part._buffers[name] = buffer
                buffer.copy_(value)


def metrics_in(module: nn.Module) -> list[Metric]:
    """Return the torchmetrics metrics of a module."""
    return [part for part in module.modules() if isinstance(part, Metric)]


@contextmanager
def empty_metrics(module: nn.Module) -> Iterator[None]:
    """Give metrics fresh states, as after a reset, and restore their own states afterward."""
    before = [(metric, dict(vars(metric))) for metric in metrics_in(module)]
    empty(module)
    try:
        yield
    finally:
        for metric, attributes in before:
            vars(metric).clear()
            vars(metric).update(attributes)


def empty(module: nn.Module) -> None:
    """Reset the metrics of a module without changing the objects that held their states."""
    metrics = metrics_in(module)
    for metric in metrics:
        for name, default in metric._defaults.items():
            if not isinstance(default, torch.Tensor):
                setattr(metric, name, [])  # reset empties a list in place, and metrics of a collection may share it
    for metric in metrics:
        metric.reset()


@contextmanager
def untouched(module: nn.Module) -> Iterator[Attributes]:
    """Leave a module unchanged: modes, gradients, buffers, attributes, and metrics, whose states are empty in the meantime."""
    attributes = Attributes(module, metrics_in(module))
    with ExitStack() as stack:
        stack.callback(attributes.restore)
        stack.enter_context(gradients_put_aside(module))
        stack.enter_context(buffers_restored(module))
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(empty_metrics(module))
        yield attributes
