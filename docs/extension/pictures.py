"""Small pictures of what each technique does, drawn with the functions of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch.nn.functional import mse_loss

from lightning_reg import Cosine, Linear, Steps, functional as reg

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes
    from torch import Tensor

BEFORE, AFTER, BOUND = "#a5adb5", "#0b6fb8", "#c4342b"
PICTURES: dict[str, Callable[[Figure], None]] = {}
"""For each technique, a function that draws it. Its docstring describes the picture."""


def picture(name: str) -> Callable[[Callable[[Figure], None]], Callable[[Figure], None]]:
    """Return a decorator that registers the picture of a technique."""
    return lambda draw: PICTURES.setdefault(name, draw)


def draw(name: str) -> Figure:
    """Return the picture of a technique."""
    torch.manual_seed(0)
    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    PICTURES[name](figure)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure


def draw_all(folder: Path) -> None:
    """Draw all pictures into a folder, as SVG files."""
    folder.mkdir(exist_ok=True)
    for name in PICTURES:
        draw(name).savefig(folder / f"{name}.svg", metadata={"Date": None})


# Kinds of pictures --------------------------------------------------------------------------------------------------


def bars(figure: Figure, before: Tensor, after: Tensor, label: str, bounds: tuple[float, ...] = ()) -> None:
    """Draw entries before and after, sorted by their values before."""
    ax = figure.subplots()
    order = before.argsort(descending=True)
    ax.bar(range(len(before)), before[order].tolist(), color=BEFORE, width=0.85, label="before")
    ax.bar(range(len(before)), after[order].tolist(), color=AFTER, width=0.45, label="after")
    for bound in bounds:
        ax.axhline(bound, color=BOUND, linewidth=1, linestyle="--")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks([])
    ax.set_xlabel(label, fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def arrows(figure: Figure, before: Tensor, after: Tensor, label: str, radii: tuple[float, ...] = ()) -> None:
    """Draw vectors in the plane before and after, and circles that bound them."""
    ax = figure.subplots()
    angles = torch.linspace(0, 2 * torch.pi, 200)
    for radius in radii:
        ax.plot(radius * angles.cos(), radius * angles.sin(), color=BOUND, linewidth=1, linestyle="--")
    for start, end in zip(before, after, strict=True):
        ax.plot(*start, "o", color=BEFORE, markersize=5)
        ax.plot(*end, "o", color=AFTER, markersize=5)
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": AFTER, "shrinkA": 3, "shrinkB": 2})
    ax.plot(0, 0, "+", color="black")
    ax.set_aspect("equal")
    ax.set_xlabel(label, fontsize=9)


def lines(ax: Axes, xlabel: str, ylabel: str, x: Tensor | None = None, **series: Tensor) -> None:
    """Draw series, the first in gray and the second in blue."""
    for (label, values), color in zip(series.items(), (BEFORE, AFTER, BOUND, "#2e8540"), strict=False):
        ax.plot(x if x is not None else range(len(values)), values, color=color, label=label.replace("_", " "))
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def masks(figure: Figure, **images: Tensor) -> None:
    """Draw matrices side by side, white where they are 0."""
    for ax, (title, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        ax.imshow((image != 0).numpy(), cmap="Blues", vmin=-0.15, vmax=1.3, interpolation="nearest", aspect="auto")
        ax.set_title(title.replace("_", " "), fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])


def weights(count: int = 24) -> Tensor:
    """Return weights to show, evenly from large to small."""
    return torch.linspace(1, -1, count) ** 3 * 0.8 + torch.linspace(0.2, -0.2, count)


def descended(penalty: Callable[[list[Tensor]], Tensor], start: Tensor, steps: int, rate: float) -> Tensor:
    """Return weights after gradient steps on a penalty alone."""
    w = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(penalty([w]), w)
        w = (w - rate * gradient).detach().requires_grad_()
    return w.detach()


def changed(function: Callable[[list[Tensor]], object], start: Tensor) -> Tensor:
    """Return a copy of weights that a function has changed in place."""
    w = start.clone()
    function([w])
    return w


def processed(function: Callable[[list[Tensor]], object], gradient: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return gradients that a function has changed in place."""
    p = torch.nn.Parameter(torch.zeros_like(gradient) if weight is None else weight.clone())
    p.grad = gradient.clone()
    with torch.no_grad():
        function([p])
    return p.grad


