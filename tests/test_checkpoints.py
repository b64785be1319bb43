"""Commits: what is saved, when it counts, and that a run restored from them goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from fireworks.training.sdk import AdamParams

from cookbook.checkpoints import (
    CheckpointKind,
    last_commit,
    last_promotable,
    next_checkpoint_name,
    read_checkpoints,
    resolve_resume,
    save_checkpoint,
)
from cookbook.client import ReconnectableClient
from cookbook.data.datums import datum_from_row
from cookbook.errors import CheckpointError, LeaseLost, RequestRejected, TrainerLost
from cookbook.run import Progress, RunDirectory
from tests.running_backend import MODEL

ADAM = AdamParams(learning_rate=1e-2)


def losses(client, steps):
    def rows(step):
        return [datum_from_row([(step + 5 * n + 3 * t) % 250 for t in range(6)], [0, 0, 1, 1, 1, 1]) for n in range(2)]

    return [
        client.train_step(rows(step), "cross_entropy", ADAM).loss_sum
        for step in range(client.step, client.step + steps)
    ]


def state_at(step):
    return Progress(step, 0, 2 * step, 2 * step, permutation_seed=3, total_steps=9).to_loop_state()


@pytest.fixture
def connect(manager, trainer):
    clients = []

    def make(job_id=trainer):
        clients.append(ReconnectableClient(manager, job_id, MODEL, 4, seed=1, default_timeout_s=60))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def rows_of(log_path):
    return [json.loads(line) for line in (log_path / "checkpoints.jsonl").read_text().splitlines()]


def test_a_fresh_log_path_resumes_from_nothing(connect, tmp_path):
    client = connect()
    assert resolve_resume(client, tmp_path) is None
    assert last_commit(tmp_path) is None
    assert last_promotable(tmp_path) is None
    losses(client, 1)


def test_a_state_row_has_the_layout_of_the_reference(connect, tmp_path, trainer):
    client = connect()
    losses(client, 2)
    paths = save_checkpoint(client, "layout-2", tmp_path, {"step": 2, "data_consumed": 4, "extra": [1]})
    assert paths == {"state_path": f"cross_job://{trainer}/layout-2"}
    assert rows_of(tmp_path) == [
        {"name": "layout-2", "step": 2, "data_consumed": 4, "extra": [1], **paths, "source_job_id": trainer}
    ]


def test_kinds_decide_what_is_resumable_and_what_is_promotable(connect, tmp_path, manager, trainer):
    client = connect()
    both = save_checkpoint(client, "kinds-0", tmp_path, state_at(0), "both", base_model=MODEL, training_shape="s")
    sampler = save_checkpoint(client, "kinds-1", tmp_path, state_at(1), CheckpointKind.SAMPLER)
    assert set(both) == {"state_path", "sampler_path"}
    assert set(sampler) == {"sampler_path"}
    assert both["sampler_path"].startswith("kinds-0-")
    assert last_commit(tmp_path).name == "kinds-0"
    assert last_promotable(tmp_path).name == "kinds-1"
    assert [(row.base_model, row.training_shape) for row in read_checkpoints(tmp_path)] == [(MODEL, "s"), (None, None)]
    promotable = {row["name"].rsplit("/")[-1] for row in manager.list_checkpoints(trainer) if row["promotable"]}
    assert {both["sampler_path"], sampler["sampler_path"]} <= promotable
    with pytest.raises(CheckpointError, match="kind must be one of state, sampler, both, got 'all'"):
        save_checkpoint(client, "kinds-2", tmp_path, state_at(2), "all")


def test_a_reconnected_run_goes_on_from_its_last_commit_bit_for_bit(connect, tmp_path, trainer):
    client = connect()
    resolve_resume(client, tmp_path)
    losses(client, 2)
    save_checkpoint(client, "resume-2", tmp_path, state_at(2))
    losses(client, 1)
    save_checkpoint(client, "resume-3", tmp_path, state_at(3))
    undisturbed = losses(client, 3)
    client.reconnect()
    info = resolve_resume(client, tmp_path, init_from_checkpoint="resume-2")  # own commits win
    assert (info.step, info.data_consumed, info.source_job_id, info.name) == (3, 6, trainer, "resume-3")
    assert Progress.from_loop_state(info.loop_state) == Progress.from_loop_state(state_at(3))
    assert client.step == 3
    assert losses(client, 3) == undisturbed


def test_the_next_generation_of_trainer_goes_on_bit_for_bit(connect, tmp_path, start_trainer, manager):
    first = connect(start_trainer("generation-1"))
    losses(first, 2)
    save_checkpoint(first, "step-2", tmp_path, state_at(2))
    undisturbed = losses(first, 2)
    first.close()
    manager.delete("generation-1")
    second = connect(start_trainer("generation-2"))
    assert resolve_resume(second, tmp_path).source_job_id == "generation-1"
    assert losses(second, 2) == undisturbed
    manager.delete("generation-2")


def test_after_a_killed_trainer_the_run_goes_on_from_its_last_commit(connect, tmp_path, start_trainer, manager):
    job = start_trainer("killed-after-commit")
    client = connect(job)
    losses(client, 1)
    save_checkpoint(client, "step-1", tmp_path, state_at(1))
    undisturbed = losses(client, 2)
    os.kill(manager.get(job)["metadata"]["workerPid"], signal.SIGKILL)
    with pytest.raises(TrainerLost):
        losses(client, 1)
    manager.resume_and_wait(job, poll_interval_s=0.1)
    client.reconnect()
    with pytest.raises(TrainerLost, match="resolve_resume"):
        losses(client, 1)
    assert resolve_resume(client, tmp_path).step == 1
    assert losses(client, 2) == undisturbed
    manager.delete(job)


def test_without_a_commit_a_reconnected_run_starts_over(connect, tmp_path):
    client = connect()
    first = losses(client, 2)
    with pytest.raises(TrainerLost, match="cannot start at step 0"):
        resolve_resume(client, tmp_path)
    client.reconnect()
    assert resolve_resume(client, tmp_path) is None
    assert losses(client, 2) == first


@pytest.mark.parametrize("with_job", [False, True])
def test_init_from_checkpoint_takes_the_weights_and_starts_at_step_0(connect, tmp_path, trainer, with_job):
    client = connect()
    losses(client, 2)
    name = f"init-{int(with_job)}"
    client.save_state(name)
    before = client.forward([datum_from_row([1, 2, 3], [0, 1, 1])], "cross_entropy").metrics
    fresh = connect()
    info = resolve_resume(fresh, tmp_path, f"{trainer}:{name}" if with_job else name)
    assert (info.step, info.data_consumed, info.source_job_id, info.name) == (0, 0, trainer, name)
    assert fresh.step == 0
    assert fresh.forward([datum_from_row([1, 2, 3], [0, 1, 1])], "cross_entropy").metrics == before


def damage(backend, trainer, name):
    """Change a bit of a checkpoint's largest file, and return the file."""
    folder = backend.home / "checkpoints" / trainer / "state" / name
    weights = max(folder.rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return weights


def test_damaged_and_missing_checkpoints_are_passed_over_and_never_for_a_fresh_start(
    connect, tmp_path, backend, trainer, caplog
):
    client = connect()
    with pytest.raises(CheckpointError, match=r"init_from_checkpoint 'job-x:nothing' cannot be loaded.*nothing"):
        resolve_resume(client, tmp_path, "job-x:nothing")
    undisturbed = []
    for step in range(3):
        save_checkpoint(client, f"fall-{step}", tmp_path, state_at(step))
        undisturbed += losses(client, 1)
    weights = damage(backend, trainer, "fall-2")
    info = resolve_resume(client, tmp_path, "fall-0")  # not that, the run's own commits win
    assert (info.name, info.step, info.data_consumed, client.step) == ("fall-1", 1, 2, 1)
    assert list(info.skipped) == ["fall-2"]
    assert f"{weights.name} is damaged: sha256" in info.skipped["fall-2"]
    assert "fall-2 (step 2) CANNOT BE LOADED and is passed over" in caplog.text
    assert losses(client, 2) == undisturbed[1:]
    assert [row.name for row in read_checkpoints(tmp_path)] == ["fall-0", "fall-1", "fall-2"]

    (backend.home / "checkpoints" / trainer / "state" / "fall-1" / "manifest.json").write_text("{")
    shutil.rmtree(backend.home / "checkpoints" / trainer / "state" / "fall-0")
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints of .* can be loaded") as error:
        resolve_resume(client, tmp_path, "fall-0")
    assert r"'fall-0' (step 0): load_state" in str(error.value)
    for name, reason in [("fall-0", "no checkpoint"), ("fall-1", "manifest.json is damaged"), ("fall-2", "sha256")]:
        assert any(repr(name) in line and reason in line for line in str(error.value).splitlines())


def test_a_checkpoint_of_another_step_than_its_row_says_is_passed_over(connect, tmp_path):
    client = connect()
    save_checkpoint(client, "honest-0", tmp_path, state_at(0))
    losses(client, 2)
    save_checkpoint(client, "wrong-1", tmp_path, state_at(1))
    info = resolve_resume(client, tmp_path)
    assert info.name == "honest-0"
    assert "holds the weights of step 2, its row says 1" in info.skipped["wrong-1"]


def test_a_checkpoint_of_another_model_is_an_error_at_once(connect, tmp_path, manager, start_trainer):
    full = ReconnectableClient(manager, start_trainer("fits-not", 0), MODEL, 0, default_timeout_s=60)
    save_checkpoint(full, "full-0", tmp_path, state_at(0))
    save_checkpoint(full, "full-1", tmp_path, state_at(0))
    full.close()
    manager.delete("fits-not")
    with pytest.raises(CheckpointError, match=r"'full-1' \(step 0\) .*does not fit this model.*lora_rank 0") as error:
        resolve_resume(connect(), tmp_path)
    assert "full-0" not in str(error.value)


def test_a_save_that_is_refused_commits_nothing(connect, tmp_path):
    client = connect()
    client.save_state("refused")
    with pytest.raises(RequestRejected, match="refused"):
        save_checkpoint(client, "refused", tmp_path, state_at(0))
    assert read_checkpoints(tmp_path) == []
    assert next_checkpoint_name(tmp_path, "refused", taken=client.list_checkpoints()) == "refused-r2"


def test_names_are_unique_per_attempt(connect, tmp_path):
    client = connect()
    assert next_checkpoint_name(tmp_path, "again-5") == "again-5"
    save_checkpoint(client, "again-5", tmp_path, state_at(5))
    assert next_checkpoint_name(tmp_path, "again-5") == "again-5-r2"
    assert next_checkpoint_name(tmp_path, "again-5", taken=["again-5-r2"]) == "again-5-r3"
    with pytest.raises(CheckpointError, match=r"'again-5' is in .*checkpoints\.jsonl already"):
        save_checkpoint(client, "again-5", tmp_path, state_at(5))


@pytest.mark.parametrize("name", ["Step_1", "", "-a", "a/b", "x" * 64])
def test_names_that_could_not_be_loaded_are_refused_before_the_save(connect, tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be used"):
        save_checkpoint(connect(), name, tmp_path, state_at(0))


@pytest.mark.parametrize(
    ("loop_state", "match"),
    [
        ({"data_consumed": 1}, "'step' as a whole number >= 0, got None"),
        ({"step": 1, "data_consumed": -1}, "'data_consumed'.*got -1"),
        ({"step": 1, "data_consumed": 1, "x": float("nan")}, "cannot be written as JSON"),
        ({"step": 1, "data_consumed": 1, "x": object()}, "cannot be written as JSON"),
        ({"step": 1, "data_consumed": 1, "name": "x"}, r"must not have the keys \['name'\]"),
    ],
)
def test_a_loop_state_that_could_not_come_back_is_refused_before_the_save(connect, tmp_path, loop_state, match):
    client = connect()
    with pytest.raises(CheckpointError, match=match):
        save_checkpoint(client, "bad-loop-state", tmp_path, loop_state)
    assert "bad-loop-state" not in client.list_checkpoints()


def test_an_unwritable_log_path_is_refused_before_the_save(connect, tmp_path):
    client = connect()
    with pytest.raises(CheckpointError, match=r"none/checkpoints\.jsonl cannot be written: No such file.*nothing was"):
        save_checkpoint(client, "unwritable", tmp_path / "none", state_at(0))
    assert "unwritable" not in client.list_checkpoints()


def test_an_owner_that_was_superseded_cannot_commit(connect, tmp_path):
    def open_run():
        return RunDirectory.open(tmp_path / "run", recipe="sft", config={}, home=tmp_path / "home")

    old = open_run()
    (old.path / ".lock").unlink()
    client = connect()
    with open_run() as new:
        with pytest.raises(LeaseLost):
            save_checkpoint(client, "superseded", old.path, state_at(0), guard=old.guard)
        save_checkpoint(client, "successor", new.path, state_at(0), guard=new.guard)
    old.close()
    assert [row.name for row in read_checkpoints(old.path)] == ["successor"]


def test_a_torn_last_row_is_cut_and_logged_and_the_one_before_it_counts(connect, tmp_path, caplog):
    client = connect()
    save_checkpoint(client, "torn-0", tmp_path, state_at(0))
    with (tmp_path / "checkpoints.jsonl").open("a") as file:
        file.write('{"name": "torn-1", "st')
    assert resolve_resume(client, tmp_path).name == "torn-0"
    assert "torn" in caplog.text
    save_checkpoint(client, "torn-2", tmp_path, state_at(1))
    assert [row["name"] for row in rows_of(tmp_path)] == ["torn-0", "torn-2"]


def test_a_bad_row_elsewhere_is_named_and_nothing_is_resumed(connect, tmp_path):
    path = tmp_path / "checkpoints.jsonl"
    path.write_text('{"name": "a", "step": 1, "state_path": "cross_job://j/a"}\ngarbage\n{"name": "b"}\n')
    with pytest.raises(CheckpointError, match=r"checkpoints\.jsonl, line 2"):
        resolve_resume(connect(), tmp_path)
    path.write_text('{"name": "a"}\n{"step": 1}\n')
    with pytest.raises(CheckpointError, match="row 2 has no name"):
        read_checkpoints(tmp_path)
    path.write_text('{"name": "a", "step": "x"}\n')
    with pytest.raises(CheckpointError, match=r"row 1 \('a'\): step and data_consumed"):
        read_checkpoints(tmp_path)


def test_rows_with_fewer_or_more_keys_are_read(tmp_path):
    path = tmp_path / "checkpoints.jsonl"
    path.write_text('{"name": "a"}\n{"name": "b", "step": 3, "state_path": "cross_job://j/b", "later": true}\n')
    first, second = read_checkpoints(tmp_path)
    assert (first.step, first.data_consumed, first.state_path) == (0, 0, None)
    assert second.loop_state == {"step": 3, "later": True}


def test_a_process_killed_between_save_and_row_has_committed_nothing(backend, trainer, tmp_path):
    code = """
import os, signal, sys
from contextlib import contextmanager
from fireworks.training.sdk import TrainerJobManager
from cookbook.checkpoints import save_checkpoint
from cookbook.client import ReconnectableClient

url, key, job, model, log_path = sys.argv[1:]
client = ReconnectableClient(TrainerJobManager(api_key=key, base_url=url), job, model, 4)

@contextmanager
def killed_at_the_second_write():
    if "unborn" in client.list_checkpoints():
        os.kill(os.getpid(), signal.SIGKILL)
    yield

save_checkpoint(client, "unborn", log_path, {"step": 0, "data_consumed": 0}, guard=killed_at_the_second_write)
"""
    arguments = [backend.base_url, backend.api_key, trainer, MODEL, str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert last_commit(tmp_path) is None
