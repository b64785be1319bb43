"""metrics.jsonl: what is written, and what a resumed run keeps."""

import json
import math
import subprocess
import sys
from contextlib import contextmanager

import pytest

from cookbook.errors import CheckpointError, LeaseLost
from cookbook.tracking import Start
from cookbook.tracking.metrics_file import MetricsFile


def start(step):
    return Start(step, 10, {"CPU": 1})


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(path, steps):
    file = MetricsFile(path)
    file.start(start(0))
    for step in steps:
        file.log_step(step, {"train/loss": 1.0 / step})


def test_a_line_has_the_step_the_time_and_every_measured_number(tmp_path):
    file = MetricsFile(tmp_path / "made" / "metrics.jsonl")
    file.start(start(0))
    file.log_step(1, {"train/loss": 0.5, "train/grad_norm": None, "train/ratio": math.nan, "train/rows": 3})
    (row,) = rows(file.path)
    assert row.pop("time") > 1.6e9
    assert row == {"step": 1, "train/loss": 0.5, "train/ratio": None, "train/rows": 3}


def test_a_resumed_run_keeps_the_lines_up_to_the_restored_step_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3, 3, 4, 5])
    file = MetricsFile(path)
    file.start(start(3))
    file.log_step(4, {"train/loss": 9.0})
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 3, 4]
    assert rows(path)[-1]["train/loss"] == 9.0


def test_a_run_without_a_commit_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    MetricsFile(path).start(start(0))
    assert rows(path) == []


def test_nothing_is_touched_before_training_starts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    before = path.read_bytes()
    file = MetricsFile(path)
    file.log_step(7, {"train/loss": 1.0})
    assert path.read_bytes() == before


def test_a_torn_last_line_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "tr')
    MetricsFile(path).start(start(2))
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    path.write_text("oops\n" + path.read_text())
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1 is not a line of metrics: b'oops"):
        MetricsFile(path).start(start(2))


def test_an_owner_that_lost_the_run_cuts_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    before = path.read_bytes()

    @contextmanager
    def lost():
        raise LeaseLost("taken over")
        yield

    with pytest.raises(LeaseLost):
        MetricsFile(path, lost).start(start(1))
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(CheckpointError, match=r"folder/metrics\.jsonl cannot be written"):
        MetricsFile(tmp_path / "folder" / "metrics.jsonl").start(start(0))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cookbook.errors import CheckpointError
from cookbook.tracking import Start
from cookbook.tracking.metrics_file import MetricsFile
file = MetricsFile(Path(sys.argv[1]))
file.start(Start(0, 10, {"CPU": 1}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
try:
    file.log_step(1, {"train/loss": 1.0})
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.log_step(2, {"train/loss": 2.0})
"""


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_of_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert f"{path} cannot be written" in done.stdout
    assert [row["step"] for row in rows(path)] == [2]
