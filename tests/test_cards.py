"""Every technique has a card in the documentation, with a picture, and its frame takes the cost from the benchmarks."""

from __future__ import annotations

import doctest
import io
import re
import sys

import pytest
from processes import ROOT
from table import ROWS

import lightning_reg

EXTENSION = ROOT / "docs" / "extension"
sys.path.insert(0, str(EXTENSION))

import cards  # noqa: E402
import docstrings  # noqa: E402
import pictures  # noqa: E402

BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
HEADINGS = ["When to use it", "When not to", "Values", "Pitfalls"]
WRITTEN = {path.stem: path.read_text() for path in (ROOT / "docs" / "cards").glob("*.md") if path.stem != "index"}


def test_every_card_is_in_the_index():
    assert {name for names in cards.techniques().values() for name in names} == set(WRITTEN)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_card_has_every_section(name):
    assert WRITTEN[name].startswith(f"# {name}\n\n")
    headings = re.findall(r"^## (.*)$", WRITTEN[name], re.MULTILINE)
    assert [heading for heading in headings if heading != "Cost"] == HEADINGS
    assert ("Cost" in headings) == (not cards.cost(name, BENCHMARKS)), "what is measured comes from the benchmarks"
    assert f"{name}(" in WRITTEN[name].split("\n## ")[0], "the first part shows how to make it"


@pytest.mark.parametrize("name", sorted({*ROWS}))
def test_picture_is_drawn(name):
    file = io.BytesIO()
    pictures.draw(name).savefig(file, format="svg")
    assert file.getbuffer().nbytes > 5000
    assert len(pictures.PICTURES[name].__doc__) > 20


def test_picture_shows_the_effect():
    """The bars after clipping are clipped."""
    figure = pictures.draw("WeightClipping")
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    before, after = heights[: len(heights) // 2], heights[len(heights) // 2 :]
    assert after == pytest.approx([max(-0.4, min(0.4, height)) for height in before])
    assert max(before) > 0.4


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_frame_keeps_every_word(name):
    page = cards.framed(name, WRITTEN[name])
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings == [*HEADINGS[:-1], "Cost", "Pitfalls", "Reference"]
    remaining = iter(page.split())
    assert all(word in remaining for word in WRITTEN[name].split())
    assert f".. autoclass:: lightning_reg.{name}\n" in page
    assert page.count("```{image}") == (name in ROWS)


def test_cost_comes_from_the_benchmarks():
    work = next(line for line in BENCHMARKS.splitlines() if line.startswith("| L1 on the gradients, 124M"))
    milliseconds = float(work.split("|")[2])
    assert f"L1 on the gradients, {milliseconds:.0f} ms" in cards.cost("L1Penalty", BENCHMARKS)
    overhead = next(line for line in BENCHMARKS.splitlines() if line.endswith("|") and "`L1Penalty`" in line)
    assert f"adds {overhead.split('|')[1].strip()} µs to a step" in cards.cost("L1Penalty", BENCHMARKS)
    assert all(len(cards.durations(name, BENCHMARKS)) == len(parts) for name, parts in cards.WORK.items())


def test_index_links_every_card():
    page = cards.index("# All", lambda name: f"{name}.html")
    assert {name for name in WRITTEN if f'href="{name}.html"' in page} == set(WRITTEN)
    assert page.count("_static/") == len(pictures.PICTURES)


def test_members_exist():
    for name, members in cards.MEMBERS.items():
        assert all(hasattr(getattr(lightning_reg, name), member) for member in members.split(", "))


def test_docstrings_are_escaped_outside_code():
    lines = [
        "    Y. Gal",
        "J = L + λ Σ|θ| (see ``a|b``), in_place_ and :attr:`x_`",
        "",
        ">>> '*'",
        "'*'",
        "",
        "a * b, *markers*",
    ]
    assert doctest.testmod(docstrings).failed == 0
    docstrings.escape(None, "", "", None, None, lines)
    assert lines == [
        r"    \Y. Gal",
        r"J = L + λ Σ\|θ\| (see ``a|b``), in_place\_ and :attr:`x_`",
        "",
        ">>> '*'",
        "'*'",
        "",
        r"a \* b, *markers*",
    ]


def test_pictures_show_what_their_descriptions_say():
    """The validation loss falls and rises, and the gap grows."""
    train, val, gap = (line.get_ydata() for line in pictures.draw("OverfittingMonitor").axes[0].lines)
    assert train[-1] < 0.2 < train[0]
    assert val.min() < 0.95 * min(val[0], val[-1])
    assert gap[-1] > gap[20] > gap[0]
