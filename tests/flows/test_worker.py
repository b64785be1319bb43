"""The deployment of prefect.yaml, for real: deploy, a worker in its own process, a run from submitted parameters."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from cookbook.config import Environment
from cookbook.control_plane import connect
from tests.flows.helpers import losses, sft_parameters, wait_for

CHECKOUT = Path(__file__).parents[2]


def prefect(*arguments, environment, timeout_s=120):
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"prefect {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def workers():
    """Worker processes, ended with the module."""
    processes = []
    yield processes
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(30)


@pytest.fixture(scope="module")
def worker(environment, workers, tmp_path_factory):
    prefect("work-pool", "create", "cookbook", "--type", "process", environment=environment)
    prefect("--no-prompt", "deploy", "--all", environment=environment)
    pause_the_janitor(environment)  # the tests say when it runs
    workers.append(start_worker(environment, tmp_path_factory.mktemp("worker")))
    return environment


def start_worker(environment, folder):
    with (folder / "worker.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "cookbook"],
            env={**environment, "PREFECT_WORKER_QUERY_SECONDS": "2"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def pause_the_janitor(environment):
    api = environment["PREFECT_API_URL"]
    deployment = httpx.get(f"{api}/deployments/name/janitor/janitor", timeout=30).raise_for_status().json()
    assert [schedule["schedule"]["interval"] for schedule in deployment["schedules"]] == [300]
    assert deployment["work_queue_name"] == "janitor"  # not behind the runs
    httpx.patch(f"{api}/deployments/{deployment['id']}", json={"paused": True}, timeout=30).raise_for_status()


def test_a_worker_runs_the_flow_from_submitted_parameters(worker, tiny_model, rows_file, tmp_path):
    parameters = sft_parameters(tmp_path / "run", tiny_model, rows_file, epochs=2)
    submit = ["deployment", "run", "sft/sft", "--params", json.dumps({"config": parameters})]
    prefect(*submit, "--watch", "--watch-timeout", "180", environment=worker, timeout_s=200)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["steps"] == 2 * 3
    query = {"sort": "TIMESTAMP_DESC", "limit": 50}
    logs = httpx.post(f"{worker['PREFECT_API_URL']}/logs/filter", json=query, timeout=30).raise_for_status().json()
    assert any(log["message"].startswith("step 6 of 6, loss ") for log in logs), "the run's page shows no losses"


def test_a_bad_config_is_refused_before_a_run_exists(worker, tmp_path):
    config = {"config": {"log_path": str(tmp_path / "run"), "base_model": "m", "dataset": "d", "learning_rte": 1e-4}}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", "sft/sft", "--params", json.dumps(config)],
        env=worker,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "learning_rte" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def submit(environment, parameters, flow="sft"):
    """Create a flow run of the deployment through the API; its id."""
    api = environment["PREFECT_API_URL"]
    deployment = httpx.get(f"{api}/deployments/name/{flow}/{flow}", timeout=30).raise_for_status().json()
    answer = httpx.post(
        f"{api}/deployments/{deployment['id']}/create_flow_run",
        json={"parameters": {"config": parameters}, "state": {"type": "SCHEDULED"}},
        timeout=30,
    )
    return answer.raise_for_status().json()["id"]


def flow_run(environment, run_id):
    answer = httpx.get(f"{environment['PREFECT_API_URL']}/flow_runs/{run_id}", timeout=30)
    return answer.raise_for_status().json()


def retry(environment, run_id):
    """Retry a crashed flow run, again where the first retry was overwritten by a late report of the crash."""
    for _ in range(3):
        time.sleep(6)
        if flow_run(environment, run_id)["state_type"] == "CRASHED":
            prefect("flow-run", "retry", run_id, environment=environment)
        if flow_run(environment, run_id)["state_type"] != "CRASHED":
            return


def test_a_flow_run_that_was_killed_resumes_by_prefects_retry(worker, undisturbed, tmp_path):
    parameters = {**undisturbed[0], "log_path": str(tmp_path / "run"), "output_model_id": None}
    run_id = submit(worker, parameters)
    wait_for(lambda: max(losses(parameters), default=0) >= 5, timeout_s=120)
    lease = json.loads((tmp_path / "run" / "run.json").read_text())["lease"]
    os.kill(lease["pid"], signal.SIGKILL)
    wait_for(lambda: flow_run(worker, run_id)["state_type"] == "CRASHED", timeout_s=60)
    retry(worker, run_id)
    wait_for(lambda: flow_run(worker, run_id)["state_type"] == "COMPLETED", timeout_s=120)
    assert flow_run(worker, run_id)["run_count"] == 2
    assert losses(parameters) == losses(undisturbed[0])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_from_step"] in (4, 6)


def test_a_schedule_makes_runs(worker, tiny_model, rows_file, tmp_path):
    """A server with newer libraries than the pinned ones takes a schedule, and silently makes no runs."""
    api = worker["PREFECT_API_URL"]
    deployment = httpx.get(f"{api}/deployments/name/sft/sft", timeout=30).raise_for_status().json()["id"]
    parameters = {"config": sft_parameters(tmp_path / "run", tiny_model, rows_file)}
    schedule = {"schedule": {"interval": 24 * 3600}, "active": True, "parameters": parameters, "slug": "daily"}
    made = (
        httpx.post(f"{api}/deployments/{deployment}/schedules", json=[schedule], timeout=30).raise_for_status().json()
    )
    query = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}

    def scheduled():
        return httpx.post(f"{api}/flow_runs/filter", json=query, timeout=30).raise_for_status().json()

    try:
        wait_for(lambda: len(scheduled()) >= 3, timeout_s=60)
        assert all(run["parameters"] == parameters for run in scheduled())
    finally:
        httpx.delete(f"{api}/deployments/{deployment}/schedules/{made[0]['id']}", timeout=30).raise_for_status()


def live_workers(home):
    """Ids of all trainers and deployments of a home that have a process."""
    with connect("embedded", Environment(home, fireworks_base_url="")) as control:
        listed = [*control.list_jobs(), *control.list_deployments()]
    return [found["name"] for found in listed if found["metadata"]["workerPid"] is not None]


def test_a_flow_run_whose_worker_died_with_it_is_brought_to_its_end_by_the_janitor(
    worker, workers, undisturbed, tmp_path, backend_home
):
    """By a worker that was started afterwards; the only one."""
    parameters = {**undisturbed[0], "log_path": str(tmp_path / "run"), "output_model_id": None}
    run_id = submit(worker, parameters)
    wait_for(lambda: max(losses(parameters), default=0) >= 5, timeout_s=120)
    os.killpg(workers[-1].pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(json.loads((tmp_path / "run" / "run.json").read_text())["lease"]["pid"], signal.SIGKILL)
    assert live_workers(backend_home) != []
    workers.append(start_worker(worker, tmp_path))
    janitor = submit(worker, {"settle_s": 2, "grace_s": 0}, flow="janitor")
    wait_for(lambda: flow_run(worker, janitor)["state_type"] in ("COMPLETED", "FAILED", "CRASHED"), timeout_s=90)
    wait_for(lambda: flow_run(worker, run_id)["state_type"] == "COMPLETED", timeout_s=90)
    assert flow_run(worker, run_id)["run_count"] == 2
    assert losses(parameters) == losses(undisturbed[0])
    assert json.loads((tmp_path / "run" / "supervisor.json").read_text())["retries"] == 1
    assert live_workers(backend_home) == []
