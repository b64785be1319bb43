"""The deployment worker as a process: what it needs to start, how it ends, and what it says of both."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cookbook.backend.deployment.spec import read_spec
from cookbook.backend.paths import read_json
from cookbook.errors import BackendError
from tests.backend.deployment_server import served
from tests.tiny_model import make_tiny_model
from tests.wire.deployment_process import DEPLOYMENT, deployment, spawn, write_lora_snapshot, write_spec
from tests.wire.trainer_process import TOKEN

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_args": ["--max-batches=3"]}, "unrecognized arguments: --max-batches=3"),
        ({"extra_args": ["--max-batch=0"]}, "must be at least 1, got 0"),
        ({"extra_args": ["--compute-dtype=float8"]}, "invalid choice: 'float8'"),
        ({"extra_values": {"priority": "high"}}, "extra_values has ['priority']"),
        ({"max_context_length": "long"}, "is not a deployment's spec"),
        ({"hot_load_trainer_job": "job-a"}, "'job-a' is not a trainer job"),
    ],
)
def test_a_spec_that_cannot_be_served_is_refused_by_field(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_spec(tmp_path, tmp_path / "model", **changes)
    with pytest.raises(BackendError, match=re.escape(words)):
        read_spec(tmp_path)


def test_a_spec_is_read_with_its_options(tmp_path: Path) -> None:
    options = ["--compute-dtype", "bfloat16", "--threads=2", "--max-batch=8", "--max-waiting=9"]
    write_spec(tmp_path, tmp_path / "model", extra_args=options, hot_load_trainer_job="accounts/a/rlorTrainerJobs/j-1")
    spec = read_spec(tmp_path)
    assert (spec.compute_dtype, spec.threads, spec.max_batch, spec.max_waiting) == ("bfloat16", 2, 8, 9)
    assert (spec.name, spec.trainer_job) == (DEPLOYMENT, "j-1")


@pytest.mark.parametrize("reason", ["model", "token"])
def test_a_worker_that_cannot_start_says_why_in_its_last_line(tmp_path: Path, reason: str) -> None:
    folder = make_tiny_model(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    write_spec(tmp_path / "dep-a", folder)
    process = spawn(tmp_path / "dep-a", token=TOKEN if reason == "model" else None)
    assert process.wait(90) == 2
    assert not (tmp_path / "dep-a" / "worker.json").exists()
    last = (tmp_path / "dep-a" / "worker.log").read_text().splitlines()[-1]
    assert last.startswith("error: ")
    assert ("gpt2" if reason == "model" else "COOKBOOK_BACKEND_TOKEN is not set") in last


def test_a_worker_that_has_announced_itself_answers_and_ends_when_told(tmp_path: Path, tiny: Path) -> None:
    with deployment(tmp_path / "dep-a", tiny) as worker:
        with worker.client() as client:
            assert client.get("/api/v1/healthz").json() == {"status": "ok"}
        assert worker.complete()["choices"]
        body = {"prompt": [1, 2], "max_tokens": 500, "ignore_eos": True, "stream": True}
        with worker.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(10) == 0
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
        assert "inactivity timeout" in str(read_json(worker.folder / "exit.json"))


def probe(base_url: str) -> None:
    with contextlib.suppress(httpx.TransportError):  # it may just have ended
        httpx.get(f"{base_url}/api/v1/healthz", headers={"X-Api-Key": TOKEN}, trust_env=False)


def test_a_lora_adapter_is_served_on_its_base(tmp_path: Path, tiny: Path) -> None:
    adapter = write_lora_snapshot(tmp_path / "promoted", "s-1", tiny)
    texts = []
    for name, changes in (("plain", {}), ("adapted", {"model_dir": str(adapter)})):
        with served(tmp_path / name, tiny, **changes) as server:
            answer = server.post("/v1/completions", {"prompt": "hello", "temperature": 0, "max_tokens": 20})
            texts.append(answer.json()["choices"][0]["text"])
    assert texts[0] != texts[1]
