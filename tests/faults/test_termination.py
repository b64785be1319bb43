"""Being told to stop at any moment loses nothing, and of two processes of one run only one goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cookbook.checkpoints import last_commit
from cookbook.files import try_lock
from tests.faults import driver
from tests.faults.checks import differences, log_of, outcome, run_id_of
from tests.faults.prefect_stage import Stage, flow_process, until
from tests.faults.processes import backend_processes, state_of
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
    with suppress(ProcessLookupError):  # it has ended just now
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
    freeze(first, config)
    (Path(config["log_path"]) / ".lock").unlink()
    frozen_at = last_step(config)
    second = start("sft", config, place)
    wait_for(lambda: lease(config)["pid"] == second.pid, timeout_s=60)
    run_until(second, config, frozen_at + 1)
    os.kill(first.pid, signal.SIGCONT)
    assert driver.wait(first, 60) == 1
    log = log_of(config).read_text()
    assert "LeaseLost" in log
    assert f"was taken over by process {second.pid} on " in log
    assert driver.wait(second, 120) == 0, log[-4000:]
    assert log_of(config).read_text().count("Restoring from") == 0
    assert differences("sft", config, place.home, undisturbed("sft")) == []


def freeze(process, config):
    """Stop a process, and not in the middle of a write: nobody could follow it then."""
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: state_of(process.pid) == "T", timeout_s=10)
        lock = try_lock(Path(config["log_path"]) / ".write.lock")
        if lock is not None:
            os.close(lock)
            return
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.01)


def lease(config):
    return json.loads((Path(config["log_path"]) / "run.json").read_bytes())["lease"]


# -- the long forms, `make faults` -------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", driver.RECIPES)
def test_sigterm_at_random_moments_of_every_recipe_loses_nothing(recipe, place, undisturbed):
    """Up to ten moments a recipe: soon after the start (provisioning, preflight, restoring), or around a step."""
    expected = undisturbed(recipe)
    rng = random.Random(f"{recipe}-{SEED}")
    config = config_of(recipe, SEED, place, place.folder / f"{recipe}-told")
    config["weight_sync"] = {**config["weight_sync"], **NO_SAVES}
    told = 0
    for moment in range(10):
        place.forget_references()
        process = start(recipe, config, place)
        if moment % 3 == 0:
            process.join(rng.uniform(0.05, 3))
        else:
            run_until(process, config, last_step(config) + rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.05))
        if not told_to_stop(process, config, place):
            break
        told += 1
    assert told >= 6
    assert driver.wait(start(recipe, config, place), 240) == 0, log_of(config).read_text()[-4000:]
    assert differences(recipe, config, place.home, expected) == []


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", driver.RECIPES)
def test_two_live_processes_of_one_run_are_one_too_many(recipe, place, undisturbed):
    """The lock of a live run is forgotten while it trains; another process starts."""
    expected = undisturbed(recipe)
    config = config_of(recipe, SEED, place, place.folder / f"{recipe}-two")
    first = start(recipe, config, place)
    run_until(first, config, 3)
    (Path(config["log_path"]) / ".lock").unlink()
    second = start(recipe, config, place)
    assert driver.wait(first, 120) == 1, "the process that lost the run ended well"
    assert driver.wait(second, 240) == 0, log_of(config).read_text()[-4000:]
    log = log_of(config).read_text()
    assert f"was taken over by process {second.pid} on " in log
    assert log.count("Restoring from") == 0
    assert differences(recipe, config, place.home, expected) == []


@pytest.fixture(scope="module")
def stage(place):
    with Stage(place.folder / "stage", place.environment) as stage:
        stage.start_server()
        stage.make_pool()
        stage.deploy()
        stage.start_worker()
        yield stage


def submitted(stage, place, name, step):
    """A run of 600 steps on a worker, at a step: its config, flow run id and process."""
    config = config_of("sft", SEED, place, place.folder / name, epochs=120, weight_sync=NO_SAVES, output_model_id=None)
    run_id = stage.submit("sft", config)
    until(lambda: last_step(config) >= step, 120, "the run trains")
    return config, run_id, flow_process(Path(config["log_path"]))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_cancelled_flow_run_saves_and_ends_as_cancelled(stage, place):
    config, run_id, _ = submitted(stage, place, "cancelled", 5)
    stage.prefect("flow-run", "cancel", run_id)
    until(lambda: stage.state(run_id) == "CANCELLED" and flow_process(Path(config["log_path"])) is None, 60, "it ends")
    assert "Crashed" not in stage.history(run_id)
    commit = last_commit(config["log_path"])
    assert commit.step == last_step(config) >= 5
    assert any(f"told to stop: step {commit.step} is saved as" in line for line in stage.logs(run_id))
    assert [p for p in backend_processes(place.home) if run_id_of(config) in p.resource_id] == []


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_preempted_flow_run_saves_and_ends_as_crashed(stage, place):
    config, run_id, process = submitted(stage, place, "preempted", 5)
    os.kill(process, signal.SIGTERM)
    until(lambda: stage.state(run_id) == "CRASHED" and flow_process(Path(config["log_path"])) is None, 60, "it ends")
    assert last_commit(config["log_path"]).step == last_step(config) >= 5


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_flow_run_that_is_started_again_while_it_runs_goes_on_undamaged(stage, place):
    """Prefect lets a running flow run be started again: the second process leaves it to the first."""
    config, run_id, process = submitted(stage, place, "twice", 5)
    stage.retry_button(run_id)
    until(
        lambda: any("Both work for this flow run" in line for line in stage.logs(run_id)), 120, "the second is refused"
    )
    assert flow_process(Path(config["log_path"])) == process
    until(lambda: stage.state(run_id) == "COMPLETED", 300, "the first comes to its end")
    assert not {"Failed", "Crashed"} & set(stage.history(run_id))
    assert lease(config)["pid"] == process
    assert last_step(config) == 600
