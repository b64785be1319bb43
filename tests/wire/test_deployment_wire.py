"""The unmodified DeploymentManager against the control plane and real deployment workers."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fireworks.training.sdk import DeploymentConfig, DeploymentManager
from fireworks.training.sdk.client import FiretitanServiceClient

from tests.running_backend import MODEL, WireBackend

SHAPE = "accounts/local/deploymentShapes/cpu/versions/v1"


@pytest.fixture
def deployments(backend: WireBackend) -> Iterator[DeploymentManager]:
    with DeploymentManager(api_key=backend.api_key, base_url=backend.base_url) as made:
        yield made


@pytest.fixture
def deployment_id(deployments: DeploymentManager) -> Iterator[str]:
    """A fresh id for a deployment, deleted after the test."""
    made = f"wire-{uuid.uuid4().hex[:8]}"
    yield made
    if deployments.get(made) is not None:
        deployments.delete(made)


def config(deployment_id: str, **changes: Any) -> DeploymentConfig:
    fields = {
        "deployment_id": deployment_id,
        "base_model": MODEL,
        "deployment_shape": SHAPE,
        "extra_args": ["--threads=1"],
        **changes,
    }
    return DeploymentConfig(**fields)


def worker_pid(deployments: DeploymentManager, deployment_id: str) -> int:
    return int(deployments._get_deployment(deployment_id)["metadata"]["workerPid"])


def complete(backend: WireBackend, deployment_id: str, prompt: list[int]) -> httpx.Response:
    return httpx.post(
        f"{backend.base_url}/inference/v1/completions",
        headers={"Authorization": f"Bearer {backend.api_key}"},
        json={"model": f"accounts/local/deployments/{deployment_id}", "prompt": prompt, "max_tokens": 4},
        timeout=60,
        trust_env=False,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_a_created_deployment_is_ready_at_the_first_look(
    backend: WireBackend, deployments: DeploymentManager, deployment_id: str
) -> None:
    created = deployments.create_or_get(config(deployment_id))
    ready = deployments.wait_for_ready(deployment_id)

    assert (created.state, ready.state) == ("READY", "READY")
    assert deployments.boot_time_s is not None
    assert deployments.boot_time_s < 1.0
    assert (ready.name, ready.base_model) == (f"accounts/local/deployments/{deployment_id}", MODEL)
    assert (ready.deployment_shape_version, ready.hot_load_transition_type) == (SHAPE, "SYNC")
    assert deployments.warmup(ready.inference_model, max_retries=1)
    again = deployments.create_or_get(config(deployment_id))
    assert again == ready
    assert complete(backend, deployment_id, [1, 2, 3]).json()["usage"]["completion_tokens"] <= 4


def test_a_deployment_that_cannot_start_says_why_and_is_made_anew(
    deployments: DeploymentManager, deployment_id: str
) -> None:
    failed = deployments.create_or_get(config(deployment_id, extra_args=["--no-such-option=1"]))
    assert failed.state == "FAILED"
    assert "--no-such-option" in deployments._get_deployment(deployment_id)["status"]["message"]
    with pytest.raises(RuntimeError, match="entered bad state: FAILED"):
        deployments.wait_for_ready(deployment_id)

    assert deployments.create_or_get(config(deployment_id)).state == "READY"


def test_a_refused_create_is_an_error_at_once(deployments: DeploymentManager, deployment_id: str) -> None:
    for changes in ({"base_model": "accounts/local/models/nothing"}, {"hot_load_transition_type": "ASYNC"}):
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            deployments.create_or_get(config(deployment_id, **changes))
    assert deployments.get(deployment_id) is None


def test_a_killed_deployment_is_failed_and_recreated_under_its_id(
    deployments: DeploymentManager, deployment_id: str
) -> None:
    deployments.create_or_get(config(deployment_id))
    killed = worker_pid(deployments, deployment_id)
    os.kill(killed, signal.SIGKILL)

    wait_until(lambda: deployments.get(deployment_id).state == "FAILED")
    assert "was killed by SIGKILL" in deployments._get_deployment(deployment_id)["status"]["message"]
    assert deployments.create_or_get(config(deployment_id)).state == "READY"
    assert worker_pid(deployments, deployment_id) != killed


def test_a_deployment_scales_to_zero_and_back(
    backend: WireBackend, deployments: DeploymentManager, deployment_id: str
) -> None:
    deployments.create_or_get(config(deployment_id))
    deployments.scale_to_zero(deployment_id)
    assert complete(backend, deployment_id, [1, 2]).status_code == 503

    scaled = deployments.update(deployment_id, {"maxReplicaCount": 1}, ["max_replica_count"])
    assert scaled.state == "READY"
    assert complete(backend, deployment_id, [1, 2]).status_code == 200


def test_a_deleted_deployment_is_gone_with_its_process(deployments: DeploymentManager, deployment_id: str) -> None:
    deployments.create_or_get(config(deployment_id))
    pid = worker_pid(deployments, deployment_id)

    deployments.delete(deployment_id)

    assert deployments.get(deployment_id) is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_weights_of_the_linked_trainer_are_served_and_outlive_the_control_plane(
    backend: WireBackend, deployments: DeploymentManager, deployment_id: str, trainer: str
) -> None:
    service = FiretitanServiceClient(
        base_url=f"{backend.base_url}/training/v1/rlorTrainerJobs/local/{trainer}", api_key=backend.api_key
    )
    client = service.create_training_client(MODEL, lora_rank=4)
    identity = client.save_weights_for_sampler_ext(f"sync-{deployment_id}").snapshot_name
    nobody = "accounts/local/rlorTrainerJobs/nobody"
    deployments.create_or_get(config(deployment_id, hot_load_trainer_job=nobody))

    def load() -> bool:
        return deployments.hotload_and_wait(deployment_id, MODEL, identity, timeout_seconds=60)

    try:
        loaded = load()
    except httpx.HTTPStatusError:
        loaded = False
    assert not loaded  # the link names a trainer job without such a snapshot

    job_name = f"accounts/local/rlorTrainerJobs/{trainer}"
    linked = deployments.reattach_trainer(deployment_id, base_model=MODEL, trainer_job_name=job_name, timeout_s=5)
    assert linked.hot_load_trainer_job == job_name
    assert load()
    pid = worker_pid(deployments, deployment_id)
    os.kill(deployments._get("/cookbook/v1/status").json()["pid"], signal.SIGKILL)

    # A client of its own: the connections of the other one died with the control plane.
    with DeploymentManager(api_key=backend.api_key, base_url=backend.base_url) as later:
        served = later.hotload_check_status(deployment_id, MODEL)["replicas"][0]
        assert served["current_snapshot_identity"] == identity
        assert worker_pid(later, deployment_id) == pid
    service.close()
