"""Two live processes of one run: one is paused, another takes the run over, the first wakes up. It must do nothing.

A paused process keeps its lock. So that there can be two, the lock file is removed, as on a file system that forgets
locks: what is left are the epoch of the lease and the trainer's refusal of an older epoch.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from cookbook.files import try_lock
from tests.faults import driver
from tests.faults.checks import differences, log_of, outcome
from tests.faults.driver import journal
from tests.faults.processes import state_of
from tests.faults.runs import config_of, home_of_suite, run_once

POINTS = (
    "train_step.before",
    "train_step.after",
    "log.before",
    "save.before",
    "save_confirmed.after",
    "promote.before",
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
WITHIN_S = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with home_of_suite(tmp_path_factory.mktemp("fence")) as place:
        yield place


@pytest.fixture(scope="module")
def undisturbed(place):
    config = config_of("sft", 0, place, place.folder / "undisturbed")
    assert run_once("sft", config, place).status == 0
    return outcome("sft", config, place.home)


def wait_until_paused(process, config):
    deadline = time.monotonic() + WITHIN_S
    while process.exitcode is not None or state_of(process.pid) != "T":
        assert process.exitcode is None, log_of(config).read_text()[-2000:]
        assert time.monotonic() < deadline, "the run did not come to where it is to be paused"
        time.sleep(0.02)


def steps_of(process, config, kind):
    """The steps that a process has begun ("trained") or that were answered ("stepped")."""
    events = map(json.loads, journal(log_of(config)).read_text().splitlines())
    return {event["step"] for event in events if event["event"] == kind and event["pid"] == process.pid}


def is_writing(config):
    """Whether the process was paused in the middle of a write, by another of its threads: nobody can follow it then."""
    lock = try_lock(Path(config["log_path"]) / ".write.lock")
    if lock is not None:
        os.close(lock)
    return lock is None


def files_of(config):
    """Everything in the run directory. Its owner is paused, so nobody may change anything."""
    return {path: path.read_bytes() for path in Path(config["log_path"]).rglob("*") if path.is_file()}


@pytest.fixture
def start(place):
    """Starts a run until its process stops itself at a point; killed at the end of the test, also when it is paused."""
    started = []

    def start(config, point):
        process = driver.start("sft", config, log=log_of(config), environment=place.environment, kills=[point])
        started.append(process)
        wait_until_paused(process, config)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("point", POINTS)
def test_who_was_overtaken_does_nothing_any_more(place, undisturbed, start, point):
    for attempt in range(10):
        config = config_of("sft", 0, place, place.folder / f"overtaken-at-{point.replace('.', '-')}-{attempt}")
        overtaken = start(config, f"pause@{point}:1")
        if not is_writing(config):
            break
    begun = steps_of(overtaken, config, "trained")  # the trainer may have done the last one, and not have been heard
    (Path(config["log_path"]) / ".lock").unlink()
    owner = start(config, "pause@promote.after:1" if point == "promote.before" else "pause@log.after:4")

    written = files_of(config)
    os.kill(overtaken.pid, signal.SIGCONT)
    assert driver.wait(overtaken, WITHIN_S) == 1
    assert "LeaseLost" in log_of(config).read_text()
    assert files_of(config) == written
    assert steps_of(overtaken, config, "stepped") <= begun
    os.kill(owner.pid, signal.SIGCONT)
    assert driver.wait(owner, WITHIN_S) == 0
    assert differences("sft", config, place.home, undisturbed) == []
