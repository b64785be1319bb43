"""DCP saves beside training: what is committed, when, and where the failure of one shows."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fireworks.training.sdk import AdamParams, TrainerJobManager

from cookbook.checkpoints import read_checkpoints, save_checkpoint
from cookbook.client import ReconnectableClient
from cookbook.config import SFTConfig, StorageConfig, environment
from cookbook.data.datums import datum_from_row
from cookbook.errors import CheckpointError, LeaseLost, RequestRejected, TrainerLost
from cookbook.provisioning import TrainerHandle
from cookbook.run import Progress, RunDirectory
from tasks.checkpoints import dcp_save, restore, save_now
from tasks.run import Run
from tests.hostile import HeldSaves, HostileTrainer
from tests.running_backend import MODEL

ADAM = AdamParams(learning_rate=1e-2)


def progress_at(step):
    return Progress(step, 0, 2 * step, 2 * step, permutation_seed=3, total_steps=99)


def train(run):
    """One step, as the training tasks do it."""
    rows = [datum_from_row([(run.client.step + 3 * t) % 250 for t in range(6)], [0, 0, 1, 1, 1, 1])]
    loss = run.client.train_step(rows, "cross_entropy", ADAM).loss_sum
    run.progress = progress_at(run.client.step)
    return loss


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path / "home"))
    retry = {"attempts": 2, "initial_delay_s": 0.01}
    return SFTConfig(
        log_path=str(tmp_path / "run"),
        base_model="m",
        dataset="rows.jsonl",
        retry=retry,
        weight_sync={"dcp_timeout": 20},
    )


@pytest.fixture
def run(config):
    contents = config.model_dump(mode="json")
    with RunDirectory.open(config.log_path, recipe="sft", config=contents, home=environment().home) as directory:
        run = Run(config, directory, environment())
        yield run
        run.give_up()


def committed(run):
    return [row.name for row in read_checkpoints(run.directory.path)]


def has_saved(trainer):
    return "save_weights" in trainer.names()


def test_a_run_commits_while_it_trains_and_goes_on_bit_for_bit(run, manager, trainer, tmp_path):
    run.client = ReconnectableClient(manager, trainer, MODEL, 4, seed=1)
    train(run)
    save_checkpoint(run.client, "like-1", tmp_path, progress_at(1).to_loop_state(), base_model="m")
    assert dcp_save.body(run, progress_at(1)) == "step-1"
    later = [train(run) for _ in range(2)]
    assert dcp_save.body(run, progress_at(3)) == "step-3"
    assert dcp_save.body(run, progress_at(3)) == "step-3"
    later += [train(run) for _ in range(2)]
    assert dcp_save.body(run, progress_at(5), "both") == "step-5"
    assert committed(run) == ["step-1", "step-3", "step-5"]  # "both" waits
    assert [row.step for row in read_checkpoints(run.directory.path)] == [1, 3, 5]
    like, first = (
        (folder / "checkpoints.jsonl").read_text().splitlines()[0] for folder in (tmp_path, run.directory.path)
    )
    assert first == like.replace("like-1", "step-1")
    for name, step in [("step-1", 1), ("step-3", 3)]:
        run.client.load_state_with_optimizer(name, step=step)
        assert [train(run) for _ in range(5 - step)] == later[step - 1 :]


@pytest.fixture
def hostile():
    trainer = HostileTrainer()
    yield trainer
    trainer.close()


@pytest.fixture
def saves(hostile, run):
    """Saves of the run, on a trainer that holds its answers back."""
    manager = TrainerJobManager(api_key="key", base_url=hostile.base_url)
    run.client = ReconnectableClient(manager, "job", MODEL, default_timeout_s=20, state_timeout_s=20)
    yield HeldSaves(hostile)
    run.give_up()
    manager.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_the_row_comes_after_the_confirmation_and_the_next_save_waits_for_it(run, saves, hostile, pool):
    train(run)
    dcp_save.body(run, progress_at(1))
    for _ in range(2):
        train(run)
    second = pool.submit(dcp_save.body, run, progress_at(3))
    time.sleep(0.3)
    assert (committed(run), second.done(), hostile.names().count("save_weights")) == ([], False, 1)
    assert not run.saver.settle(0.1)
    saves.answer.set()
    assert second.result(10) == "step-3"
    assert run.saver.settle()
    assert committed(run) == ["step-1", "step-3"]


@pytest.mark.parametrize(
    ("category", "error", "usable"), [("user", RequestRejected, True), ("server", TrainerLost, False)]
)
def test_a_failed_save_shows_once_at_the_next_save_or_at_the_end(run, saves, category, error, usable):
    saves.result = {"error": "no room", "category": category}
    saves.answer.set()
    for shows in (lambda: dcp_save.body(run, progress_at(0)), run.saver.settle, lambda: run.finish(progress_at(0))):
        if usable or not run.client.is_lost:
            dcp_save.body(run, progress_at(0))
            with pytest.raises(error, match="no room"):
                shows()
            assert run.saver.settle()
    assert committed(run) == []
    assert run.client.is_lost is not usable


def test_a_row_that_cannot_be_written_is_tried_again_and_then_saved_anew(run, saves, hostile):
    rows = run.directory.path / "checkpoints.jsonl"
    dcp_save.body(run, progress_at(0))
    rows.unlink()  # the check before the save has made it
    rows.mkdir()
    assert saves.asked.wait(10)
    threading.Timer(0.2, saves.answer.set).start()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        run.saver.settle()
    rows.rmdir()
    assert dcp_save(run, progress_at(0)) == "step-0"
    run.saver.settle()
    assert committed(run) == ["step-0"]
    assert hostile.names().count("save_weights") == 2


def test_an_owner_that_was_superseded_commits_nothing_and_hears_of_it(run, saves, config, tmp_path):
    dcp_save.body(run, progress_at(0))
    (run.directory.path / ".lock").unlink()  # a file system that forgets locks
    contents = config.model_dump(mode="json")
    with RunDirectory.open(config.log_path, recipe="sft", config=contents, home=tmp_path / "home"):
        saves.answer.set()
        with pytest.raises(LeaseLost, match="was taken over by"):
            dcp_save.body(run, progress_at(0))
    assert committed(run) == []


def test_weights_of_another_step_are_never_committed(run, saves, hostile):
    with pytest.raises(TrainerLost, match="step 3 cannot be saved: trainer job has the weights of step 0"):
        dcp_save.body(run, progress_at(3))
    run.progress = progress_at(3)
    assert save_now(run, 5) is None
    assert not has_saved(hostile)


def test_told_to_stop_a_run_saves_where_it_is_within_its_time(run, saves, hostile):
    assert save_now(run, 5) is None  # training has not begun
    train(run)
    started = time.monotonic()
    assert save_now(run, 0.5) is None
    run.saver.close()
    assert time.monotonic() - started < 2
    assert (committed(run), has_saved(hostile)) == ([], True)
    saves.answer.set()
    train(run)
    assert save_now(run, 10) == "step-2"
    assert save_now(run, 10) == "step-2"
    assert committed(run)[-1] == "step-2"
    train(run)
    saves.result = {"error": "no room", "category": "user"}
    dcp_save.body(run, progress_at(3))
    saves.result = {"path": "saved", "type": "save_weights"}
    assert save_now(run, 10) == "step-3"


def test_a_run_that_fails_waits_for_its_save_for_seconds_only(run, saves):
    dcp_save.body(run, progress_at(0))
    threading.Timer(0.5, saves.answer.set).start()
    run.fail(RuntimeError("x"))
    assert committed(run) == ["step-0"]


def test_a_commit_that_could_not_be_loaded_is_made_again(config, backend, trainer, monkeypatch):
    monkeypatch.setenv("COOKBOOK_HOME", str(backend.home))
    config = config.model_copy(update={"lora_rank": 4, "seed": 1, "storage": StorageConfig(keep_last=None)})
    contents = config.model_dump(mode="json")
    with RunDirectory.open(config.log_path, recipe="sft", config=contents, home=backend.home) as directory:
        run = Run(config, directory, environment())
        run.trainer = TrainerHandle(trainer, trainer, "", MODEL, None, 1)
        assert restore(run, 99) == Progress(0, 0, 0, 0, permutation_seed=1, total_steps=99)
        losses = []
        for step in (1, 2):
            losses.append(train(run))
            dcp_save(run, progress_at(step))
        run.saver.settle()
        folder = backend.home / "checkpoints" / trainer / "state" / committed(run)[1]
        next(folder.glob("*.safetensors")).unlink()

        assert restore(run, 99) == progress_at(1)
        first, second = committed(run)
        assert second in run.resumed.skipped
        assert train(run) == losses[1]
        assert dcp_save(run, progress_at(2)) == f"{second}-r2"
        run.give_up()
        run.disconnect()
    assert committed(run) == [first, second, f"{second}-r2"]