def units(count: int = 14) -> Tensor:
    """Return vectors in the plane, of various lengths."""
    angles = torch.arange(count) * 2.4
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(0.25, 2.0, count)[:, None]


# Penalties ----------------------------------------------------------------------------------------------------------


@picture("L1Penalty")
def l1(figure: Figure) -> None:
    """Every weight moves toward zero by the same distance; small weights reach it."""
    bars(figure, weights(), descended(reg.l1_penalty, weights(), 30, 0.01), "weights, 30 steps on the penalty alone")


@picture("L2Penalty")
def l2(figure: Figure) -> None:
    """Every weight shrinks by the same factor; none becomes zero."""
    bars(figure, weights(), descended(reg.l2_penalty, weights(), 30, 0.02), "weights, 30 steps on the penalty alone")


@picture("ElasticNetPenalty")
def elastic_net(figure: Figure) -> None:
    """Large weights shrink by a factor, and small weights reach zero."""

    def penalty(w: list[Tensor]) -> Tensor:
        return 0.5 * reg.l1_penalty(w) + reg.l2_penalty(w)

    bars(figure, weights(), descended(penalty, weights(), 30, 0.02), "weights, 30 steps on the penalty alone")


@picture("GroupLassoPenalty")
def group_lasso(figure: Figure) -> None:
    """Each unit moves straight toward zero by the same distance; short ones reach it as a whole."""
    after = descended(reg.group_lasso_penalty, units(), 40, 0.01)
    arrows(figure, units(), after, "units with two weights each, 40 steps on the penalty alone")


@picture("OrthogonalityPenalty")
def orthogonality(figure: Figure) -> None:
    """Two units that point in nearly the same direction turn until they are orthogonal, and get length 1."""
    start = torch.tensor([[1.2, 0.7], [0.9, 1.0]])
    after = descended(reg.orthogonality_penalty, start, 200, 0.05)
    arrows(figure, start, after, "two units, 200 steps on the penalty alone", radii=(1.0,))


@picture("StartingPointPenalty")
def starting_point(figure: Figure) -> None:
    """During fine-tuning, the distance to the start grows. With the penalty, it stays at half of that."""
    start, goal, distances = torch.zeros(8), torch.randn(8), {}
    for label, strength in {"plain": 0.0, "with the penalty": 1.0}.items():
        w, history = start.clone(), []
        for _ in range(60):
            w -= 0.08 * (w - goal + strength * (w - start))
            history.append(reg.distance_penalty([w], [start]).mul(2).sqrt())
        distances[label] = torch.stack(history)
    lines(figure.subplots(), "step", "distance to the start", **distances)


@picture("ActivityPenalty")
def activity(figure: Figure) -> None:
    """With the penalty, far more of the activations are zero."""
    x = torch.randn(256, 8)
    y = x.sin().sum(1, keepdim=True)
    for ax, strength in zip(figure.subplots(1, 2, sharey=True), (0.0, 0.02), strict=True):
        hidden = torch.relu(activity_model(x, y, strength)(x)).flatten().detach()
        ax.hist(hidden, bins=30, range=(0, 3), color=AFTER if strength else BEFORE)
        zeros = (hidden == 0).float().mean()
        ax.set_title(f"{'with the penalty' if strength else 'plain'}: {zeros:.0%} zeros", fontsize=9)
        ax.set_xlabel("activation", fontsize=9)
        ax.set_yscale("log")


