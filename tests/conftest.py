"""Fixtures for distributed runs, markers, and settings of pytest-xdist."""

import os

import pytest
import torch
from processes import HERE, run_script

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # LightningCLI triggers them
os.environ.pop("COLUMNS", None)  # readline sets it in workers, and rich keeps the first value it sees
torch.set_num_threads(1)

collect_ignore = ["zoo"]  # it needs libraries of its own, which .ci/zoo installs

JOBS = ["two_ranks", "job", "runs"]
"""Fixtures that start long jobs. Tests that use one are marked slow."""

LONGEST = [
    "test_example",
    "test_distributed_laws",
    "test_laws",
    "test_distributed",
    "test_distributed_mesh",
    "test_cli",
    "test_example_language_transformer",
    "test_tuning_storage",
    "test_pytorch_lightning",
    "test_pytorch_lightning_ranks",
    "test_distributed_pruning",
    "test_killed",
    "test_resume",
    "test_cuda",
    "test_checkout",
    "test_solvers",
    "test_dropout_compile",
]
"""Files to run first, longest first. pytest-xdist runs each file in one worker, so that each job runs once."""


@pytest.fixture(scope="session")
def two_ranks():
    """Return a function that gives the Python arguments to launch a test script on two or more ranks, for ``processes``."""

    def arguments(script, ranks=2):
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(HERE / script)]

    return arguments


@pytest.fixture(scope="module")
def ranks(request, two_ranks, tmp_path_factory):
    """Run the module's ``WORKER`` script on two ranks and return what each rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(*two_ranks(request.module.WORKER), str(folder), timeout=600)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def pytest_addoption(parser, pluginmanager):
    """Accept the pytest-xdist options of ``pyproject.toml`` even if ``-p no:xdist`` disables the plugin."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses", "--dist", help="pytest-xdist option, ignored")
        parser.addoption("--no-loadscope-reorder", action="store_true", help="pytest-xdist option, ignored")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Use at most four workers, since more would only wait for the two-rank jobs. Named files run in this process."""
    if all(".py" in argument for argument in config.args):
        return 0
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)  # run before -m selects
def pytest_collection_modifyitems(items):
    """Mark tests that use a job. Run the longest files first, so that the workers finish together."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if any(job in fixtures for job in JOBS):
            item.add_marker("slow")
        if "two_ranks" in fixtures:
            item.add_marker("distributed")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
