"""The SFT flow end to end on the embedded backend, each run in a process of its own, as `cookbook run` starts it."""

import hashlib
import json
import resource
import signal
from pathlib import Path

from cookbook.models.provenance import read_provenance
from tests.flows.helpers import BATCH_SIZE, NUM_ROWS, losses, metrics, run_here, sft_parameters, start, wait_for

STEPS_PER_EPOCH = NUM_ROWS // BATCH_SIZE


def test_a_run_learns_commits_and_promotes(undisturbed, backend_home):
    parameters, summary = undisturbed
    assert summary["status"] == "completed"
    assert summary["steps"] == 4 * STEPS_PER_EPOCH
    assert summary["evaluation"]["after"]["loss"] < summary["evaluation"]["before"]["loss"]
    lines = (Path(parameters["log_path"]) / "checkpoints.jsonl").read_text().splitlines()
    commits = [json.loads(line) for line in lines]
    assert [row["step"] for row in commits] == [8, 10, 12]  # storage.keep_last is 3
    assert "sampler_path" in commits[-1]
    assert "sampler_path" not in commits[0]
    assert (backend_home / "models" / f"tiny-{summary['run_id']}" / "config.json").exists()


def test_a_finished_run_started_again_answers_at_once_and_trains_nothing(undisturbed, environment):
    parameters, summary = undisturbed
    before = metrics(parameters)
    again = run_here(parameters, environment)
    assert again["steps"] == summary["steps"]
    assert again["evaluation"] == summary["evaluation"]
    assert metrics(parameters) == before


def test_a_run_killed_between_two_saves_in_epoch_2_resumes_to_the_same_losses(undisturbed, environment, tmp_path):
    parameters, _ = undisturbed
    killed = {**parameters, "log_path": str(tmp_path / "run"), "output_model_id": None}
    process = start(killed, environment)
    # Step 5 is in epoch 2 (steps 4 to 6), after the save at 4 and before the one at 6.
    wait_for(lambda: max(losses(killed), default=0) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen = losses(killed)
    summary = run_here(killed, environment)
    assert summary["resumed_from_step"] in (4, 6)
    assert losses(killed) == losses(parameters)
    assert all(seen[step] == losses(parameters)[step] for step in seen)
    assert [row["step"] for row in metrics(killed) if "train/loss" in row] == list(range(1, 4 * STEPS_PER_EPOCH + 1))


def test_a_run_that_died_after_its_last_save_promotes_that_save(
    environment, tiny_model, rows_file, backend_home, tmp_path
):
    parameters = sft_parameters(tmp_path / "run", tiny_model, rows_file, output_model_id="late-{run_id}", lora_rank=4)
    first = run_here(parameters, environment)
    made = read_provenance(backend_home, first["model"])
    assert made.dataset_sha256 == hashlib.sha256(rows_file.read_bytes()).hexdigest()
    assert made.dataset_rows == len(rows_file.read_text().splitlines())
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed just before the end
    second = run_here(parameters, environment)
    assert (second["checkpoint"], second["model"]) == (first["checkpoint"], first["model"])
    assert second["resumed_from_step"] == first["steps"]


def test_a_disk_that_fills_up_ends_the_run_and_loses_no_commit(undisturbed, environment, backend_home, tmp_path):
    parameters = {**undisturbed[0], "log_path": str(tmp_path / "run"), "output_model_id": None, "epochs": 16}
    process = start(parameters, environment)
    commits = tmp_path / "run" / "checkpoints.jsonl"
    wait_for(lambda: commits.exists() and commits.read_text().count("\n") >= 1, process)
    (worker,) = backend_home.glob(f"backend/*/jobs/{run_id(parameters)}-policy-g1/worker.json")
    # No file of the trainer may grow above 100 kB from now on, as on a disk that is full; a save needs 1.4 MB.
    resource.prlimit(json.loads(worker.read_text())["pid"], resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "File too large" in err
    assert "Traceback" not in err
    kept = [json.loads(line)["step"] for line in commits.read_text().splitlines()]
    summary = run_here(parameters, environment)
    assert summary["resumed_from_step"] == kept[-1]
    assert summary["steps"] == 16 * STEPS_PER_EPOCH


def run_id(parameters):
    return json.loads((Path(parameters["log_path"]) / "run.json").read_text())["run_id"]
