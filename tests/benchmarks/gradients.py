"""Gradient clipping, compared with the functions of torch and timm."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_reg import GradientNormClipping
from lightning_reg.functional import clip_unit_gradients_
from tests.benchmarks.measuring import Comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def comparisons(label: str, params: list[Tensor]) -> list[Comparison]:
    """Return the comparisons of both kinds of clipping for a list of parameters with gradients."""
    rows = []
    norm = float(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
    for what, bound, factor in (("each step clipped", norm, 0.9999), ("no step clipped", 2 * norm, 1.0)):
        bounds = geometric_bounds(bound, factor)
        clip_by_torch = lambda bounds=bounds: nn.utils.clip_grad_norm_(params, next(bounds)).item()  # noqa: E731
        rows.append(Comparison(f"global norm clipping, {what}, {label}", logged_clipping(params, bounds), clip_by_torch))
    if timm_clip := load_timm_clipping():
        check_equal(timm_clip)
        ours, other = (lambda clip=clip: clip(params, 0.01) for clip in (clip_unit_gradients_, timm_clip))
        rows.append(Comparison(f"adaptive clipping, {label}", ours, other))
    return rows


def geometric_bounds(bound: float, factor: float) -> Iterator[float]:
    """Yield bounds that shrink by a factor, so that each step clips gradients that the last one has clipped."""
    while True:
        bound *= factor
        yield bound


def logged_clipping(params: list[Tensor], bounds: Iterator[float]) -> Callable[[], object]:
    """Return a function that runs a step of the callback and logs everything."""
    callback = GradientNormClipping(math.inf)
    callback.has_logger = callback.logging = True
    callback._root, callback._optimizers = None, [None]  # as in a fit with one optimizer

    def step() -> object:
        callback.current["max_norm"] = next(bounds)
        callback.gradients(params, None, None)  # type: ignore[arg-type]
        return {key: float(value) for key, value in callback.collect_metrics()}

    return step


def load_timm_clipping() -> Callable[..., Any] | None:
    """Return timm's function, or ``None`` without timm. Only its file is loaded, because the package needs torchvision."""
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


def check_equal(timm_clip: Callable[..., Any]) -> None:
    """Check that both functions give the same result."""
    results = []
    for clip in (clip_unit_gradients_, timm_clip):
        torch.manual_seed(0)
        params = [torch.randn(shape, requires_grad=True) for shape in [(5, 4), (3, 2, 3, 3), (7,)]]
        for p in params:
            p.grad = torch.randn_like(p) * 0.1
        clip(params, 0.01)
        results.append([p.grad for p in params])
    torch.testing.assert_close(*results)
