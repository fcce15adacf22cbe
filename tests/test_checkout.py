"""Tests and the processes they start import this checkout, whatever package is installed."""

from __future__ import annotations

import importlib.util
import re
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
def checkout(tmp_path, monkeypatch):
    """Return a small checkout of a package ``mine``; work in another folder, with a package ``other`` on the path."""
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
def start_in_checkout(checkout):
    """Return the ``start`` function of the small checkout."""
    spec = importlib.util.spec_from_file_location("processes_of_checkout", checkout / "tests" / "processes.py")
    processes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processes)
    return processes.start


def plain(*command):
    """Run Python without the checkout on its path."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, check=False)


def test_processes_import_their_checkout(start_in_checkout):
    assert start_in_checkout("shows.py").stdout == "mine\n"
    assert plain("shows.py").stdout == "other\n"


def test_ranks_import_their_checkout(two_ranks, checkout, start_in_checkout):
    launcher = two_ranks(checkout.parent / "elsewhere" / "shows.py")
    assert re.findall("mine|other", start_in_checkout(*launcher).stdout) == ["mine"] * 2  # two ranks may share a line
    assert re.findall("mine|other", plain(*launcher).stdout) == ["other"] * 2  # two ranks may share a line


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pytest_imports_its_checkout(checkout, workers):
    """From any folder, also in pytest-xdist workers."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-n", workers, str(checkout / "tests")]
    result = plain(*command)
    assert result.returncode == 0, result.stdout
    assert "assert 'other' == 'mine'" in plain(*command, "-o", "pythonpath=").stdout


def test_this_process_imports_checkout():
    assert importlib.util.find_spec("lightning_reg").origin == str(ROOT / "lightning_reg" / "__init__.py")


def test_only_conftest_launches_ranks():
    """The fixture there marks its tests as distributed."""
    launcher = '"torch.distributed' + '.run"'
    assert [path.name for path in HERE.rglob("*.py") if launcher in path.read_text()] == ["conftest.py"]


def test_two_rank_tests_are_marked(request, two_ranks):
    assert {"slow", "distributed"} <= {mark.name for mark in request.node.iter_markers()}
