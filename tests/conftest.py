"""Starts ranks, marks the tests that do so, and distributes the tests over the cores."""

import os

import pytest
import torch
from processes import HERE, run_script

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what LightningCLI calls
os.environ.pop("COLUMNS", None)  # workers have it from readline, and rich keeps the first value that it sees
torch.set_num_threads(1)

JOBS = ["two_ranks", "job", "runs"]
"""Fixtures that start long jobs: the tests that use one are slow."""

LONGEST = [
    "test_example",
    "test_distributed_laws",
    "test_laws",
    "test_distributed",
    "test_cli",
    "test_pytorch_lightning",
    "test_killed",
    "test_resume",
    "test_cuda",
    "test_checkout",
    "test_solvers",
    "test_dropout_compile",
]
"""Files to start with, the longest first. Each file is a whole for pytest-xdist, whose jobs run once; others fill the gaps."""


@pytest.fixture(scope="session")
def two_ranks():
    """Return what starts a script of the tests in two ranks: the arguments of Python, for ``processes``."""

    def arguments(script):
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / script)]

    return arguments


@pytest.fixture(scope="module")
def ranks(request, two_ranks, tmp_path_factory):
    """Return what each of two ranks saved, of the script that the module names as its ``WORKER``."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(*two_ranks(request.module.WORKER), str(folder), timeout=600)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def pytest_addoption(parser, pluginmanager):
    """Accept the project's options for pytest-xdist where ``-p no:xdist`` leaves it out."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses", "--dist", help="of pytest-xdist, ignored")
        parser.addoption("--no-loadscope-reorder", action="store_true", help="of pytest-xdist, ignored")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Use at most four cores: more workers would only wait for the jobs of two ranks. Named files run in this process."""
    if all(".py" in argument for argument in config.args):
        return 0
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark the tests that use a job, and start with the files that take longest, so that the workers end together."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if any(job in fixtures for job in JOBS):
            item.add_marker("slow")
        if "two_ranks" in fixtures:
            item.add_marker("distributed")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
