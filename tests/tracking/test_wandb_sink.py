"""A real offline W&B run: what lands on disk, and what never does."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cookbook.config import Environment, WandBConfig
from cookbook.tracking import Start
from cookbook.tracking.wandb_sink import WandbSink

SENTINEL = "sentinel-key-0123456789abcdef0123456789abcdef01234567"

SCRIPT = """
import sys
from pathlib import Path
from cookbook.config import WandBConfig, environment
from cookbook.tracking import Start
from cookbook.tracking.wandb_sink import WandbSink

log_path, epoch, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sink = WandbSink(WandBConfig(project="p", run_name="mine"), environment(), log_path=log_path, run_id="sft-1a2b3c4d",
                 epoch=epoch, shown={"learning_rate": 0.00125, "base_model": "tiny-model-name"})
sink.start(Start(step, 10, {"CPU": 1}))
for number in range(step + 1, step + 4):
    sink.log_step(number, {"train/loss": 0.5, "train/grad_norm": None})
    sink.log_step(number, {"evaluation/loss": 0.25})
sink.finish(KeyboardInterrupt())
"""

EVALUATION = (
    SCRIPT.partition("for number in")[0]
    + """
rows = [{"row": 0, "model": "an answer", "win": None}, {"row": 1, "model": "b", "win": 1.0}]
sink.log_table("evaluation/answers", rows)
sink.end({"model": {"loss": 0.5}, "win_rate": {"win_rate": 0.75}}, failed=False)
"""
)


def run_offline(log_path: Path, *, epoch: int = 1, step: int = 0, script: str = SCRIPT, allowed: str = "") -> list:
    """Track three steps in a process of their own; the records of the W&B run's file on disk."""
    log_path.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "FIREWORKS_API_KEY": SENTINEL,
        "WANDB_API_KEY": SENTINEL.replace("sentinel-key-", ""),
        "HOME": str(log_path),
    }
    command = [
        sys.executable,
        "-W",
        "error",
        *(["-W", f"ignore:{allowed}"] if allowed else []),
        "-c",
        script,
        str(log_path),
        str(epoch),
        str(step),
        f"--fake={SENTINEL}",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (file,) = log_path.glob(f"wandb/offline-run-*-sft-1a2b3c4d-{epoch}/*.wandb")
    return records(file)


def records(file: Path) -> list:
    """The protobuf records of a .wandb file: a LevelDB log (blocks of 32 KiB; crc, length, type) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    log_path = tmp_path_factory.mktemp("wandb") / "run"
    return log_path, run_offline(log_path)


def history(found):
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({"step": record.history.step.num, **row})
    return rows


def test_an_offline_run_has_the_config_the_group_and_every_step(offline):
    _, found = offline
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.run_id, run.run_group, run.display_name) == ("p", "sft-1a2b3c4d-1", "sft-1a2b3c4d", "mine")
    assert config["learning_rate"] == 0.00125
    assert config["restored_step"] == 0
    rows = history(found)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["train/loss"] == 0.5 and row["evaluation/loss"] == 0.25 for row in rows)
    assert not any("grad_norm" in key for row in rows for key in row)


def test_w_and_b_never_gets_keys_nor_the_command_line(offline):
    log_path, _ = offline
    files = [path for path in (log_path / "wandb").rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert b"tiny-model-name" in content  # the search sees what is there
    assert not any(path.name in ("requirements.txt", "wandb-metadata.json", "output.log") for path in files)
    assert SENTINEL.encode() not in content
    assert SENTINEL.replace("sentinel-key-", "").encode() not in content


def test_a_second_start_is_a_run_of_its_own_from_the_restored_step(offline):
    log_path, _ = offline
    found = run_offline(log_path, epoch=2, step=2)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.run_group, run.display_name) == ("sft-1a2b3c4d-2", "sft-1a2b3c4d", "mine-2")
    assert [row["step"] for row in history(found)] == [3, 4, 5]


def test_without_a_project_nothing_happens_and_wandb_is_not_imported(tmp_path):
    script = SCRIPT.replace('project="p", ', "") + "\nassert 'wandb' not in sys.modules\n"
    command = [sys.executable, "-c", script, str(tmp_path), "1", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_online_run_without_a_key_is_left_out_and_never_asks(tmp_path, caplog):
    env = Environment(home=tmp_path, fireworks_base_url="", wandb_mode="online", wandb_key_present=False)
    sink = WandbSink(WandBConfig(project="p"), env, log_path=tmp_path, run_id="r", epoch=1, shown={})
    sink.start(Start(0, 1, {}))
    sink.log_step(1, {"train/loss": 1.0})
    sink.finish(KeyboardInterrupt())
    assert "wandb login" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_shows_its_answers_as_a_table_and_its_numbers_in_the_summary(tmp_path):
    found = run_offline(tmp_path / "run", script=EVALUATION, allowed="Implicitly cleaning up")  # W&B's own folder
    (table,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/evaluation/*.json")
    assert json.loads(table.read_text())["data"] == [[0, "an answer", None], [1, "b", 1.0]]
    summary = {item.key or "/".join(item.nested_key): item.value_json for r in found for item in r.summary.update}
    assert summary["evaluation/model/loss"] == "0.5"
    assert summary["evaluation/win_rate/win_rate"] == "0.75"
