"""The deployments of prefect.yaml, for real: deploy, workers in processes of their own, runs from submitted parameters.

How each way of going on fares under many kills: tests/faults/test_prefect_kills.py.
"""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from cookbook.config import Environment
from cookbook.control_plane import connect
from tests.faults.prefect_stage import Stage, flow_process, until
from tests.flows.helpers import losses, run_here, sft_parameters


@pytest.fixture(scope="module")
def stage(environment, tmp_path_factory):
    with Stage(tmp_path_factory.mktemp("stage"), environment) as stage:
        stage.make_pool()
        stage.start_worker()  # it starts while the deployments are made
        stage.deploy()
        yield stage


def test_a_submitted_run_that_is_killed_twice_ends_as_an_undisturbed_one(
    stage, environment, backend_home, tiny_model, rows_file, tmp_path
):
    """First its process alone, and Prefect's retry brings it on; then its worker as well, and the janitor does, by a
    worker that was started afterwards."""
    fields = {"epochs": 10, "lr_schedule": "cosine", "weight_sync": {"dcp_save_interval": 2}}
    parameters = sft_parameters(tmp_path / "run", tiny_model, rows_file, **fields)
    submitted = stage.prefect("deployment", "run", "sft/sft", "--params", json.dumps({"config": parameters}))
    run = submitted.split("UUID: ")[1].split()[0]

    kill_at(5, parameters)
    until(lambda: stage.state(run) == "CRASHED", 60, "Prefect knows of the death")
    stage.retried(run, stage.retry_command)

    kill_at(15, parameters, stage.workers[0])
    assert live_workers(backend_home) != []
    stage.start_worker()
    janitor = stage.submit("janitor", {"settle_s": 2, "grace_s": 0})
    until(lambda: stage.state(janitor) == "COMPLETED", 90, "the janitor is done")
    until(lambda: stage.state(run) == "COMPLETED", 90, "the run is done")

    assert stage.flow_run(run)["run_count"] == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["recipe"]) == ("completed", 30, "sft")
    assert json.loads((tmp_path / "run" / "supervisor.json").read_text())["retries"] == 1
    until(lambda: any(line.startswith("step 30 of 30, loss ") for line in stage.logs(run)), 30, "losses on the page")
    assert live_workers(backend_home) == []
    undisturbed = {**parameters, "log_path": str(tmp_path / "undisturbed")}
    run_here(undisturbed, environment)
    assert losses(parameters) == losses(undisturbed)


def kill_at(step, parameters, worker=None):
    """SIGKILL for the process of a run when it has done so many steps, and for its worker."""
    until(lambda: max(losses(parameters), default=0) >= step, 120, f"step {step}", poll_s=0.02)
    if worker is not None:
        os.killpg(worker.pid, signal.SIGKILL)
    if (pid := flow_process(Path(parameters["log_path"]))) is not None:
        os.kill(pid, signal.SIGKILL)


def live_workers(home):
    """Ids of all trainers and deployments of a home that have a process."""
    with connect("embedded", Environment(home, fireworks_base_url="")) as control:
        listed = [*control.list_jobs(), *control.list_deployments()]
    return [found["name"] for found in listed if found["metadata"]["workerPid"] is not None]


def test_a_bad_config_is_refused_before_a_run_exists(stage, tmp_path):
    config = {"log_path": str(tmp_path / "run"), "base_model": "m", "dataset": "d", "learning_rte": 1e-4}
    with pytest.raises(httpx.HTTPStatusError) as refused:
        stage.submit("sft", config)
    assert refused.value.response.status_code == 409
    assert "learning_rte" in refused.value.response.text
    assert not (tmp_path / "run").exists()


def test_the_janitor_is_scheduled_and_waits_for_no_run(stage):
    janitor = stage.deployment("janitor")
    assert [schedule["schedule"]["interval"] for schedule in janitor["schedules"]] == [300]
    assert janitor["work_queue_name"] == "janitor"


def test_a_schedule_makes_runs(stage, tiny_model, rows_file, tmp_path):
    """A server with newer libraries than the pinned ones takes a schedule, and silently makes no runs."""
    deployment = stage.deployment("sft")["id"]
    parameters = {"config": sft_parameters(tmp_path / "run", tiny_model, rows_file)}
    schedule = {"schedule": {"interval": 24 * 3600}, "active": True, "parameters": parameters, "slug": "daily"}
    made = stage.call("POST", f"/deployments/{deployment}/schedules", [schedule])
    query = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    try:
        runs = until(
            lambda: found if len(found := stage.call("POST", "/flow_runs/filter", query)) >= 3 else [], 120, "runs"
        )
        assert all(run["parameters"] == parameters for run in runs)
    finally:
        stage.call("DELETE", f"/deployments/{deployment}/schedules/{made[0]['id']}")
