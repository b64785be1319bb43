"""The deployment worker as a process: what it needs to start, how it ends, and what it says of both."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cookbook.backend.control_plane.workers import end_of
from cookbook.backend.paths import read_json
from tests.tiny_model import make_tiny_model
from tests.wire.deployment_process import deployment, spawn, write_lora_snapshot, write_spec
from tests.wire.trainer_process import TOKEN

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def last_words(folder: Path, token: str | None = TOKEN) -> str:
    """What a worker that cannot start leaves for its owner."""
    process = spawn(folder, token)
    assert process.wait(90) == 2
    assert not (folder / "worker.json").exists()
    return end_of(folder, 2).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_args": ["--max-batches=3"]}, "unrecognized arguments: --max-batches=3"),
        ({"extra_args": ["--max-batch=0"]}, "must be at least 1, got 0"),
        ({"extra_args": ["--compute-dtype=float8"]}, "invalid choice: 'float8'"),
        ({"extra_values": {"priority": "high"}}, "extra_values has ['priority']"),
        ({"max_context_length": "long"}, "is not a deployment's spec"),
        ({"hot_load_trainer_job": "job-a"}, "'job-a' is not a trainer job"),
        ({"model_dir": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_worker_that_cannot_start_says_why(tmp_path: Path, tiny: Path, changes: dict[str, Any], words: str) -> None:
    write_spec(tmp_path / "dep-a", tiny, **changes)
    assert words in last_words(tmp_path / "dep-a")


def test_a_model_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    write_spec(tmp_path / "dep-a", folder)
    assert "gpt2" in last_words(tmp_path / "dep-a")


def test_a_worker_without_its_token_does_not_serve(tmp_path: Path, tiny: Path) -> None:
    write_spec(tmp_path / "dep-a", tiny)
    assert "COOKBOOK_BACKEND_TOKEN is not set" in last_words(tmp_path / "dep-a", token=None)


def test_a_worker_that_has_announced_itself_answers_and_ends_when_told(tmp_path: Path, tiny: Path) -> None:
    with deployment(tmp_path / "dep-a", tiny) as worker:
        with worker.client() as client:
            assert client.get("/api/v1/healthz").json() == {"status": "ok"}
        assert worker.complete()["choices"]
        body = {"prompt": [1, 2], "max_tokens": 500, "ignore_eos": True, "stream": True}
        with worker.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
            parts = answer.iter_bytes()
            next(parts)
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(10) == 0
            with pytest.raises(httpx.HTTPError):
                assert b"[DONE]" in b"".join(parts)  # either it was just done, or the break shows
                raise httpx.ReadError("done")
        assert read_json(worker.folder / "exit.json") == {"reason": "told to stop"}


def test_an_idle_worker_ends_and_a_busy_one_does_not(tmp_path: Path, tiny: Path) -> None:
    with deployment(tmp_path / "dep-a", tiny, inactivity_timeout_s=2.0) as worker:
        started = time.monotonic()
        while time.monotonic() - started < 5:
            worker.complete(max_tokens=1)
            time.sleep(0.3)
        while time.monotonic() - started < 30 and worker.process.poll() is None:
            time.sleep(0.1)
            if worker.process.poll() is None:
                probe(worker.base_url)  # a health probe keeps nothing alive
        assert worker.process.wait(1) == 0
        assert "inactivity timeout" in end_of(worker.folder, 0).message


def probe(base_url: str) -> None:
    try:
        httpx.get(f"{base_url}/api/v1/healthz", headers={"X-Api-Key": TOKEN}, trust_env=False)
    except httpx.TransportError:
        pass  # it has just ended


def test_a_lora_adapter_is_served_on_the_base_that_it_names(tmp_path: Path, tiny: Path) -> None:
    def greedy(**changes: Any) -> str:
        with deployment(tmp_path / "dep-a", tiny, **changes) as worker:
            return str(worker.complete(temperature=0, max_tokens=20)["choices"][0]["text"])

    adapter = write_lora_snapshot(tmp_path / "promoted", "s-1", tiny)
    plain, adapted = greedy(), greedy(model_dir=str(adapter))
    assert plain != adapted
