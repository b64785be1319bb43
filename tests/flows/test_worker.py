"""The deployment of prefect.yaml, for real: deploy, a worker in its own process, a run from submitted parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.helpers import sft_parameters

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
def worker(prefect_environment, backend_home, tmp_path_factory):
    environment = {**prefect_environment, "COOKBOOK_HOME": str(backend_home)}
    prefect("work-pool", "create", "cookbook", "--type", "process", environment=environment)
    prefect("--no-prompt", "deploy", "--all", environment=environment)
    log = (tmp_path_factory.mktemp("worker") / "worker.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "cookbook"],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    yield environment
    process.terminate()
    process.wait(30)
    log.close()


def test_a_worker_runs_the_flow_from_submitted_parameters(worker, tiny_model, rows_file, tmp_path):
    parameters = sft_parameters(tmp_path / "run", tiny_model, rows_file, epochs=2)
    submit = ["deployment", "run", "sft/sft", "--params", json.dumps({"config": parameters})]
    prefect(*submit, "--watch", "--watch-timeout", "180", environment=worker, timeout_s=200)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["steps"] == 2 * 3


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