def activity_model(x: Tensor, y: Tensor, strength: float) -> torch.nn.Module:
    """Return the first layer of a network that was trained with an activity penalty."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 32), torch.nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=0.01)
    for _ in range(200):
        hidden = first(x).relu()
        loss = mse_loss(second(hidden), y) + strength * reg.activity_penalty(hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first


# Gradient processing ------------------------------------------------------------------------------------------------


@picture("GradientNormClipping")
def norm_clipping(figure: Figure) -> None:
    """Gradients longer than the bound are scaled back to it and keep their direction."""
    after = torch.stack([processed(lambda p: reg.clip_gradient_norm_(p, 1.0), g) for g in units()])
    arrows(figure, units(), after, "gradients of 14 steps", radii=(1.0,))


@picture("GradientValueClipping")
def value_clipping(figure: Figure) -> None:
    """Entries beyond the bounds are cut off."""
    after = processed(lambda p: reg.clip_gradient_value_(p, 0.4), weights())
    bars(figure, weights(), after, "entries of a gradient", bounds=(0.4, -0.4))


@picture("AdaptiveGradientClipping")
def adaptive(figure: Figure) -> None:
    """The bound on the gradient of a unit grows with the norm of its weights."""
    norms = torch.linspace(0.1, 2.0, 20)
    weight, gradient = torch.eye(20) * norms[:, None], torch.eye(20) * 0.06 * (1 + torch.rand(20, 1))
    after = processed(lambda p: reg.clip_unit_gradients_(p, 0.05), gradient, weight)
    ax = figure.subplots()
    ax.plot(norms, 0.05 * norms, color=BOUND, linestyle="--", linewidth=1, label="bound")
    ax.plot(norms, gradient.norm(dim=1), "o", color=BEFORE, label="before")
    ax.plot(norms, after.norm(dim=1), "o", color=AFTER, label="after", markersize=4)
    ax.set_xlabel("norm of a unit's weights", fontsize=9)
    ax.set_ylabel("norm of its gradient", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def spiky() -> Tensor:
    """Return gradient norms that fall and have spikes."""
    norms = (1.5 + 2 * torch.exp(-torch.arange(150) / 40)) * (1 + 0.15 * torch.randn(150)).abs()
    norms[[60, 95, 130]] *= 6
    return norms


@picture("QuantileGradientClipping")
def quantile(figure: Figure) -> None:
    """The bound follows the tenth percentile of the recent norms, and cuts off spikes."""
    history, bounds = torch.full((50,), float("nan")), []
    for norm in spiky():
        history = reg.update_norm_history(history, norm)
        bounds.append(reg.quantile_bound(history, 0.1))
    ax = figure.subplots()
    torch.manual_seed(0)
    clipped = torch.minimum(spiky(), torch.stack(bounds))
    torch.manual_seed(0)
    lines(ax, "step", "norm of the gradient", before=spiky(), after=clipped)


@picture("ZScoreGradientClipping")
def z_score(figure: Figure) -> None:
    """Only outliers of the norm are clipped."""
    statistics, norms, clipped = torch.zeros(3), spiky(), []
    for norm in norms:
        bound = reg.z_score_bound(norm, statistics, 2.5) if statistics[0] >= 25 else norm
        clipped.append(torch.minimum(norm, bound))
        statistics = reg.update_norm_statistics(statistics, clipped[-1], 0.97, 25)
    lines(figure.subplots(), "step", "norm of the gradient", before=norms, after=torch.stack(clipped))


@picture("PeakGradientDropping")
def peaks(figure: Figure) -> None:
    """The two entries of largest magnitude become zero, and all others stay the same."""
    bars(figure, weights(), processed(lambda p: reg.drop_peak_gradients_(p, 2), weights()), "entries of a gradient, k = 2")


@picture("GradientNoise")
def noise(figure: Figure) -> None:
    """The noise is large at first and fades over the steps."""
    deviations = 0.3 / (1 + torch.arange(300.0)) ** 0.275
    added = torch.cat([processed(lambda p, s=std: reg.add_gradient_noise_(p, float(s)), torch.zeros(1)) for std in deviations])
    lines(figure.subplots(), "step", "one entry", noise=added, standard_deviation=deviations)


@picture("GradientCentralization")
def centralization(figure: Figure) -> None:
    """All entries of a unit's gradient are shifted so that their mean is zero."""
    before = weights().add(0.4)[None]
    bars(figure, before[0], processed(reg.centralize_gradients_, before)[0], "the gradient of one unit")


