"""Every public docstring is plain text and has the sections that apply to it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import pytest

import lightning_reg
from lightning_reg import custom, functional, schedules
from lightning_reg.custom import Regularizer

WITHOUT_REFERENCE = {
    "MinMaxNorm": "it joins two bounds, each with its own source",
    "NonFiniteGradientGuard": "common practice, no paper",
    "ParameterMonitor": "it measures, and every norm is a definition",
    "PeakGradientDropping": "a rule of this package",
    "RandomShrinkage": "a rule of this package",
    "Penalty": "an abstract base",
}
"""Callbacks without a reference, with the reason."""


def public(namespace):
    names = getattr(namespace, "__all__", None) or [name for name in vars(namespace) if not name.startswith("_")]
    return {name: getattr(namespace, name) for name in names}


EVERYTHING = {**public(functional), **public(schedules), **public(custom), **public(lightning_reg)}
FUNCTIONS = {name: value for name, value in EVERYTHING.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in EVERYTHING.items() if inspect.isclass(value)}
CALLBACKS = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Regularizer) and name in lightning_reg.__all__}


def section(doc, title):
    """Return the text of a Google-style section, or ``None``."""
    match = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", doc + "\n", re.MULTILINE)
    return match and match[1]


def raises_errors(function):
    """Return whether a function contains a raise statement."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def arguments(value):
    skipped = ("self", "args", "kwargs")
    return [name for name in inspect.signature(value).parameters if name not in skipped]


def check_arguments(name, value, doc):
    documented = re.findall(r"^    (\w+)(?:, \w+)*: ", section(doc, "Args") or "", re.MULTILINE)
    assert documented == arguments(value), f"{name}: Args documents {documented}, the signature has {arguments(value)}"


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_docstring_is_plain_text(name):
    if not (inspect.isclass(EVERYTHING[name]) or inspect.isfunction(EVERYTHING[name])):
        return
    doc = inspect.getdoc(EVERYTHING[name])
    assert doc, f"{name} has no docstring"
    assert ":math:" not in doc
    assert "\\" not in doc.replace("\\n", ""), "docstrings are also command-line help, so they must not contain LaTeX"
    assert re.match(r"[^\n]{10,130}[.:]\n|[^\n]{10,130}[.:]?$", doc), "the summary must fit one line"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_docstring_has_all_sections(name):
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function)
    check_arguments(name, function, doc)
    returns = inspect.signature(function).return_annotation
    assert section(doc, "Returns") or returns in (None, "None") or doc.startswith("Return"), f"{name}: Returns is missing"
    assert section(doc, "Raises") or not raises_errors(function), f"{name}: Raises is missing"
    assert ">>>" in (section(doc, "Example") or ""), f"{name}: Example is missing"


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_callback_docstring_has_all_sections(name):
    cls = CALLBACKS[name]
    doc = inspect.getdoc(cls)
    assert re.search(r"^Runs in: ", doc, re.MULTILINE), f"{name}: Runs in is missing"
    check_arguments(name, cls, doc)
    assert re.search(r"(Value|Type|Runtime)Error: ", section(doc, "Raises") or ""), f"{name}: Raises is missing"
    assert ">>>" in (section(doc, "Example") or ""), f"{name}: Example is missing"
    reference = section(doc, "Reference") or ""
    if name in WITHOUT_REFERENCE:
        assert not reference
    else:
        assert re.search(r"\"[^\"]+\", \d{4}", " ".join(reference.split())), f'{name}: Reference needs authors, "title", year'


def test_missing_section_is_detected():
    doc = "Do something.\n\nArgs:\n    one: First.\n\nExample:\n    >>> 1\n    1\n"
    assert section(doc, "Args") == "    one: First.\n\n"
    assert section(doc, "Raises") is None
    with pytest.raises(AssertionError, match="documents"):
        check_arguments("f", lambda one, two: None, doc)
