"""Searches that several processes share, or that one leaves unfinished: nothing is lost or counted twice.

On SQLite, and on a PostgreSQL server that the tests start in a folder of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from processes import HERE, environment
from tuning_worker import CONFIRM, RACED, TRIALS

from lightning_reg.tuning.storage import open_storage

pytestmark = pytest.mark.slow

SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


def as_user(*command, **options):
    """Run a command as a user that is not root, since PostgreSQL refuses to run as root."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    return subprocess.run([*user, *map(str, command)], check=True, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """Start a PostgreSQL server for an ordinary user, and return its address."""
    if not SERVERS:
        pytest.skip("there is no PostgreSQL server: apt-get install postgresql")
    if os.getuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("PostgreSQL does not run as root, and there is no setpriv to change the user")
    tools = SERVERS[-1].parent
    folder = Path("/tmp") / f"lightning-reg-postgres-{os.getpid()}"  # other users cannot enter pytest's folders
    folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, log = folder / "data", folder / "log"
    try:
        as_user(tools / "initdb", "--auth=trust", "--username=tester", "-D", data, cwd=folder)
        start = ["-o", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off", "-l", log, "-w"]
        as_user(tools / "pg_ctl", "-D", data, *start, "start", cwd=folder)
        as_user(tools / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "tester", "tuning", cwd=folder)
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}/tuning"
    finally:
        if (data / "postmaster.pid").exists():
            as_user(tools / "pg_ctl", "-D", data, "-m", "immediate", "stop", cwd=folder)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request, tmp_path):
    """Return the address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/choose.db"
    url = request.getfixturevalue("postgres")
    with open_storage(url) as opened:
        for study in optuna.get_all_study_names(opened):
            optuna.delete_study(study_name=study, storage=opened)
    return url


@pytest.fixture
def search(address, tmp_path):
    """Return a search on an empty database, and end its processes whatever happens."""
    search = Search(address, tmp_path)
    yield search
    search.end()


class Search:
    """Processes that call ``choose`` on one database."""

    def __init__(self, address, folder):
        self.address, self.folder = address, folder
        self.processes = []

    def end(self):
        """Kill what still runs, and close the pipes."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            if not process.stderr.closed:
                process.communicate()

    def start(self, hang_at=0):
        """Start a process, which may hang in a run until it is stopped."""
        command = [sys.executable, str(HERE / "tuning_worker.py"), self.address, str(self.folder), str(hang_at)]
        self.processes.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True))
        return self.processes[-1]

    def wait_for(self, process, runs):
        """Wait until a process has started some runs."""
        for _ in range(600):
            if sum(run["process"] == process.pid for run in self.runs()) >= runs:
                return
            time.sleep(0.1)
        pytest.fail(f"the process did not start {runs} runs: {process.poll()}")

    def runs(self):
        log = self.folder / "runs.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def results(self):
        return [json.loads(path.read_text()) for path in self.folder.glob("*.json")]

    def check(self, extra=0):
        """Check that each task was counted once, and run once but for some that a process did not finish."""
        with open_storage(self.address) as opened:
            studies = [optuna.load_study(study_name=name, storage=opened).trials for name in ("choose", "choose/runs")]
        for trials in studies:
            complete = Counter(trial.user_attrs.get("task") for trial in trials if trial.state.name == "COMPLETE")
            assert set(complete.values()) == {1}
            unfinished = {trial.user_attrs.get("task") for trial in trials if trial.state.name in ("RUNNING", "WAITING")}
            assert unfinished <= set(complete)
        search, others = ([trial for trial in trials if trial.state.name == "COMPLETE"] for trials in studies)
        assert len(search) == TRIALS
        assert len(self.runs()) == len(search) + len(others) + extra
        once = Counter((run["callbacks"], run["split"]) for run in self.runs() if run["split"] > 0)
        assert sum(count - 1 for count in once.values()) <= extra
        results = self.results()
        assert results
        assert all(result == results[0] for result in results)
        assert results[0]["trials"] == TRIALS
        confirmed = {split for _, split in once if split >= 6}
        assert len(confirmed) in (0, CONFIRM)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]


def test_two_processes_share_a_study(search):
    processes = [search.start(), search.start()]
    for process in processes:
        finish(process)
    search.check()
    assert len(search.results()) == 2
    assert len({run["process"] for run in search.runs()}) == 2


def test_processes_never_take_the_same_task(search):
    """Three of them, as fast as they can. SQLite needs a lock for this that Optuna does not take."""
    for process in [search.start("race") for _ in range(3)]:
        finish(process)
    assert Counter(run["task"] for run in search.runs()) == {str(number): 1 for number in range(RACED)}


def test_a_killed_process_loses_no_run(search):
    """The run it was in is done again, once, by a process that was there or by one that comes later."""
    killed, other = search.start(hang_at=3), search.start()
    search.wait_for(killed, 3)
    killed.kill()
    killed.communicate()
    finish(other)
    search.check(extra=1)


@pytest.mark.parametrize("address", ["sqlite"], indirect=True)
def test_an_interrupted_process_goes_on(search):
    """In a run after the search. Nobody waits for a heartbeat."""
    hang_at = TRIALS + 4
    process = search.start(hang_at)
    search.wait_for(process, hang_at)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    finish(search.start())
    search.check(extra=1)
