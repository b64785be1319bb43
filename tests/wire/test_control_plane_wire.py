"""The unmodified SDK against the control plane and real trainers: jobs, shapes, checkpoints, promotion, faults."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fireworks.training.sdk import FireworksClient, TrainerJobConfig, TrainerJobManager, TrainingAPIError
from fireworks.training.sdk.client import FiretitanServiceClient, FiretitanTrainingClient

from cookbook import embedded
from cookbook.backend.snapshots import Manifest, SnapshotKind, snapshot_dir, write_snapshot
from tests.running_backend import MODEL, WireBackend

SHAPES = "accounts/local/trainingShapes"
POLL_S = 0.2


@pytest.fixture
def manager(backend: WireBackend) -> Iterator[TrainerJobManager]:
    with TrainerJobManager(api_key=backend.api_key, base_url=backend.base_url) as made:
        yield made


@pytest.fixture
def job_id(manager: TrainerJobManager) -> Iterator[str]:
    """A fresh id for a trainer job, deleted after the test."""
    made = f"wire-{uuid.uuid4().hex[:8]}"
    yield made
    manager.delete(made)


def config(job_id: str, **changes: Any) -> TrainerJobConfig:
    fields = {"base_model": MODEL, "lora_rank": 4, "requested_job_id": job_id, **changes}
    return TrainerJobConfig(**fields)


def start(manager: TrainerJobManager, job_id: str, **changes: Any) -> Any:
    return manager.create_and_wait(config(job_id, **changes), poll_interval_s=POLL_S, timeout_s=60)


def connect(backend: WireBackend, endpoint: Any, *, lora_rank: int = 4) -> FiretitanTrainingClient:
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=backend.api_key)
    return service.create_training_client(MODEL, lora_rank=lora_rank)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def snapshot(backend: WireBackend, job_id: str, name: str, kind: SnapshotKind, **changes: Any) -> Path:
    """A small checkpoint on disk, as a trainer leaves it."""
    fields = {"lora_rank": 0, "checkpoint_type": "base" if kind == "sampler" else None, "created": 1.0, **changes}
    promotable = kind == "sampler" and fields["checkpoint_type"] != "delta"
    manifest = Manifest(kind=kind, name=name, job_id=job_id, base_model=MODEL, promotable=promotable, step=1, **fields)
    folder = snapshot_dir(backend.home / "checkpoints", job_id, kind, name)
    write_snapshot(folder, manifest, lambda target: (target / "config.json").write_text("{}") and None)
    return folder


def test_a_shape_resolves_to_a_profile(manager: TrainerJobManager) -> None:
    latest = manager.resolve_training_profile(f"{SHAPES}/cpu-lora")
    pinned = manager.resolve_training_profile(f"{SHAPES}/cpu-full/versions/v1")

    assert (latest.training_shape, latest.training_shape_version) == (
        *(f"{SHAPES}/cpu-lora", f"{SHAPES}/cpu-lora/versions/v1"),
    )
    assert (latest.supports_lora, pinned.supports_lora) == (True, False)
    assert (latest.max_supported_context_length, latest.accelerator_type, latest.node_count) == (4096, "CPU", 1)
    with pytest.raises(RuntimeError, match=r"there is no training shape .*gpu.* The embedded backend has"):
        manager.resolve_training_profile(f"{SHAPES}/gpu")


def test_a_wrong_key_is_refused(backend: WireBackend) -> None:
    with (
        FireworksClient(api_key="wrong", base_url=backend.base_url) as client,
        pytest.raises(RuntimeError, match="API key was rejected"),
    ):
        client.resolve_training_profile(f"{SHAPES}/cpu-lora")


def test_a_created_trainer_is_ready_at_the_first_look(
    backend: WireBackend, manager: TrainerJobManager, job_id: str
) -> None:
    endpoint = start(manager, job_id, training_shape_ref=f"{SHAPES}/cpu-lora")

    assert endpoint.job_name == f"accounts/local/rlorTrainerJobs/{job_id}"
    assert endpoint.base_url == f"{backend.base_url}/training/v1/rlorTrainerJobs/local/{job_id}"
    assert endpoint.max_context_length == 512  # the shape's 4096, cut to what the model was made for
    assert manager.boot_time_s is not None
    assert manager.boot_time_s < 1.0


def test_a_repeated_create_finds_the_job_and_a_deleted_one_is_a_tombstone(
    manager: TrainerJobManager, job_id: str
) -> None:
    first = start(manager, job_id)
    assert manager.create(config(job_id)).job_name == first.job_name

    manager.delete(job_id)
    assert manager.get(job_id)["state"] == "JOB_STATE_DELETED"
    with pytest.raises(RuntimeError, match="archived and cannot be recreated"):
        manager.create(config(job_id))
    assert manager.list_checkpoints(job_id) == []


def test_a_refused_request_says_what_to_do(manager: TrainerJobManager, job_id: str) -> None:
    with pytest.raises(TrainingAPIError, match="cookbook models pull nothing") as refused:
        manager.create(config(job_id, base_model="accounts/local/models/nothing"))
    assert refused.value.status_code == 400
    with pytest.raises(TrainingAPIError, match=r"maxContextLength 4096 is more than .*\(512\)"):
        manager.create(config(job_id, max_context_length=4096))
    with pytest.raises(TrainingAPIError, match="trains all parameters, loraRank is 4"):
        manager.create(config(job_id, training_shape_ref=f"{SHAPES}/cpu-full"))
    assert manager.try_get(job_id) is None


def test_a_trainer_that_cannot_start_fails_with_its_reason(manager: TrainerJobManager, job_id: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed.*--no-such-option"):
        start(manager, job_id, extra_args=["--no-such-option=1"])
    assert manager.get(job_id)["state"] == "JOB_STATE_FAILED"


def test_a_cancelled_trainer_resumes(backend: WireBackend, manager: TrainerJobManager, job_id: str) -> None:
    start(manager, job_id)
    cancelled = manager._post(f"/v1/accounts/local/rlorTrainerJobs/{job_id}:cancel")
    assert cancelled.json()["state"] == "JOB_STATE_CANCELLED"
    assert not manager._check_healthz(f"{backend.base_url}/training/v1/rlorTrainerJobs/local/{job_id}")

    endpoint = manager.reconnect_and_wait(job_id, poll_interval_s=POLL_S)
    assert manager._check_healthz(endpoint.base_url)


def test_a_killed_trainer_is_failed_and_resumes(manager: TrainerJobManager, job_id: str) -> None:
    start(manager, job_id)
    killed = manager.get(job_id)["metadata"]["workerPid"]
    os.kill(killed, signal.SIGKILL)

    wait_until(lambda: manager.get(job_id)["state"] == "JOB_STATE_FAILED")
    assert "was killed by SIGKILL" in manager.get(job_id)["status"]["message"]
    manager.resume_and_wait(job_id, poll_interval_s=POLL_S)
    assert manager.get(job_id)["metadata"]["workerPid"] != killed


def test_an_idle_trainer_ends_by_itself_and_says_why(manager: TrainerJobManager, job_id: str) -> None:
    manager.create(config(job_id, inactivity_timeout=timedelta(seconds=1)))

    wait_until(lambda: manager.get(job_id)["state"] == "JOB_STATE_CANCELLED", timeout_s=60)
    assert manager.get(job_id)["inactivityTimeout"] == "1s"
    assert "inactiv" in manager.get(job_id)["statusMessage"]


@pytest.mark.parametrize(("lora_rank", "kind"), [(4, "HF_PEFT_ADDON"), (0, "HF_BASE_MODEL")])
def test_a_sampler_checkpoint_outlives_its_trainer_and_becomes_a_model(
    backend: WireBackend, manager: TrainerJobManager, job_id: str, lora_rank: int, kind: str
) -> None:
    endpoint = start(manager, job_id, lora_rank=lora_rank)
    client = connect(backend, endpoint, lora_rank=lora_rank)
    saved = client.save_weights_for_sampler_ext("final")
    client.save_state("step-1").result(timeout=60)
    manager.delete(job_id)

    rows = {row["name"].rpartition("/")[2]: row for row in manager.list_checkpoints(job_id)}
    assert set(rows) == {saved.snapshot_name, "step-1"}
    assert [rows[name]["promotable"] for name in (saved.snapshot_name, "step-1")] == [True, False]
    output = f"model-{job_id}"
    model = manager.promote_checkpoint(name=rows[saved.snapshot_name]["name"], output_model_id=output, base_model=MODEL)
    assert (model["kind"], model["state"]) == (kind, "READY")
    if kind == "HF_BASE_MODEL":
        assert not manager.model_is_moe(model["name"])
        again = TrainerJobConfig(base_model=model["name"], requested_job_id=f"{job_id}-next")
        assert manager.create_and_wait(again, poll_interval_s=POLL_S).max_context_length == 512
        manager.delete(f"{job_id}-next")


def test_checkpoints_are_listed_page_by_page(backend: WireBackend, manager: TrainerJobManager, job_id: str) -> None:
    for number in range(5):
        snapshot(backend, job_id, f"step-{number}", "sampler", created=float(number))

    rows = manager.list_checkpoints(job_id, page_size=2)
    assert [row["name"].rpartition("/")[2] for row in rows] == [f"step-{number}" for number in range(5)]
    with pytest.raises(RuntimeError, match="there is no trainer job 'nobody'"):
        manager.list_checkpoints("nobody")


def test_what_cannot_be_promoted_is_refused(backend: WireBackend, manager: TrainerJobManager, job_id: str) -> None:
    snapshot(backend, job_id, "good", "sampler")
    snapshot(backend, job_id, "other", "sampler")
    snapshot(backend, job_id, "part", "sampler", checkpoint_type="delta")
    snapshot(backend, job_id, "state", "state")

    def promote(checkpoint: str) -> dict[str, Any]:
        name = f"accounts/local/rlorTrainerJobs/{job_id}/checkpoints/{checkpoint}"
        return dict(manager.promote_checkpoint(name=name, output_model_id=f"out-{job_id}", base_model=MODEL))

    for checkpoint, reason in (("part", "is a delta"), ("state", "is a training state"), ("none", "has no checkpoint")):
        with pytest.raises(RuntimeError, match=reason):
            promote(checkpoint)
    assert promote("good") == promote("good")
    with pytest.raises(RuntimeError, match=r"HTTP 409.*"):
        promote("other")


def test_training_goes_on_over_a_killed_control_plane(
    backend: WireBackend, manager: TrainerJobManager, job_id: str
) -> None:
    client = connect(backend, start(manager, job_id))
    client.save_state("before").result(timeout=60)
    pid = manager.get(job_id)["metadata"]["workerPid"]
    state = embedded.status(backend.home)
    assert state is not None
    os.kill(state.control_plane_pid, signal.SIGKILL)

    client.save_state("after").result(timeout=60)  # the same model, in the same worker
    assert manager.get(job_id)["metadata"]["workerPid"] == pid
    assert len(manager.list_checkpoints(job_id)) == 2
