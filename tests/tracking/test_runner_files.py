"""The files of an outer orchestrator, in the formats of the public runner contract."""

import dataclasses
import json
import threading

import pytest

from cookbook.config import RunnerConfig
from cookbook.errors import CheckpointError, ConfigError, Problem, ProvisioningError, TrainerLost
from cookbook.summary import RunSummary
from cookbook.tracking import Start
from cookbook.tracking.runner_files import JOB_PROGRESS, RunnerFiles

SUMMARY = RunSummary(
    run_id="sft-00000000",
    recipe="sft",
    status="completed",
    log_path="runs/a",
    base_model="tiny",
    steps=4,
    epochs=1,
    rows_consumed=32,
    trained_tokens=100,
    resumed_from_step=None,
    train_seconds=1.0,
    tokens_per_second=100.0,
    final_loss=0.5,
    checkpoint="step-4",
    checkpoint_path="cross_job://sft-00000000-policy-g1/step-4",
    model="accounts/local/models/mine",
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def config(tmp_path):
    return RunnerConfig(**{name: str(tmp_path / "out" / name) for name in RunnerConfig.model_fields})


def read(path):
    with open(path) as file:
        return json.load(file)


def open_files(config, clock=None, *, first_start=True):
    return RunnerFiles(config, {}, first_start=first_start, clock=clock or Clock())


def test_the_status_goes_from_pending_over_training_to_completed(config):
    clock = Clock()
    files = open_files(config, clock)
    assert read(config.status_file) == {"code": 0, "message": "pending"}
    files.rows_read(10, 40)
    assert read(config.status_file) == {"code": 0, "message": "reading rows (25%)"}
    files.start(Start(0, 4, {"CPU": 1}))
    assert read(config.status_file)["details"] == [{"@type": JOB_PROGRESS, "percent": 0}]
    clock.now += 2
    files.log_step(1, {"train/loss": 1.0})
    assert read(config.status_file) == {
        "code": 0,
        "message": "training",
        "details": [{"@type": "type.googleapis.com/gateway.JobProgress", "percent": 25}],
    }
    files.finish(SUMMARY)
    assert read(config.status_file)["message"] == "completed"
    assert read(config.status_file)["details"][0]["percent"] == 100


def test_status_is_replaced_at_most_once_a_second_while_training(config):
    clock = Clock()
    files = open_files(config, clock)
    files.start(Start(0, 4, {"CPU": 1}))
    files.log_step(1, {"train/loss": 1.0})
    assert read(config.status_file)["details"][0]["percent"] == 0
    clock.now += 1
    files.log_step(2, {"train/loss": 1.0})
    assert read(config.status_file)["details"][0]["percent"] == 50


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError([Problem("epochs", "is 0.", "")]), 3, "epochs: is 0."),
        (TrainerLost("the trainer is gone"), 14, "the trainer is gone"),
        (ProvisioningError("no capacity"), 9, "no capacity"),
        (RuntimeError("boom"), 13, "RuntimeError: boom"),
        (KeyboardInterrupt(), 1, "Training run cancelled"),
    ],
)
def test_a_run_that_fails_before_training_says_why(config, error, code, message):
    files = open_files(config)
    files.finish(error)
    status = read(config.status_file)
    assert status["code"] == code
    assert message in status["message"]


def test_metadata_counts_tokens_and_accelerator_seconds_over_all_starts(config):
    clock = Clock()
    files = open_files(config, clock)
    files.start(Start(0, 4, {"H100": 8}))
    clock.now += 10
    files.log_step(1, {"train/loss": 1.0, "train/tokens": 500})
    assert read(config.metadata_file) == {"metadata": {"tokens": 500, "accelerator_seconds": {"H100": 80}}}
    files.finish(KeyboardInterrupt())

    again = open_files(config, clock, first_start=False)
    again.start(Start(1, 4, {"H100": 8}))
    clock.now += 1
    again.log_step(2, {"train/loss": 1.0, "train/tokens": 100})
    assert read(config.metadata_file) == {"metadata": {"tokens": 600, "accelerator_seconds": {"H100": 88}}}


def test_a_first_start_does_not_count_what_another_run_left(config):
    open_files(config).finish(KeyboardInterrupt())
    with open(config.metadata_file, "w") as file:
        json.dump({"metadata": {"tokens": 7, "accelerator_seconds": {"CPU": 7}}}, file)
    files = open_files(config)
    files.start(Start(0, 4, {"CPU": 1}))
    assert read(config.metadata_file) == {"metadata": {"tokens": 0, "accelerator_seconds": {"CPU": 0}}}


def test_the_output_model_is_written_once_at_the_end_of_a_good_run(config, tmp_path):
    files = open_files(config)
    files.start(Start(0, 4, {"CPU": 1}))
    assert not (tmp_path / "out" / "output_model_path").exists()
    files.finish(SUMMARY)
    assert read(config.output_model_path) == {
        "model_id": "accounts/local/models/mine",
        "checkpoint": "step-4",
        "job_id": "sft-00000000-policy-g1",
    }


def test_a_run_that_promotes_nothing_writes_no_output_model(config, tmp_path):
    files = open_files(config)
    files.finish(dataclasses.replace(SUMMARY, model=None))
    assert not (tmp_path / "out" / "output_model_path").exists()


def test_metrics_are_one_line_a_step(config):
    files = open_files(config)
    files.start(Start(0, 4, {"CPU": 1}))
    files.log_step(1, {"train/loss": 1.0})
    files.log_step(2, {"train/loss": 0.5})
    files.finish(SUMMARY)
    with open(config.metrics_file) as file:
        assert [json.loads(line)["train/loss"] for line in file] == [1.0, 0.5]


def test_environment_variables_fill_fields_that_are_not_set_and_nothing_else(tmp_path):
    fallback = {"status_file": str(tmp_path / "from_env"), "metadata_file": str(tmp_path / "unused")}
    RunnerFiles(RunnerConfig(metadata_file=str(tmp_path / "own")), fallback, first_start=True).finish(SUMMARY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from_env", "own"]


def test_a_reader_never_sees_half_a_status_file(config):
    clock = Clock()
    files = open_files(config, clock)
    files.start(Start(0, 400, {"CPU": 1}))
    stop, broken = threading.Event(), []

    def keep_reading():
        while not stop.is_set():
            try:
                read(config.status_file)
            except ValueError as error:
                broken.append(error)

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for step in range(1, 100):
        clock.now += 1
        files.log_step(step, {"train/loss": 1.0})
    stop.set()
    reader.join()
    assert broken == []


def test_a_status_file_that_cannot_be_written_ends_the_run_before_it_costs_anything(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="status"):
        RunnerFiles(RunnerConfig(status_file=str(tmp_path / "file" / "status")), {}, first_start=True)


def test_a_file_that_can_no_longer_be_written_does_not_end_training(config, tmp_path, caplog):
    files = open_files(config)
    (tmp_path / "out" / "status_file").unlink()
    (tmp_path / "out" / "status_file").mkdir()
    (tmp_path / "out" / "status_file" / "in_the_way").touch()
    files.start(Start(0, 4, {"CPU": 1}))
    assert "runner.status_file is out of date" in caplog.text
