"""Operations run once and in order whatever their arrival; failures are told apart; nothing outlives its owner."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from cookbook.backend.trainer.engine import Engine, Operation
from cookbook.backend.trainer.futures import FutureStore
from cookbook.errors import CheckpointError, ConfigError, Problem, RequestRejected


class Recorder:
    """Notes what ran. The body "hold" holds the compute thread until `release` is set."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []
        self.release = threading.Event()
        self.holding = threading.Event()
        self.raises: BaseException | None = None

    def __call__(self, operation: Operation) -> dict[str, Any]:
        if operation.body == b"hold":
            self.holding.set()
            assert self.release.wait(30)
        self.ran.append((operation.model_id, operation.body.decode()))
        if self.raises is not None:
            raise self.raises
        return {"echo": operation.body.decode()}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def engine(tmp_path: Path, recorder: Recorder) -> Engine:
    return Engine(recorder, FutureStore(tmp_path / "results"))


def op(body: str, model: str = "m1", kind: str = "forward") -> Operation:
    return Operation(kind, model, body.encode())


def answer(engine: Engine, request_id: str) -> Any:
    future = engine.future(request_id)
    assert future is not None
    stored = future.result(30)
    return None if stored is None else orjson.loads(stored)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_operations_run_in_order_of_seq_id_whatever_their_arrival(engine: Engine, recorder: Recorder) -> None:
    ids = {seq: engine.submit(op(f"op{seq}"), seq) for seq in (3, 5, 2, 4)}
    assert engine.submit_once(op("other", "m2"), "s1", "create-0")
    ids[1] = engine.submit(op("op1"), 1)
    for seq in (5, 1, 3):
        assert answer(engine, ids[seq]) == {"echo": f"op{seq}"}
    assert [body for model, body in recorder.ran if model == "m1"] == ["op1", "op2", "op3", "op4", "op5"]


def test_operation_behind_a_gap_waits_and_holds_up_nobody(engine: Engine, recorder: Recorder) -> None:
    behind = engine.submit(op("behind"), 2)
    assert answer(engine, engine.submit(op("free", "m2"), 1)) == {"echo": "free"}
    future = engine.future(behind)
    assert future is not None
    assert not future.done()


def test_same_request_again_is_the_same_future_and_runs_once(engine: Engine, recorder: Recorder) -> None:
    first = engine.submit(op("same"), 1)
    assert engine.submit(op("same"), 1) == first
    answer(engine, first)
    assert engine.submit(op("same"), 1) == first
    answer(engine, engine.submit(op("next"), 2))
    assert [body for _, body in recorder.ran] == ["same", "next"]
    created = engine.submit_once(op("create", "m3"), "s1", "create-0")
    assert engine.submit_once(op("create", "m3"), "s1", "create-0") == created


def test_same_number_with_another_request_fails_and_leaves_the_first_alone(engine: Engine, recorder: Recorder) -> None:
    first = engine.submit(op("one"), 1)
    for other in (op("two"), op("one", kind="optim_step")):
        conflict = engine.submit(other, 1)
        assert conflict != first
        assert engine.submit(other, 1) == conflict
        assert answer(engine, conflict)["category"] == "user"
        assert "seq_id 1 was used before for another request" in answer(engine, conflict)["error"]
    assert answer(engine, first) == {"echo": "one"}
    assert [body for _, body in recorder.ran] == ["one"]


@pytest.mark.parametrize(
    ("error", "category", "message"),
    [
        (RequestRejected("bad datum"), "user", "bad datum"),
        (CheckpointError("file x is damaged"), "user", "file x is damaged"),
        (ConfigError([Problem("beta", "is negative.", "Use 0.05.")]), "user", "beta: is negative. Use 0.05."),
        (KeyError("oops"), "server", "forward failed in the trainer: KeyError: 'oops'"),
        (MemoryError(), "server", "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "server", "out of memory"),
        (OSError(28, "No space left on device"), "server", "No space left on device. Nothing was changed."),
        (SystemExit(1), "server", "SystemExit"),
    ],
)
def test_failures_are_told_apart_and_the_queue_goes_on(
    engine: Engine, recorder: Recorder, error: BaseException, category: str, message: str
) -> None:
    recorder.raises = error
    failed = answer(engine, engine.submit(op("one"), 1))
    assert failed["category"] == category
    assert message in failed["error"]
    recorder.raises = None
    assert answer(engine, engine.submit(op("two"), 2)) == {"echo": "two"}


def test_result_that_is_not_json_is_a_server_failure(tmp_path: Path) -> None:
    engine = Engine(lambda operation: {"x": object()}, FutureStore(tmp_path / "results"))
    assert answer(engine, engine.submit(op("one"), 1))["category"] == "server"


def test_discarded_model_runs_nothing_more_and_answers_nothing(engine: Engine, recorder: Recorder) -> None:
    held = engine.submit(op("hold"), 1)
    waiting = engine.submit(op("waiting"), 2)
    other = engine.submit(op("other", "m2"), 1)
    assert recorder.holding.wait(30)
    futures = [engine.future(held), engine.future(waiting)]
    engine.discard("m1")
    recorder.release.set()
    assert answer(engine, other) == {"echo": "other"}
    assert [future.result(30) for future in futures if future is not None] == [None, None]
    assert (engine.future(held), engine.future(waiting)) == (None, None)
    assert recorder.ran == [("m1", "hold"), ("m2", "other")]


def test_model_ends_with_the_operation_that_ends_it(engine: Engine, recorder: Recorder) -> None:
    before = engine.submit(op("one"), 1)
    answer(engine, before)
    ending = engine.submit_once(op("end", kind="unload_model"), "s1", "unload-m1", ends_model=True)
    assert answer(engine, ending) == {"echo": "end"}
    wait_until(lambda: engine.future(before) is None)
    assert answer(engine, ending) == {"echo": "end"}
    engine.discard("s1")
    assert engine.future(ending) is None


def test_answers_wait_on_disk_until_their_owner_goes_and_take_no_memory(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    engine = Engine(lambda operation: {"data": [0.5] * 1000}, FutureStore(folder))
    tracemalloc.start()
    try:
        first = engine.submit(op("one"), 1)
        assert answer(engine, first) == {"data": [0.5] * 1000}
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2, 202):
            answer(engine, engine.submit(op(f"op{number}"), number))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200 * 200, f"{grown / 200:.0f} bytes an answer of {4 * 1000} bytes"
    assert answer(engine, first) == {"data": [0.5] * 1000}
    assert engine.submit(op("one"), 1) == first
    assert len(list(folder.iterdir())) == 1
    engine.discard("m1")
    assert list(folder.iterdir()) == []


def test_answers_that_the_disk_cannot_take_stay_in_memory(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "results").rmdir()
    request_id = engine.submit(op("one"), 1)
    for _ in range(2):
        assert answer(engine, request_id) == {"echo": "one"}
    assert engine.submit(op("one"), 1) == request_id
    engine.discard("m1")
    assert engine.future(request_id) is None


def test_answers_of_an_earlier_process_are_gone(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "m1-1.json").write_text("{}")
    assert FutureStore(tmp_path / "results").get("m1-1") is None
    assert list((tmp_path / "results").iterdir()) == []
