"""The SFT flow end to end on the embedded backend, each run in a process of its own, as `cookbook run` starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.flows.helpers import BATCH_SIZE, NUM_ROWS, sft_parameters, write_rows

STEPS_PER_EPOCH = NUM_ROWS // BATCH_SIZE


@pytest.fixture(scope="module")
def environment(prefect_environment, backend_home):
    return {**prefect_environment, "COOKBOOK_HOME": str(backend_home)}


def start(parameters, environment):
    """`cookbook run sft` with these parameters, as a process."""
    config = os.path.join(os.path.dirname(parameters["log_path"]), f"{os.path.basename(parameters['log_path'])}.yaml")
    with open(config, "w") as file:
        json.dump(parameters, file)  # JSON is YAML
    return subprocess.Popen(
        [sys.executable, "-m", "cookbook.cli", "run", "sft", "--config", config, "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout_s=150):
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"{out}\n{err}"
    return json.loads(out.strip().splitlines()[-1])


def metrics(parameters):
    with open(os.path.join(parameters["log_path"], "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def losses(parameters):
    return {row["step"]: row["train/loss"] for row in metrics(parameters) if "train/loss" in row}


def wait_for(condition, process, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended too early:\n{process.communicate()[1]}"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def steps_logged(parameters):
    try:
        return max(losses(parameters), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


@pytest.fixture(scope="module")
def undisturbed(environment, tiny_model, tmp_path_factory):
    """A run of four epochs that nothing disturbs: parameters and summary."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows, held_out = write_rows(folder / "rows.jsonl"), write_rows(folder / "held_out.jsonl", 8, start=100)
    parameters = sft_parameters(
        folder / "run",
        tiny_model,
        rows,
        epochs=4,
        lr_schedule="cosine",
        warmup_ratio=0.2,
        weight_sync={"dcp_save_interval": 2},
        evaluation={"dataset": str(held_out)},
        output_model_id="tiny-tuned",
    )
    return parameters, finish(start(parameters, environment))


def test_a_run_learns_commits_and_promotes(undisturbed, backend_home):
    parameters, summary = undisturbed
    assert summary["status"] == "completed"
    assert summary["steps"] == 4 * STEPS_PER_EPOCH
    assert summary["evaluation"]["after"]["loss"] < summary["evaluation"]["before"]["loss"]
    with open(os.path.join(parameters["log_path"], "checkpoints.jsonl")) as file:
        commits = [json.loads(line) for line in file]
    assert [row["step"] for row in commits] == [2, 4, 6, 8, 10, 12]
    assert "sampler_path" in commits[-1]
    assert "sampler_path" not in commits[0]
    assert (backend_home / "models" / "tiny-tuned" / "config.json").exists()


def test_a_finished_run_started_again_answers_at_once_and_trains_nothing(undisturbed, environment):
    parameters, summary = undisturbed
    before = metrics(parameters)
    again = finish(start(parameters, environment))
    assert again["steps"] == summary["steps"]
    assert again["evaluation"] == summary["evaluation"]
    assert metrics(parameters) == before


def test_a_run_killed_between_two_saves_in_epoch_2_resumes_to_the_same_losses(undisturbed, environment, tmp_path):
    parameters, _ = undisturbed
    killed = {**parameters, "log_path": str(tmp_path / "run"), "output_model_id": None}
    process = start(killed, environment)
    # Step 5 is in epoch 2 (steps 4 to 6), after the save at 4 and before the one at 6.
    wait_for(lambda: steps_logged(killed) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen = losses(killed)
    summary = finish(start(killed, environment))
    assert summary["resumed_from_step"] in (4, 6)
    assert losses(killed) == losses(parameters)
    assert all(seen[step] == losses(parameters)[step] for step in seen)
    assert [row["step"] for row in metrics(killed) if "train/loss" in row] == list(range(1, 4 * STEPS_PER_EPOCH + 1))
