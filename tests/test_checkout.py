"""What tests and the processes that they start import is the checkout that they are in, whatever is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest
from processes import HERE, ROOT

TEST = """
import lightning_reg

def test_version():
    assert lightning_reg.__version__ == "mine"
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Return a small checkout of a package ``mine``, and work in another folder, with a package ``other`` on the path."""
    for name in ("mine", "other"):
        package = tmp_path / name / "lightning_reg"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f'__version__ = "{name}"\n')
    tests = tmp_path / "mine" / "tests"
    tests.mkdir()
    (tests / "test_version.py").write_text(TEST)
    shutil.copy(HERE / "processes.py", tests)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shows.py").write_text("import lightning_reg; print(lightning_reg.__version__)")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    return tmp_path / "mine"


@pytest.fixture
def start_mine(mine):
    """Return what starts processes in the small checkout."""
    spec = importlib.util.spec_from_file_location("processes_of_mine", mine / "tests" / "processes.py")
    processes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processes)
    return processes.start


def plain(*command):
    """Start a process without a checkout on its path."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, check=False)


def test_processes_import_their_checkout(start_mine):
    assert start_mine("shows.py").stdout == "mine\n"
    assert plain("shows.py").stdout == "other\n"


def test_ranks_import_their_checkout(two_ranks, mine, start_mine):
    launcher = two_ranks(mine.parent / "elsewhere" / "shows.py")
    assert start_mine(*launcher).stdout.split() == ["mine", "mine"]
    assert plain(*launcher).stdout.split() == ["other", "other"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pytest_imports_its_checkout(mine, workers):
    """From any folder, and in the workers of pytest-xdist."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-n", workers, str(mine / "tests")]
    done = plain(*command)
    assert done.returncode == 0, done.stdout
    assert "assert 'other' == 'mine'" in plain(*command, "-o", "pythonpath=").stdout


def test_this_process_imports_this_checkout():
    assert importlib.util.find_spec("lightning_reg").origin == str(ROOT / "lightning_reg" / "__init__.py")


def test_ranks_are_started_in_one_place():
    """By the fixture that marks its tests as distributed."""
    launcher = '"torch.distributed' + '.run"'
    assert [path.name for path in HERE.rglob("*.py") if launcher in path.read_text()] == ["conftest.py"]


def test_tests_of_two_ranks_are_marked(request, two_ranks):
    assert {"slow", "distributed"} <= {mark.name for mark in request.node.iter_markers()}
