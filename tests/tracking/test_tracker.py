"""The tracker of a real run directory, with all its sinks."""

import json
import logging
import subprocess
import sys

import pytest

from cookbook.config import Environment, SFTConfig
from cookbook.run import Progress, RunDirectory
from cookbook.tracking import Sink, Tracker, open_tracker


@pytest.fixture
def config(tmp_path):
    return SFTConfig(
        log_path=str(tmp_path / "run"),
        base_model="tiny",
        dataset="rows.jsonl",
        runner={"status_file": str(tmp_path / "status.json"), "metadata_file": str(tmp_path / "metadata.json")},
    )


def open_run(config, tmp_path):
    return RunDirectory.open(
        config.log_path, recipe="sft", config=config.model_dump(mode="json"), home=tmp_path / "home"
    )


def progress(step):
    return Progress(step=step, epoch=0, position=0, data_consumed=0, permutation_seed=0, total_steps=4)


def test_numbers_go_to_every_sink_and_a_second_start_goes_on_at_the_restored_step(config, tmp_path, capsys):
    env = Environment(home=tmp_path / "home", fireworks_base_url="")
    with open_run(config, tmp_path) as run:
        tracker = open_tracker(config, run, env)
        tracker.start(progress(0))
        for step in (1, 2, 3):
            tracker.log_step(step, {"train/loss": 1.0 / step, "train/tokens": 10})
        tracker.event("about to die")
        tracker.finish(KeyboardInterrupt())
    assert json.loads((tmp_path / "status.json").read_text())["code"] == 1
    with open_run(config, tmp_path) as run:
        tracker = open_tracker(config, run, env)
        tracker.start(progress(2))
        tracker.log_step(3, {"train/loss": 9.0, "train/tokens": 10})
        tracker.finish(RuntimeError("boom"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    metadata = json.loads((tmp_path / "metadata.json").read_text())["metadata"]
    assert metadata["tokens"] == 40
    assert set(metadata["accelerator_seconds"]) == {"CPU"}
    err = capsys.readouterr().err
    assert "step 1 of 4: loss 1.0000" in err
    assert "about to die" in err


def test_a_tracker_that_was_opened_but_not_started_changes_no_metrics(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    env = Environment(home=tmp_path / "home", fireworks_base_url="")
    with open_run(config, tmp_path) as run:
        open_tracker(config, run, env).finish(KeyboardInterrupt())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_accelerators_of_a_manual_launch_come_from_the_config(config, tmp_path):
    manual = config.model_copy(
        update={
            "backend": "fireworks",
            "infra": config.infra.model_copy(
                update={"accelerator_type": "NVIDIA_H100_80GB", "accelerator_count": 8, "node_count": 2}
            ),
        }
    )
    with open_run(manual, tmp_path) as run:
        tracker = open_tracker(manual, run, Environment(home=tmp_path, fireworks_base_url=""))
        tracker.start(progress(0))
        tracker.finish(KeyboardInterrupt())
    metadata = json.loads((tmp_path / "metadata.json").read_text())["metadata"]
    assert metadata["accelerator_seconds"] == {"NVIDIA_H100_80GB": 0}


def test_one_sink_that_fails_at_the_end_does_not_keep_the_others_from_finishing(caplog):
    class Broken(Sink):
        def finish(self, outcome):
            raise OSError("no")

    class Recording(Sink):
        finished = 0

        def finish(self, outcome):
            self.finished += 1

    recording = Recording()
    tracker = Tracker([recording, Broken()], {})
    with caplog.at_level(logging.ERROR):
        tracker.finish(KeyboardInterrupt())
        tracker.finish(KeyboardInterrupt())
    assert recording.finished == 1
    assert "Broken could not be finished" in caplog.text


def test_tracking_is_imported_without_wandb_and_torch():
    code = "import sys, cookbook.tracking; print({'wandb', 'torch', 'transformers', 'prefect'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
