"""Small pictures of what each technique does, drawn with the functions of this package."""

from __future__ import annotations

from pathlib import Path

PICTURES = {}


def draw_all(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
