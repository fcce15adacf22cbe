"""What the README shows is run, and what it lists is what there is."""

from __future__ import annotations

import re
import shlex

import pytest
from processes import HERE, run_script
from table import ROWS

README = (HERE.parent / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
]
SCRIPT_CALLS = [words[1:] for words in SHELL if words[:2] == [".venv/bin/python", "examples/digits.py"]]


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("words", SCRIPT_CALLS, ids=" ".join)
def test_commands_run(words, tmp_path):
    script, *flags = [str(HERE.parent / word) if word.startswith("examples/") else word for word in words]
    short = [] if "help" in " ".join(flags) else ["--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]
    run_script(script, *flags, *short)


def test_there_are_blocks_to_run():
    assert len(PYTHON) == 4
    assert len(SCRIPT_CALLS) == 3


def cells(text):
    """Return the cells of the drawn table of regularizers, whatever the widths of its columns."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.split("Regularization", 1)[-1].splitlines()]
    return [row for row in rows if len(row) == 4]


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_the_table_shown_is_the_table_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    exec(compile(PYTHON[0], "README.md", "exec"), {"__name__": "readme"})
    assert cells(README[README.index("\nRegularization\n") :]) == cells(capsys.readouterr().out)[:5]


def test_every_callback_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)", README, re.MULTILINE))
    assert rows == {*ROWS, "Penalty"}


def test_ci_runs_the_test_command():
    """Taken from the README, so that the two cannot differ."""
    assert "<!-- test command -->" in (HERE.parent / ".ci" / "run").read_text()
    (commands,) = re.findall(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands.endswith(".venv/bin/python -m pytest")
    assert commands.count("\n") == 0