@picture("NonFiniteGradientGuard")
def guard(figure: Figure) -> None:
    """One bad batch turns plain training into NaN. The guard skips it."""
    curves = {}
    for label, guarded in {"plain": False, "with the guard": True}.items():
        w, losses = torch.full((1,), 3.0), []
        for step in range(60):
            p = torch.nn.Parameter(w)
            p.grad = w * (float("nan") if step == 20 else 1.0)
            bad = bool(reg.nonfinite_gradients([p]))
            w = w if guarded and bad else w - 0.05 * p.grad
            losses.append(w.square().mean())
        curves[label] = torch.stack(losses)
    ax = figure.subplots()
    lines(ax, "step", "loss", **curves)
    ax.lines[0].set(linewidth=5)
    ax.axvline(20, color=BOUND, linewidth=1, linestyle="--")
    ax.annotate("a batch with NaN", (20, 7), (23, 7), fontsize=8, color=BOUND)


# Decay and shrinkage ------------------------------------------------------------------------------------------------


@picture("WeightDecay")
def decay(figure: Figure) -> None:
    """Every weight shrinks by the same factor, regardless of its gradient."""
    after = changed(lambda w: [reg.decay_weights_(w, 0.01) for _ in range(60)], weights())
    bars(figure, weights(), after, "weights, 60 steps of decay alone")


@picture("WeightDecayScheduler")
def decay_schedule(figure: Figure) -> None:
    """The weight decay of the optimizer rises along half a cosine wave."""
    progress = torch.linspace(0, 1, 101)
    schedule = Cosine(0.04, 0.4)
    constant = torch.full_like(progress, 0.04)
    values = torch.tensor([schedule(float(x)) for x in progress])
    lines(figure.subplots(), "progress of training", "weight decay", progress, plain=constant, scheduled=values)


@picture("SoftThresholding")
def soft(figure: Figure) -> None:
    """Every weight moves toward zero by the threshold, and weights below it become exactly zero."""
    after = changed(lambda w: reg.soft_threshold_(w, 0.25), weights())
    bars(figure, weights(), after, "weights, after thresholds of 0.25 in total", bounds=(0.25, -0.25))


@picture("GroupSoftThresholding")
def group_soft(figure: Figure) -> None:
    """Units move straight toward zero, and those inside the circle become exactly zero as a whole."""
    after = changed(lambda w: reg.group_soft_threshold_(w, 0.5), units())
    arrows(figure, units(), after, "units with two weights each", radii=(0.5 * 2**0.5,))


@picture("RandomShrinkage")
def shrinkage(figure: Figure) -> None:
    """Every weight shrinks by a random fraction of itself."""
    bars(figure, weights(), changed(lambda w: reg.shrink_randomly_(w, 0.6), weights()), "weights, one step with ε = 0.6")


# Weight constraints -------------------------------------------------------------------------------------------------


@picture("WeightClipping")
def clipping(figure: Figure) -> None:
    """Weights beyond the bounds are set to them."""
    bars(figure, weights(), changed(lambda w: reg.clip_weights_(w, 0.4), weights()), "weights", bounds=(0.4, -0.4))


@picture("NonNegative")
def nonnegative(figure: Figure) -> None:
    """Negative weights become zero."""
    bars(figure, weights(), changed(reg.clip_negative_weights_, weights()), "weights")


@picture("MaxNorm")
def max_norm(figure: Figure) -> None:
    """Units outside the circle are scaled back to it."""
    after = changed(lambda w: reg.project_unit_norms_(w, 0.0, 1.2), units())
    arrows(figure, units(), after, "units with two weights each", radii=(1.2,))


@picture("UnitNorm")
def unit_norm(figure: Figure) -> None:
    """All units are scaled to length 1."""
    after = changed(lambda w: reg.project_unit_norms_(w, 1.0, 1.0), units())
    arrows(figure, units(), after, "units with two weights each", radii=(1.0,))


@picture("MinMaxNorm")
def min_max_norm(figure: Figure) -> None:
    """Units outside the ring are scaled to its nearest edge."""
    after = changed(lambda w: reg.project_unit_norms_(w, 0.7, 1.4), units())
    arrows(figure, units(), after, "units with two weights each", radii=(0.7, 1.4))


# Pruning ------------------------------------------------------------------------------------------------------------


@picture("WeightPruning")
def pruning(figure: Figure) -> None:
    """Pruned matrices: single weights, whole output units, and two of every four inputs."""
    weight = [torch.randn(16, 16) * torch.linspace(0.4, 1.6, 16)[torch.randperm(16)][:, None]]
    images = {
        "element, 70%": ~reg.pruning_masks(weight, 0.7)[0],
        "unit, 50%": ~reg.pruning_masks(weight, 0.5, structure="unit")[0],
        "2:4": ~reg.pruning_masks(weight, 0.5, structure="2:4")[0],
    }
    masks(figure, **images)


