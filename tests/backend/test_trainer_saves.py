"""What a save holds is what the model was when the save's turn came, however much is trained while it is written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors import safe_open

from cookbook.backend.snapshots import list_manifests, load_manifest, verify
from cookbook.backend.trainer import saves, staging, state
from cookbook.backend.trainer.engine import Deferred, Engine, Operation
from cookbook.backend.trainer.futures import FutureStore
from cookbook.errors import CheckpointError
from tests.backend.trainer_job import TrainerJob, datum, same
from tests.tiny_model import make_tiny_model

DATA = [datum("the quick brown fox"), datum("jumps", [0.5, -1.0, 0.0, 2.0])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def begin_save(job: TrainerJob, model: str, name: str) -> Callable[[], dict[str, Any]]:
    """A save whose writing has not begun."""
    rest = job.operations.execute(Operation("save_weights", model, orjson.dumps({"path": name})))
    assert isinstance(rest, Deferred)
    return rest.finish


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def moments_of(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored.items() if name.startswith("optimizer.")}


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_save_holds_the_weights_and_moments_of_its_turn_bit_for_bit(tmp_path: Path, tiny: Path, rank: int) -> None:
    job = TrainerJob(tmp_path, tiny, lora_rank=rank)
    model = job.create(rank)
    job.train(model, DATA, 2)
    job.run("save_weights", model, path="at-once")
    finish = begin_save(job, model, "later")
    job.train(model, DATA, 2)
    assert finish() == {"path": "later", "type": "save_weights"}
    at_once, later = (tensors(job.checkpoints / "state" / name) for name in ("at-once", "later"))
    assert same(at_once, later)
    assert sum(name.startswith("optimizer.exp_avg_sq.") for name in later) == len(later) / 3
    assert load_manifest(job.checkpoints / "state" / "later").step == 2

    after = begin_save(job, model, "after")  # into the memory of the one before
    job.train(model, DATA, 1)
    after()
    assert load_manifest(job.checkpoints / "state" / "after").step == 4
    assert not same(later, tensors(job.checkpoints / "state" / "after"))

    resumed = job.create(rank, seed=9)
    job.run("load_weights", resumed, path="after", optimizer=True)
    job.train(resumed, DATA, 1)
    assert same(job.weights(resumed), job.weights(model))


def test_the_next_save_captures_nothing_while_one_is_written(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    before = job.weights(model)
    finish = begin_save(job, model, "first")
    job.train(model, DATA, 1)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(begin_save, job, model, "second")
        time.sleep(0.2)
        assert not second.done()
        finish()
        second.result(10)()
    for name, weights in [("first", before), ("second", job.weights(model))]:
        saved = tensors(job.checkpoints / "state" / name)
        assert all(torch.equal(saved[f"model.{weight}"], weights[weight]) for weight in weights), name


def test_a_state_in_several_files_is_one_that_torch_reads(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_FILE_BYTES", 300_000)
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    job.train(model, DATA, 1)
    job.run("save_weights", model, path="step-1")
    folder = job.checkpoints / "state" / "step-1"
    manifest = load_manifest(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    verify(folder, manifest)
    index = orjson.loads((folder / "model.safetensors.index.json").read_bytes())
    stored = tensors(folder)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    weights = job.weights(model)
    read = state.read_state(folder, {name: weight.shape for name, weight in weights.items()}, with_moments=True)
    assert same(dict(read.weights), weights)
    assert same({f"optimizer.{name}": moment for name, moment in read.moments.items()}, moments_of(stored))


def test_without_memory_for_a_copy_the_save_is_made_at_once(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    monkeypatch.setattr(staging, "_available_bytes", lambda: 1000)
    answer = job.operations.execute(Operation("save_weights", model, b'{"path": "step-0"}'))
    assert answer == {"path": "step-0", "type": "save_weights"}
    assert "holds up training: 0 MiB are free" in caplog.text
    assert [manifest.name for manifest in list_manifests(job.checkpoints.parent, "job-a")] == ["step-0"]


class HeldWriter:
    """Writes only once it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        self.began = threading.Event()
        write = state.write_state

        def held(folder: Path, *arguments: Any) -> Any:
            self.began.set()
            assert self.release.wait(30)
            return write(folder, *arguments)

        monkeypatch.setattr(saves, "write_state", held)


