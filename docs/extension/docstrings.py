"""Make plain-text docstrings valid reStructuredText: formulas contain characters that are markup there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

CODE = re.compile(r"(``.*?``|:\w+:`[^`]*`|(?<!\w)\*\w+\*(?!\w))")  # and emphasis
INITIAL = re.compile(r"^( *)(?=[A-Z]\. )")  # of an author, which would begin a list
MARKUP = re.compile(r"([|*]|(?<=\w)_(?!\w))")


def escaped(line: str) -> str:
    r"""Return a line in which ``|θ|``, ``*``, and a final ``_`` stand for themselves outside code.

    Example:
        >>> print(escaped("L1: J = L + λ Σ|θ|, see ``a|b``"))
        L1: J = L + λ Σ\|θ\|, see ``a|b``
    """
    line = INITIAL.sub(r"\1\\", line)
    return "".join(part if CODE.fullmatch(part) else MARKUP.sub(r"\\\1", part) for part in CODE.split(line))


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape the lines of a docstring of this package in place."""
    code = False
    for number, line in enumerate(lines):
        code = bool(line.strip()) and (code or line.lstrip().startswith(">>>"))  # a doctest ends at an empty line
        lines[number] = line if code else escaped(line)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, before napoleon turns sections into fields."""
    app.connect("autodoc-process-docstring", escape, priority=400)
    return {"parallel_read_safe": True}
