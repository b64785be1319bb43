"""Starts real deployment workers, as the control plane does, and writes snapshots for them to load."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from fireworks.training.sdk import DeploymentSampler

from cookbook.backend.snapshots import Manifest, snapshot_dir, write_snapshot
from cookbook.backend.trainer.lora import LoraSettings, attach, write_adapter
from tests.tiny_model import make_tiny_model
from tests.wire.trainer_process import BASE_MODEL, TOKEN

DEPLOYMENT = "accounts/local/deployments/dep-a"
JOB = "job-a"


@dataclass(frozen=True)
class Deployment:
    """A running worker; `home` has the checkpoints."""

    folder: Path
    process: subprocess.Popen[bytes]
    base_url: str

    @property
    def checkpoints(self) -> Path:
        return self.folder.parent / "checkpoints"

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=60, trust_env=False, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers=headers)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion's whole answer."""
        body = {"model": DEPLOYMENT, "prompt": list(b"hello"), "max_tokens": 8} | body
        return dict(self.post("/v1/completions", body).raise_for_status().json())

    def load(self, identity: str, job: str = JOB) -> dict[str, Any]:
        """The state of the only replica after a hot load."""
        name = f"accounts/local/rlorTrainerJobs/{job}"
        body = {"identity": identity, "reset_prompt_cache": True}
        answer = self.post("/hot_load", body, **{"x-cookbook-trainer-job": name})
        return dict(answer.raise_for_status().json()["replicas"][0])

    def status(self) -> dict[str, Any]:
        return dict(self.get("/status").json())

    def wait_until(self, **wanted: int) -> None:
        """Until `status` says so."""
        deadline = time.monotonic() + 20
        while any(self.status()[name] != value for name, value in wanted.items()):
            assert time.monotonic() < deadline, (self.status(), wanted)
            time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "worker.log").read_text()


def write_spec(folder: Path, model_dir: Path, /, **changes: Any) -> None:
    """A spec.json as the control plane writes it; home is the folder above."""
    spec = {
        "deployment_id": DEPLOYMENT.rpartition("/")[2],
        "account": "local",
        "base_model": BASE_MODEL,
        "model_dir": str(model_dir),
        "base_dir": str(model_dir),
        "max_context_length": 512,
        "inactivity_timeout_s": 300.0,
        "checkpoints_dir": str(folder.parent / "checkpoints"),
        "hot_load_trainer_job": None,
        "extra_args": ["--compute-dtype=float32", "--threads=1"],
        "extra_values": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec | changes))


def spawn(folder: Path, token: str | None = TOKEN) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "COOKBOOK_BACKEND_TOKEN"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"} | ({"COOKBOOK_BACKEND_TOKEN": token} if token else {})
    with (folder / "worker.log").open("ab") as log:
        command = [sys.executable, "-m", "cookbook.backend", "deployment", "--job-dir", str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


@contextmanager
def deployment(folder: Path, model_dir: Path, /, **changes: Any) -> Iterator[Deployment]:
    """A worker for a deployment in `folder`, killed at the end."""
    write_spec(folder, model_dir, **changes)
    process = spawn(folder)
    try:
        deadline = time.monotonic() + 90
        while not (folder / "worker.json").exists():
            assert process.poll() is None, (folder / "worker.log").read_text()
            assert time.monotonic() < deadline, (folder / "worker.log").read_text()
            time.sleep(0.05)
        port = json.loads((folder / "worker.json").read_text())["port"]
        yield Deployment(folder, process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait(10)


def write_model_snapshot(checkpoints: Path, name: str, *, job: str = JOB, seed: int = 1, **manifest: Any) -> Path:
    """A full snapshot: another tiny model, of another seed."""
    described = Manifest("sampler", name, job, BASE_MODEL, 0, "base", True, time.time(), 1)
    folder = snapshot_dir(checkpoints, job, "sampler", name)
    write_snapshot(folder, replace(described, **manifest), lambda target: _tiny(target, seed))
    return folder


def write_lora_snapshot(checkpoints: Path, name: str, model_dir: Path, *, job: str = JOB, rank: int = 4) -> Path:
    """A LoRA snapshot whose adapter is not zero."""
    described = Manifest("sampler", name, job, BASE_MODEL, rank, "base", True, time.time(), 1)
    folder = snapshot_dir(checkpoints, job, "sampler", name)
    write_snapshot(folder, described, lambda target: _adapter(target, model_dir, rank))
    return folder


def _tiny(folder: Path, seed: int) -> None:
    make_tiny_model(folder, seed=seed)


def _adapter(folder: Path, model_dir: Path, rank: int) -> None:
    from cookbook.backend.decoder import HuggingFaceDecoder

    decoder = HuggingFaceDecoder.load(model_dir, "float32")
    parameters = attach(decoder, "adapter", LoraSettings(rank=rank, alpha=2 * rank))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].normal_(std=0.3, generator=generator)
    write_adapter(folder, decoder, "adapter", parameters, model_dir)


async def closed(sampler: DeploymentSampler) -> None:
    """Close a sampler of the running loop, and wait until it is."""
    sampler.close()
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
