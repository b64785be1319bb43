"""Starts real trainer workers, as the control plane does, for tests that talk to them over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TOKEN = "test-token"
BASE_MODEL = "accounts/local/models/tiny"


@dataclass(frozen=True)
class Trainer:
    """A running worker."""

    job_dir: Path
    process: subprocess.Popen[bytes]
    base_url: str

    def post(self, name: str, body: dict[str, Any], token: str = TOKEN) -> httpx.Response:
        url = f"{self.base_url}/api/v1/{name}"
        return httpx.post(url, json=body, headers={"X-Api-Key": token}, timeout=60)

    def result(self, request_id: str) -> dict[str, Any]:
        """The answer of a future, however long it takes."""
        while (answer := self.post("retrieve_future", {"request_id": request_id}).json()).get("type") == "try_again":
            pass  # the server holds each of these for many seconds
        return answer

    def run(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Submit and wait."""
        return self.result(self.post(name, body).raise_for_status().json()["request_id"])

    def open_session(self, **metadata: str) -> str:
        body = {"tags": [], "user_metadata": metadata, "sdk_version": "test"}
        return str(self.post("create_session", body).raise_for_status().json()["session_id"])

    def open_model(self, session_id: str, rank: int = 0, **lora: Any) -> str:
        body = {
            "session_id": session_id,
            "model_seq_id": 0,
            "base_model": BASE_MODEL,
            "lora_config": {"rank": rank, **lora},
        }
        return str(self.run("create_model", body)["model_id"])

    def log(self) -> str:
        return (self.job_dir / "worker.log").read_text()


def write_spec(job_dir: Path, model_dir: Path, **changes: Any) -> None:
    """A spec.json as the control plane writes it; home is the folder above."""
    home = job_dir.parent
    spec = {
        "job_id": job_dir.name,
        "job_name": f"accounts/local/rlorTrainerJobs/{job_dir.name}",
        "account": "accounts/local",
        "base_model": BASE_MODEL,
        "model_dir": str(model_dir),
        "lora_rank": 0,
        "max_context_length": 256,
        "forward_only": False,
        "extra_args": ["--compute-dtype=float32", "--threads=1"],
        "inactivity_timeout_s": 300.0,
        "checkpoints_dir": str(home / "checkpoints"),
        "models_dir": str(home / "models"),
    }
    job_dir.mkdir(parents=True, exist_ok=True)
    (job_dir / "spec.json").write_text(json.dumps(spec | changes))


def spawn(job_dir: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "COOKBOOK_BACKEND_TOKEN": TOKEN, "OMP_WAIT_POLICY": "PASSIVE"}
    with (job_dir / "worker.log").open("ab") as log:
        command = [sys.executable, "-m", "cookbook.backend", "trainer", "--job-dir", str(job_dir)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


@contextmanager
def trainer(job_dir: Path, model_dir: Path, **changes: Any) -> Iterator[Trainer]:
    """A worker for a job in `job_dir`, killed at the end."""
    write_spec(job_dir, model_dir, **changes)
    (job_dir / "worker.json").unlink(missing_ok=True)
    process = spawn(job_dir)
    try:
        record = _wait_for_record(job_dir, process)
        yield Trainer(job_dir, process, f"http://127.0.0.1:{record['port']}")
    finally:
        process.kill()
        process.wait(10)


def _wait_for_record(job_dir: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + 90
    while not (job_dir / "worker.json").exists():
        assert process.poll() is None, (job_dir / "worker.log").read_text()
        assert time.monotonic() < deadline, (job_dir / "worker.log").read_text()
        time.sleep(0.05)
    return json.loads((job_dir / "worker.json").read_text())