class Worker:
    """The engine of a trainer worker with its two threads, without HTTP."""

    def __init__(self, tmp_path: Path, job: TrainerJob) -> None:
        self.engine = Engine(job.operations.execute, FutureStore(tmp_path / "results"))
        self._next: dict[str, int] = {}

    def submit(self, kind: str, model: str, **body: Any) -> str:
        self._next[model] = self._next.get(model, 0) + 1
        return self.engine.submit(Operation(kind, model, orjson.dumps(body)), self._next[model])

    def answer(self, request_id: str) -> Any:
        future = self.engine.future(request_id)
        assert future is not None
        answer = future.result(30)
        return None if answer is None else orjson.loads(answer)

    def is_done(self, request_id: str) -> bool:
        future = self.engine.future(request_id)
        return future is None or future.done()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldWriter]:
    writer = HeldWriter(monkeypatch)
    yield writer
    writer.release.set()


def test_operations_go_on_while_a_save_is_written_and_those_that_need_it_wait(
    tmp_path: Path, tiny: Path, held: HeldWriter
) -> None:
    job = TrainerJob(tmp_path, tiny)
    model, other = job.create(), job.create()
    worker = Worker(tmp_path, job)
    given = {"forward_backward_input": {"data": DATA, "loss_fn": "cross_entropy", "loss_fn_config": {}}}
    save = worker.submit("save_weights", model, path="step-0")
    assert "metrics" in worker.answer(worker.submit("forward_backward", model, **given))
    assert held.began.wait(10)
    assert (worker.is_done(save), worker.engine.has_deferred) == (False, True)
    assert job.saves.being_written() == ["step-0"]
    load = worker.submit("load_weights", other, path="step-0", optimizer=True)  # waits for the save
    again = worker.submit("save_weights", model, path="step-0")
    nobody_waits = worker.submit("save_weights", other, path="step-1")
    assert not any(map(worker.is_done, (save, load, again, nobody_waits)))
    held.release.set()
    assert worker.answer(save) == {"path": "step-0", "type": "save_weights"}
    assert worker.answer(load) == {"path": "step-0", "type": "load_weights"}
    refused = worker.answer(again)
    assert (refused["category"], "'step-0' exists already" in refused["error"]) == ("user", True)
    assert worker.answer(nobody_waits) == {"path": "step-1", "type": "save_weights"}
    assert worker.engine.stop(10)


def test_a_save_outlives_its_model(tmp_path: Path, tiny: Path, held: HeldWriter) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    worker = Worker(tmp_path, job)
    save = worker.submit("save_weights", model, path="step-0")
    assert held.began.wait(10)
    unload = worker.engine.submit_once(Operation("unload_model", model, b""), "s1", "unload", ends_model=True)
    assert worker.answer(unload) == {"model_id": model, "type": "unload_model"}
    held.release.set()
    assert worker.engine.stop(10)
    assert worker.engine.future(save) is None
    folder = job.checkpoints / "state" / "step-0"
    verify(folder, load_manifest(folder))


def test_an_abandoned_save_leaves_nothing_behind(tmp_path: Path, tiny: Path, held: HeldWriter) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    worker = Worker(tmp_path, job)
    save = worker.submit("save_weights", model, path="step-0")
    assert held.began.wait(10)
    assert not worker.engine.stop(0.1)
    job.saves.abandon()
    held.release.set()
    assert worker.engine.stop(10)
    failed = worker.answer(save)
    assert (failed["category"], "not written to its end" in failed["error"]) == ("server", True)
    assert list((job.checkpoints / "state").iterdir()) == []


def test_a_taken_name_is_refused_before_anything_is_copied(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    job.run("save_weights", model, path="step-0")
    with pytest.raises(CheckpointError, match="'step-0' exists already"):
        begin_save(job, model, "step-0")