# Dropout ------------------------------------------------------------------------------------------------------------


@picture("DropoutInjection")
def injection(figure: Figure) -> None:
    """Three kinds of masks: single entries, whole channels, and whole samples."""
    x = torch.ones(8, 6, 4)
    kept = {
        "entries": reg.dropout(x, 0.4),
        "channelwise": reg.dropout(x, 0.4, channelwise=True),
        "samplewise": reg.dropout(x, 0.4, samplewise=True),
    }
    masks(figure, **{title: image.flatten(1) for title, image in kept.items()})
    figure.axes[0].set_ylabel("samples", fontsize=9)
    figure.supxlabel("channels × positions", fontsize=9)


@picture("DropoutScheduler")
def scheduler(figure: Figure) -> None:
    """Dropout rates over training: early dropout falls to zero, and late dropout begins after a third."""
    progress = torch.linspace(0, 1, 301)
    schedules = {"constant": Linear(0.2, 0.2), "early": Linear(0.3, 0.0, until=0.4), "late": Steps([0.0, 0.4], at=[0.33])}
    values = {name: torch.tensor([schedule(float(x)) for x in progress]) for name, schedule in schedules.items()}
    lines(figure.subplots(), "progress of training", "p", progress, **values)


@picture("MonteCarloDropout")
def monte_carlo(figure: Figure) -> None:
    """Predictions spread out most in the gap between the training data."""
    x, grid = torch.cat([torch.rand(60) * 2 - 3, torch.rand(60) + 1.5])[:, None], torch.linspace(-4, 4, 200)[:, None]
    y = x.sin() + 0.05 * torch.randn_like(x)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 256), torch.nn.ReLU(), torch.nn.Dropout(0.2),
        torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(256, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(1500):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        samples = reg.sample_predictions(lambda: model(grid), 100)[..., 0]
    mean, spread = samples.mean(0), 2 * samples.std(0)
    ax = figure.subplots()
    ax.fill_between(grid[:, 0], mean - spread, mean + spread, color=AFTER, alpha=0.25, linewidth=0)
    ax.plot(grid, mean, color=AFTER, label="mean ± 2 standard deviations")
    ax.plot(x, y, ".", color=BEFORE, label="training data")
    ax.legend(frameon=False, fontsize=8, loc="upper left")


# Watching -----------------------------------------------------------------------------------------------------------


@picture("OverfittingMonitor")
def overfitting(figure: Figure) -> None:
    """The training loss falls, the validation loss rises again, and the gap between them grows."""
    x = torch.randn(2060, 10)
    y = x[:, :1] + torch.randn(2060, 1)
    model = torch.nn.Sequential(torch.nn.Linear(10, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    optimizer, train, val = torch.optim.Adam(model.parameters(), lr=0.003), [], []
    for _ in range(80):
        with torch.no_grad():
            train.append(mse_loss(model(x[:60]), y[:60]))
            val.append(mse_loss(model(x[60:]), y[60:]))
        optimizer.zero_grad()
        mse_loss(model(x[:60]), y[:60]).backward()
        optimizer.step()
    curves = {"train": torch.stack(train), "val": torch.stack(val)}
    lines(figure.subplots(), "epoch", "loss in eval mode", **curves, gap=curves["val"] - curves["train"])


@picture("ParameterMonitor")
def updates(figure: Figure) -> None:
    """The relative update of a layer in each step, for two learning rates: one near the rule of thumb, and one far above it."""
    ax = figure.subplots()
    lines(ax, "step", "relative update", **{f"lr {lr}": relative_updates(lr) for lr in (0.1, 0.001)})
    ax.axhline(1e-3, color=BOUND, linewidth=1, linestyle="--")
    ax.set_yscale("log")


def relative_updates(lr: float) -> Tensor:
    """Return how far each step of Adam moves the weights of a layer, relative to their norm."""
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = x.sin().sum(1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer, ratios = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(200):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        ratios.append((model[0].weight.detach() - before).norm() / before.norm())
    return torch.stack(ratios)
