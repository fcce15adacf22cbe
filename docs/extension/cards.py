"""Put the hand-written pages in ``docs/cards/`` into their frame: picture, measured cost, and reference from the docstring."""

from __future__ import annotations

import inspect
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pictures

import lightning_reg
from lightning_reg.custom import Regularizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).parent.parent
GROUPS = {
    "penalties": "Penalties",
    "gradients": "Gradient processing",
    "shrinkage": "Decay and shrinkage",
    "constraints": "Weight constraints",
    "pruning": "Pruning",
    "dropout": "Dropout",
    "perturbations": "Perturbations",
    "monitors": "Watching",
}
"""The packages of techniques, in the order of the index, with their titles."""

MEMBERS = {
    "OverfittingMonitor": "verdict, points, figure",
    "Penalty": "value, add_gradient_",
    "StartingPointPenalty": "reset",
}
"""What users call or override, besides the constructor."""

WORK = {
    "L1Penalty": ("L1 on the gradients", "L1 on the loss"),
    "L2Penalty": ("L2 on the gradients", "L2 on the loss"),
    "GradientNormClipping": ("global norm clipping, each step clipped", "global norm clipping, no step clipped"),
    "AdaptiveGradientClipping": ("adaptive clipping",),
    "WeightPruning": ("prune",),
}
"""The rows of the benchmarks with 124M parameters that measure a technique."""


def techniques() -> dict[str, list[str]]:
    """Return the names of all callbacks by their group's title."""
    callbacks = [value for name in lightning_reg.__all__ if inspect.isclass(value := getattr(lightning_reg, name))]
    packages = {cls.__name__: cls.__module__.split(".")[1] for cls in callbacks if issubclass(cls, Regularizer)}
    return {title: [name for name in sorted(packages) if packages[name] == package] for package, title in GROUPS.items()}


def overhead(name: str, benchmarks: str) -> str:
    """Return the range of microseconds per step that a callback adds to a tiny model."""
    rows = re.findall(r"^\| ([\w ]+) \| (`.*) \|$", benchmarks.split("## Overhead per step")[1], re.MULTILINE)
    return next((f"{span} µs" for span, names in rows if f"`{name}`" in names), "")


def durations(name: str, benchmarks: str) -> list[str]:
    """Return how long a callback takes for 124M parameters on the CPU."""
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \| ", benchmarks.split("## On a GPU")[0], re.MULTILINE)
    large = {work: float(ms) for work, ms in rows if "124M" in work}
    found = [(part, ms) for part in WORK.get(name, ()) for work, ms in large.items() if work.startswith(part)]
    return [f"{part}, {ms:.0f} ms" for part, ms in found]


def cost(name: str, benchmarks: str) -> str:
    """Return the section about the measured cost, or nothing if the benchmarks do not measure it."""
    lines = []
    if span := overhead(name, benchmarks):
        lines.append(f"On a tiny model, where only overhead counts, it adds {span} to a step.")
    if times := durations(name, benchmarks):
        lines.append(f"For 124M parameters on two CPU threads: {'; '.join(times)}.")
    if not lines:
        return ""
    lines.append("[Benchmarks](../benchmarks.md) has the method and all numbers.")
    return "## Cost\n\n" + " ".join(lines) + "\n\n"


def picture(name: str) -> str:
    """Return the picture of a technique's effect, if it has one."""
    if name not in pictures.PICTURES:
        return ""
    return f"```{{image}} /generated/{name}.svg\n:alt: {pictures.PICTURES[name].__doc__}\n:class: card-picture\n```\n\n"


def reference(name: str) -> str:
    """Return the section that autodoc fills from the docstring."""
    members = f"\n   :members: {MEMBERS[name]}" if name in MEMBERS else ""
    return f"\n## Reference\n\n```{{eval-rst}}\n.. autoclass:: lightning_reg.{name}{members}\n```\n"


def framed(name: str, heart: str) -> str:
    """Return the page of a technique: its hand-written heart in the generated frame."""
    start, _, sections = heart.partition("\n## ")
    main, found, pitfalls = f"## {sections}".partition("## Pitfalls")
    benchmarks = (DOCS / "benchmarks.md").read_text()
    return f"{start}\n{picture(name)}{main}{cost(name, benchmarks)}{found}{pitfalls}{reference(name)}"


def entry(name: str, address: str) -> str:
    """Return the link to a technique in the index, with its picture and the first line of its docstring."""
    image = f'<img src="../_static/{name}.svg" alt="">' if name in pictures.PICTURES else ""
    summary = (
        (inspect.getdoc(getattr(lightning_reg, name)) or "").partition("\n")[0].partition(":")[0].rstrip(".").replace("``", "")
    )
    return f'<a href="{address}">{image}<strong>{name}</strong><span>{escape(summary)}</span></a>'


def index(start: str, address: Callable[[str], str]) -> str:
    """Return the page that lists all techniques in groups, with links to their addresses."""
    parts = [start]
    for title, names in techniques().items():
        if names:
            links = "".join(entry(name, address(name)) for name in names)
            tree = "\n".join([f"```{{toctree}}\n:hidden:\n:caption: {title}\n", *names, "```"])
            parts.append(f'\n## {title}\n\n<div class="cards">{links}</div>\n\n{tree}\n')
    return "\n".join(parts)


def frame(app: Sphinx, page: str, source: list[str]) -> None:
    """Complete a page of ``docs/cards/`` as Sphinx reads it."""
    folder, _, name = page.rpartition("/")
    if folder == "cards":

        def address(other: str) -> str:
            return app.builder.get_relative_uri(page, f"cards/{other}")

        source[0] = index(source[0], address) if name == "index" else framed(name, source[0])


def draw(app: Sphinx) -> None:
    """Draw all pictures before the pages are read."""
    pictures.draw_all(DOCS / "generated")


def outdated(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> list[str]:
    """Return the pages to read in each build, because they depend on docstrings, benchmarks, and each other."""
    return [page for page in env.found_docs if page.startswith("cards/")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", draw)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", frame)
    return {"parallel_read_safe": True}
