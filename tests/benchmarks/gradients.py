"""Gradient clipping beside torch's and timm's."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_reg import GradientNormClipping
from lightning_reg.functional import clip_unit_gradients_
from tests.benchmarks.measuring import Claim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["claims"]


def claims(label: str, params: list[Tensor]) -> list[Claim]:
    """Return the claims on both kinds of clipping for one set of parameters with gradients."""
    found = []
    for what, times, shrink in (("each step clipped", 1.0, 0.9999), ("no step clipped", 2.0, 1.0)):
        bounds = bounds_from(times * float(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])), shrink)
        torch_clips = lambda bounds=bounds: nn.utils.clip_grad_norm_(params, next(bounds)).item()  # noqa: E731
        found.append(Claim(f"global norm clipping, {what}, {label}", logged_clipping(params, bounds), torch_clips, 1))
    if timm_clips := adaptive_clipping_of_timm():
        check_equal(timm_clips)
        ours, theirs = (lambda clip=clip: clip(params, 0.01) for clip in (clip_unit_gradients_, timm_clips))
        found.append(Claim(f"adaptive clipping, {label}", ours, theirs, 6))
    return found


def bounds_from(bound: float, shrink: float) -> Iterator[float]:
    """Yield bounds each of which is a share of the one before."""
    while True:
        bound *= shrink
        yield bound


def logged_clipping(params: list[Tensor], bounds: Iterator[float]) -> Callable[[], object]:
    """Return a step of the callback in which everything is logged."""
    callback = GradientNormClipping(math.inf)
    callback.has_logger = callback.logging = True
    callback._root, callback._optimizers = None, [None]  # as in a fit with one optimizer

    def step() -> object:
        callback.current["max_norm"] = next(bounds)
        callback.gradients(params, None, None)  # type: ignore[arg-type]
        return {key: float(value) for key, value in callback.collect_metrics()}

    return step


def adaptive_clipping_of_timm() -> Callable[..., Any] | None:
    """Return timm's function, or ``None`` without timm; its file is loaded alone, since the package needs torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("timm_agc", Path(package.origin).parent / "utils" / "agc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clip: Callable[..., Any] = module.adaptive_clip_grad
    return clip


def check_equal(timm_clips: Callable[..., Any]) -> None:
    """Make sure that both do the same."""
    results = []
    for clip in (clip_unit_gradients_, timm_clips):
        torch.manual_seed(0)
        params = [torch.randn(shape, requires_grad=True) for shape in [(5, 4), (3, 2, 3, 3), (7,)]]
        for p in params:
            p.grad = torch.randn_like(p) * 0.1
        clip(params, 0.01)
        results.append([p.grad for p in params])
    torch.testing.assert_close(*results)
