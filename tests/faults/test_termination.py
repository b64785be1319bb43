"""Being told to stop at any moment loses nothing, and of two processes of one run only one goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from cookbook.checkpoints import last_commit
from tests.faults import driver
from tests.faults.checks import differences, log_of, outcome, run_id_of
from tests.faults.processes import backend_processes
from tests.faults.runs import config_of, home_of_suite
from tests.flows.helpers import losses, wait_for

SEED = 1
GRACE_S = 15.0
"""No save of the tiny model takes a tenth of it; freeing what there is comes on top."""
NO_SAVES = {"dcp_save_interval": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with home_of_suite(tmp_path_factory.mktemp("termination")) as place:
        yield place


@pytest.fixture(scope="module")
def undisturbed(place):
    """Recipe -> what its run comes to that nothing disturbs."""
    found = {}

    def of(recipe, **fields):
        if recipe not in found:
            config = config_of(recipe, SEED, place, place.folder / f"{recipe}-undisturbed", **fields)
            process = start(recipe, config, place)
            assert driver.wait(process, 240) == 0, log_of(config).read_text()[-4000:]
            found[recipe] = outcome(recipe, config, place.home)
        return found[recipe]

    return of


def start(recipe, config, place):
    return driver.start(recipe, config, log=log_of(config), environment=place.environment)


def last_step(config):
    return max(losses(config), default=0)


def run_until(process, config, step, timeout_s=120):
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + timeout_s
    while last_step(config) < step:
        assert process.exitcode is None, log_of(config).read_text()[-4000:]
        assert time.monotonic() < deadline, "nothing happened in time"
        process.join(0.01)


def told_to_stop(process, config, place):
    """Send SIGTERM, wait for the end, and check that it came in time, lost nothing and freed everything."""
    os.kill(process.pid, signal.SIGTERM)
    told = time.monotonic()
    status = driver.wait(process, 60)
    log = log_of(config).read_text()
    if status == 0:
        return False  # it had come to its end before
    assert status == 128 + signal.SIGTERM, log[-4000:]
    assert time.monotonic() - told < GRACE_S
    path = Path(config["log_path"])
    if path.exists():
        left = [p for p in backend_processes(place.home) if run_id_of(config) in p.resource_id]
        assert left == []
        commit = last_commit(path)
        assert (0 if commit is None else commit.step) == last_step(config), log[-4000:]
    return True


def test_sigterm_saves_also_without_periodic_saves_and_the_next_start_goes_on_from_there(place, undisturbed):
    config = config_of("sft", SEED, place, place.folder / "told", weight_sync=NO_SAVES)
    process = start("sft", config, place)
    run_until(process, config, 3)
    assert told_to_stop(process, config, place)
    told_at = last_step(config)
    assert f"told to stop: step {told_at} is saved as step-{told_at}\n" in log_of(config).read_text()
    assert driver.wait(start("sft", config, place), 120) == 0, log_of(config).read_text()[-4000:]
    assert differences("sft", config, place.home, undisturbed("sft")) == []


def test_a_run_that_another_process_took_over_stops_and_harms_nothing(place, undisturbed):
    """A process that is frozen, whose lock is forgotten, and that wakes up when another one has gone on."""
    config = config_of("sft", SEED, place, place.folder / "frozen", retry={"initial_delay_s": 0.1})
    first = start("sft", config, place)
    run_until(first, config, 4)
    os.kill(first.pid, signal.SIGSTOP)
    (Path(config["log_path"]) / ".lock").unlink()
    frozen_at = last_step(config)
    second = start("sft", config, place)
    wait_for(lambda: f"({second.pid})" in "" or lease(config)["pid"] == second.pid, timeout_s=60)
    run_until(second, config, frozen_at + 1)
    os.kill(first.pid, signal.SIGCONT)
    assert driver.wait(first, 60) == 1
    log = log_of(config).read_text()
    assert "LeaseLost" in log
    assert f"was taken over by process {second.pid} on " in log
    assert driver.wait(second, 120) == 0, log[-4000:]
    assert log_of(config).read_text().count("Restoring from") == 0
    assert differences("sft", config, place.home, undisturbed("sft")) == []


def lease(config):
    return json.loads((Path(config["log_path"]) / "run.json").read_bytes())["lease"]
