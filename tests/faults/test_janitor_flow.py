"""Deaths and ends of flow runs on a real worker: what the janitor brings to its end, and what an end must free."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cookbook import embedded
from tests.faults.prefect_stage import CHECKOUT, Stage, flow_process, until
from tests.faults.processes import backend_processes
from tests.flows.helpers import losses, run_here, sft_parameters, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
QUICK = {"settle_s": 8, "grace_s": 0, "pending_s": 25}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with Stage(tmp_path_factory.mktemp("stage"), {"COOKBOOK_HOME": str(home)}) as stage:
        stage.start_server()
        stage.make_pool()
        stage.deploy()
        stage.start_worker()
        yield stage
    embedded.stop(home)


@pytest.fixture(scope="module")
def undisturbed(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    model = make_tiny_model(folder / "tiny")
    rows = write_rows(folder / "rows.jsonl")
    parameters = sft_parameters(folder / "run", model, rows, epochs=5, weight_sync={"dcp_save_interval": 2})
    run_here(parameters, stage.environment)
    return parameters


def workers_of(stage):
    """Trainers and deployments that have a process."""
    return [
        found
        for found in backend_processes(Path(stage.environment["COOKBOOK_HOME"]))
        if found.role in ("trainer", "reference", "deployment")
    ]


def run_janitor(stage):
    """One turn of the janitor, on a worker."""
    run_id = stage.submit("janitor", QUICK)
    until(lambda: stage.state(run_id) in FINAL, 120, "the janitor ends", poll_s=0.5)
    assert stage.state(run_id) == "COMPLETED", stage.logs(run_id)


def kill_flow(log_path):
    pid = flow_process(log_path)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_worker(stage):
    for worker in stage.live_workers():
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("killed", ["flow", "worker", "both"])
def test_a_flow_run_that_dies_at_a_random_moment_is_brought_to_its_end(stage, undisturbed, tmp_path, killed, seed):
    """Also before it has started; with its worker gone, by one that is started afterwards."""
    log_path = tmp_path / "run"
    parameters = {**undisturbed, "log_path": str(log_path)}
    run_id = stage.submit("sft", parameters)
    until(lambda: stage.state(run_id) not in ("SCHEDULED",), 60, "a worker takes the flow run")
    time.sleep(random.Random(f"{killed} {seed}").uniform(0, 12))
    if killed != "flow":
        kill_worker(stage)
    if killed != "worker":
        kill_flow(log_path)
    if not stage.live_workers():
        stage.start_worker()
    for _ in range(6):
        with suppress(AssertionError):
            until(lambda: stage.state(run_id) == "COMPLETED", 25, "the flow run ends", poll_s=0.5)
            break
        run_janitor(stage)
    assert stage.state(run_id) == "COMPLETED", (stage.history(run_id), stage.logs(run_id))
    assert losses(parameters) == losses(undisturbed)
    run_janitor(stage)
    assert workers_of(stage) == []


def test_a_cancelled_flow_run_frees_everything_and_is_not_retried(stage, undisturbed, tmp_path):
    parameters = {**undisturbed, "log_path": str(tmp_path / "run"), "epochs": 200}
    run_id = stage.submit("sft", parameters)
    until(lambda: max(losses(parameters), default=0) >= 3, 120, "training begins")
    stage.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: stage.state(run_id) == "CANCELLED", 60, "the flow run is cancelled")
    until(lambda: workers_of(stage) == [], 30, "its trainer is freed")
    assert flow_process(tmp_path / "run") is None
    run_janitor(stage)
    assert stage.state(run_id) == "CANCELLED"


TIMED_OUT = """
import sys, json
from cookbook.config import SFTConfig
from flows.sft import sft
sft.with_options(timeout_seconds=float(sys.argv[2]))(SFTConfig.model_validate(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("seconds", [3, 6, 25])
def test_a_flow_run_that_times_out_frees_everything(stage, undisturbed, tmp_path, seconds):
    """While its trainer starts, in a task with a time-out of its own; and while it trains."""
    parameters = {**undisturbed, "log_path": str(tmp_path / "run"), "epochs": 2000}
    done = subprocess.run(
        [sys.executable, "-c", TIMED_OUT, json.dumps(parameters), str(seconds)],
        cwd=CHECKOUT,
        env=stage.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "TimeoutError" in done.stderr, done.stderr
    assert workers_of(stage) == []
