"""Deployments in the control plane: their requests, their life, and the ways to their workers, which here only echo."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cookbook import embedded
from cookbook.backend.control_plane.answers import ApiError
from cookbook.backend.control_plane.deployment_request import read_deployment_request, read_deployment_update
from cookbook.backend.control_plane.inference import MAX_COMPLETION_BYTES
from cookbook.backend.control_plane.lifecycle import Lifecycle
from cookbook.backend.control_plane.store import Job, JobState, Kind, Store
from cookbook.backend.paths import BackendPaths, acquire_lock, lock_is_held
from tests.backend.conftest import (
    ECHO_WORKER,
    JOBS,
    Backend,
    add_running_job,
    pid_is_alive,
    run_backend,
    start_echo_worker,
    wait_until,
)

DEPLOYMENTS = "/v1/accounts/local/deployments"
SHAPE = "accounts/local/deploymentShapes/cpu"
MODEL = "accounts/local/models/tiny"
TRAINER_JOB = "accounts/local/rlorTrainerJobs/job-a"
HOT_LOAD = "/hot_load/v1/models/hot_load"
COMPLETIONS = "/inference/v1/completions"


@pytest.fixture
def paths(tmp_path: Path) -> BackendPaths:
    """A home with a model `tiny`, made for 512 tokens, and an adapter."""
    made = BackendPaths(tmp_path / "home", embedded.code_version())
    made.create()
    (made.models / "tiny").mkdir()
    (made.models / "tiny" / "config.json").write_text('{"max_position_embeddings": 512}')
    (made.models / "adapter").mkdir()
    (made.models / "adapter" / "adapter_config.json").write_text("{}")
    return made


class Echoes:
    """Deployments recorded as ready, whose workers echo; they are ended after the test."""

    def __init__(self, paths: BackendPaths) -> None:
        self._paths = paths
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, deployment_id: str, *, state: str = JobState.RUNNING, alive: bool = True, **fields: Any) -> None:
        body = {"baseModel": MODEL, **fields}
        made = read_deployment_request(self._paths, {"deploymentId": deployment_id}, body)
        store = Store(self._paths.store)
        assert store.add_job(Job(**{**made.__dict__, "state": state}))
        store.close()
        folder = self._paths.deployment_dir(deployment_id)
        folder.mkdir()
        if alive:
            self.processes[deployment_id] = subprocess.Popen(
                [sys.executable, str(ECHO_WORKER), str(folder)],
                cwd=Path(embedded.__file__).parents[1],
                start_new_session=True,
            )
            wait_until((folder / "worker.json").exists)


@pytest.fixture
def echoes(paths: BackendPaths) -> Iterator[Echoes]:
    made = Echoes(paths)
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()


def wait_for_state(backend: Backend, deployment_id: str, state: str) -> dict[str, Any]:
    def found() -> dict[str, Any]:
        return dict(backend.client.get(f"{DEPLOYMENTS}/{deployment_id}").json())

    wait_until(lambda: found()["state"] == state)
    return found()


def model(deployment_id: str) -> str:
    return f"accounts/local/deployments/{deployment_id}"


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


def request_body(**fields: Any) -> dict[str, Any]:
    return {"baseModel": MODEL, "minReplicaCount": 0, "maxReplicaCount": 1, "enableHotLoad": True, **fields}


def test_a_deployment_request_becomes_the_spec_of_a_worker(paths: BackendPaths) -> None:
    body = request_body(hotLoadTrainerJob=TRAINER_JOB, extraArgs=["--threads=1"], acceleratorType="NVIDIA_H200")
    job = read_deployment_request(paths, {"deploymentId": "dep-a", "skipShapeValidation": "true"}, body)

    assert job.spec == {
        "deployment_id": "dep-a",
        "account": "local",
        "base_model": MODEL,
        "model_dir": str(paths.models / "tiny"),
        "base_dir": str(paths.models / "tiny"),
        "max_context_length": 512,
        "inactivity_timeout_s": 10800.0,
        "checkpoints_dir": str(paths.checkpoints),
        "hot_load_trainer_job": TRAINER_JOB,
        "extra_args": ["--threads=1"],
    }
    assert (job.kind, job.state, job.shape) == (Kind.DEPLOYMENT, JobState.CREATING, f"{SHAPE}/versions/v1")


def test_an_idle_time_and_a_shorter_context_can_be_asked_for(paths: BackendPaths) -> None:
    body = request_body(autoscalingPolicy={"scaleToZeroWindow": "90s"}, maxContextLength=128)
    job = read_deployment_request(paths, {}, body)

    assert (job.spec["inactivity_timeout_s"], job.spec["max_context_length"]) == (90, 128)
    assert job.spec["hot_load_trainer_job"] is None
    assert job.job_id.startswith("deployment-")


def test_an_adapter_is_served_with_the_context_of_the_model_it_adapts(paths: BackendPaths) -> None:
    adapts = {"base_model_name_or_path": str(paths.models / "tiny")}
    (paths.models / "adapter" / "adapter_config.json").write_text(json.dumps(adapts))
    spec = read_deployment_request(paths, {}, request_body(baseModel="accounts/local/models/adapter")).spec

    assert (spec["model_dir"], spec["max_context_length"]) == (str(paths.models / "adapter"), 512)
    assert spec["base_dir"] == str(paths.models / "tiny")


def test_the_base_of_an_adapter_that_names_no_folder_is_taken_from_the_client(paths: BackendPaths) -> None:
    (paths.models / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/tiny"}')
    body = request_body(baseModel="accounts/local/models/adapter")
    with pytest.raises(ApiError, match=r"is a LoRA adapter on 'someone/tiny', .* extraValues\.adapted_model"):
        read_deployment_request(paths, {}, body)
    base = str(paths.models / "tiny")
    spec = read_deployment_request(paths, {}, body | {"extraValues": {"adapted_model": base}}).spec
    assert (spec["base_dir"], spec["max_context_length"]) == (base, 512)


SHAPED = {"deploymentShape": f"{SHAPE}/versions/v1"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (request_body(baseModel="accounts/local/models/none"), "cookbook models pull none"),
        (request_body(baseModel="accounts/fireworks/models/x"), "is not a model of the embedded backend"),
        (request_body(maxContextLength=1024), r"maxContextLength 1024 is more than .* was made for \(512\)"),
        (request_body(minReplicaCount=2, maxReplicaCount=2), "minReplicaCount 2 must be 0 or 1"),
        (request_body(minReplicaCount=1, maxReplicaCount=0), "minReplicaCount 1 is more than maxReplicaCount 0"),
        (request_body(maxReplicaCount="1"), "maxReplicaCount '1' must be a whole number"),
        (request_body(hotLoadTrainerJob="job-a"), "hotLoadTrainerJob 'job-a' is not of the form accounts/local"),
        (request_body(hotLoadTransitionType="ASYNC"), "hotLoadTransitionType 'ASYNC' cannot be used"),
        (request_body(enableHotLoad="yes"), "enableHotLoad 'yes' must be true or false"),
        (request_body(extraArgs="--threads=1"), "extraArgs '--threads=1' must be a list"),
        (request_body(extraValues={"a": "b"}), "extraValues .* cannot be used"),
        (request_body(annotations={"a": 1}), "annotations .* must be an object whose values are strings"),
        (request_body(displayName="x" * 64), "fewer than 64"),
        (request_body(autoscalingPolicy={"scaleToZeroWindow": "1h"}), "scaleToZeroWindow '1h' must be a duration"),
        (request_body(deploymentShape="cpu"), "there is no deployment shape 'cpu'"),
        (request_body(**SHAPED, acceleratorType="NVIDIA_H200"), "acceleratorType 'NVIDIA_H200' is decided by"),
        (request_body(**SHAPED, acceleratorCount=1), "acceleratorCount 1 is decided by"),
        (request_body(**SHAPED, maxContextLength=256), "maxContextLength 256 is decided by"),
        (request_body(**SHAPED, precision="FP16"), "precision 'FP16' is decided by"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_its_value(
    paths: BackendPaths, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError, match=message):
        read_deployment_request(paths, {"deploymentId": "dep-a"}, body)


@pytest.mark.parametrize("deployment_id", ["../up", "Dep", "-a", "a" * 64])
def test_an_id_is_a_dns_label(paths: BackendPaths, deployment_id: str) -> None:
    with pytest.raises(ApiError, match="must be 1 to 63 of a-z"):
        read_deployment_request(paths, {"deploymentId": deployment_id}, request_body())


def updated(paths: BackendPaths, mask: str | None, body: dict[str, Any]) -> dict[str, Any]:
    made = read_deployment_request(paths, {}, request_body(hotLoadTrainerJob=TRAINER_JOB, description="old"))
    changed, _ = read_deployment_update(made, {} if mask is None else {"updateMask": mask}, body)
    return {name: value for name, value in changed.items() if made.request.get(name, None) != value}


def test_an_update_changes_what_its_mask_lists_and_nothing_else(paths: BackendPaths) -> None:
    other = TRAINER_JOB.replace("job-a", "job-b")
    body = {"hotLoadTrainerJob": other, "description": "new"}

    assert updated(paths, "hot_load_trainer_job", body) == {"hotLoadTrainerJob": other}
    assert updated(paths, "hotLoadTrainerJob,description", body) == body
    assert updated(
        paths, "hot_load_trainer_job,hot_load_transition_type", {**body, "hotLoadTransitionType": "SYNC"}
    ) == {"hotLoadTrainerJob": other}
    assert updated(paths, "hot_load_trainer_job", {}) == {"hotLoadTrainerJob": None}  # listed, absent: taken away
    assert updated(paths, None, {"maxReplicaCount": 0, "minReplicaCount": 0}) == {"maxReplicaCount": 0}


@pytest.mark.parametrize(
    ("mask", "body", "message"),
    [
        ("base_model", {"baseModel": "x"}, "baseModel 'x' cannot be changed"),
        (None, {"extraArgs": []}, "extraArgs .* cannot be changed"),
        ("hot_load_trainer_job", {"hotLoadTrainerJob": "x"}, "hotLoadTrainerJob 'x' is not of the form"),
        ("hot_load_transition_type", {"hotLoadTransitionType": "ASYNC"}, "'ASYNC' cannot be used"),
        (None, {"minReplicaCount": 3}, "minReplicaCount 3 must be 0 or 1"),
    ],
)
def test_an_update_that_cannot_be_is_refused(
    paths: BackendPaths, mask: str | None, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError, match=message):
        updated(paths, mask, body)


def test_the_shape_is_found_the_way_training_shapes_are(paths: BackendPaths) -> None:
    with run_backend(paths) as backend:
        versions = backend.client.get(f"/v1/{SHAPE}/versions", params={"filter": "latest_validated=true"}).json()
        found = versions["deploymentShapeVersions"][0]

        assert found["name"] == f"{SHAPE}/versions/v1"
        assert found["snapshot"]["acceleratorType"] == "CPU"
        assert backend.client.get(f"/v1/{found['name']}").json() == found
        assert backend.client.get(f"/v1/{SHAPE}").json()["latestVersion"] == found["name"]
        for wrong in ("deploymentShapes/gpu", "deploymentShapes/cpu/versions/v9", "deploymentShapes/gpu/versions"):
            assert backend.client.get(f"/v1/accounts/local/{wrong}").status_code == 404


def test_a_completion_goes_to_the_deployment_its_body_names(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        body = {"model": model("one"), "prompt": list(range(1000)), "unknown": None}

        for path in ("completions", "chat/completions"):
            seen = backend.client.post(f"/inference/v1/{path}", json=body).json()
            assert seen == {"body": body, "raw_path": f"/v1/{path}"}
        served = backend.client.get("/inference/v1/models").json()["data"]
        assert [entry["id"] for entry in served] == [model("one")]


def test_a_streamed_completion_arrives_piece_by_piece(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        body = {"model": model("one"), "stream": True}
        with backend.client.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            pieces = answer.iter_raw()
            assert next(pieces) == b"data: 1\n\n"
            (paths.deployment_dir("one") / "go").touch()
            assert b"".join(pieces) == b"data: [DONE]\n\n"


def test_a_completion_is_dropped_when_its_client_goes_away(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        folder = paths.deployment_dir("one")
        host, port = backend.endpoint.base_url.removeprefix("http://").split(":")
        body = b'{"model": "%s", "hold": true}' % model("one").encode()
        with socket.create_connection((host, int(port))) as client:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {backend.token}\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until((folder / "held").exists)
            assert not (folder / "dropped").exists()

        wait_until((folder / "dropped").exists)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "is not JSON"),
        (b"[1]", 400, "model None is not a deployment"),
        (b'{"model": 3}', 400, "model 3 is not a deployment"),
        (
            b'{"model": "accounts/local/models/tiny"}',
            400,
            "create a deployment with baseModel accounts/local/models/tiny",
        ),
        (b'{"model": "accounts/other/deployments/one"}', 400, "is not a deployment"),
        (b'{"model": "accounts/local/deployments/none"}', 400, "there is no deployment none"),
        (b" " * (MAX_COMPLETION_BYTES + 1), 413, f"more than {MAX_COMPLETION_BYTES} bytes"),
    ],
)
def test_a_completion_for_nobody_is_a_permanent_mistake(
    paths: BackendPaths, content: bytes, status: int, message: str
) -> None:
    with run_backend(paths) as backend:
        answer = backend.client.post(COMPLETIONS, content=content)

    assert answer.status_code == status
    assert message in message_of(answer)


def hot_load_headers(deployment_id: str, **headers: str) -> dict[str, str]:
    return {"fireworks-deployment": model(deployment_id), "fireworks-model": MODEL, **headers}


def test_a_hot_load_reaches_the_worker_with_the_trainer_job_of_the_moment(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one", hotLoadTrainerJob=TRAINER_JOB)
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")

        def linked(method: str) -> str:
            forged = {"x-cookbook-trainer-job": "accounts/local/rlorTrainerJobs/forged"}
            answer = backend.client.request(method, HOT_LOAD, headers=hot_load_headers("one", **forged))
            assert answer.json()["raw_path"] == "/hot_load"
            return str(answer.json()["headers"]["x-cookbook-trainer-job"])

        assert linked("GET") == linked("POST") == TRAINER_JOB
        other = TRAINER_JOB.replace("job-a", "job-b")
        patched = backend.client.patch(
            f"{DEPLOYMENTS}/one", params={"updateMask": "hot_load_trainer_job"}, json={"hotLoadTrainerJob": other}
        ).json()
        assert (patched["hotLoadTrainerJob"], patched["state"]) == (other, "READY")
        assert linked("POST") == other


@pytest.mark.parametrize(
    ("fields", "headers", "status", "message"),
    [
        ({}, hot_load_headers("one"), 400, "is not linked to a trainer job"),
        ({"enableHotLoad": False}, hot_load_headers("one"), 400, "enableHotLoad false"),
        ({}, {}, 400, "fireworks-deployment None does not name a deployment"),
        ({}, {"fireworks-deployment": "one"}, 400, "'one' does not name a deployment"),
        ({}, hot_load_headers("none"), 404, "there is no deployment 'none'"),
        ({}, {**hot_load_headers("one"), "fireworks-model": "accounts/local/models/other"}, 400, "is of base model"),
    ],
)
def test_a_hot_load_that_cannot_be_is_refused(
    paths: BackendPaths, echoes: Echoes, fields: dict[str, Any], headers: dict[str, str], status: int, message: str
) -> None:
    echoes.add("one", **fields)
    with run_backend(paths) as backend:
        answer = backend.client.post(HOT_LOAD, headers=headers, json={"identity": "w1"})

    assert answer.status_code == status
    assert message in message_of(answer)


def test_a_base_model_may_be_named_by_its_folder(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        headers = {**hot_load_headers("one"), "fireworks-model": str(paths.models / "tiny")}
        assert backend.client.get(HOT_LOAD, headers=headers).status_code == 207


def test_a_killed_worker_fails_its_deployment(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one", hotLoadTrainerJob=TRAINER_JOB)
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        echoes.processes["one"].kill()

        failed = wait_for_state(backend, "one", "FAILED")
        assert "the deployment's process ended unexpectedly" in failed["statusMessage"]
        assert failed["status"]["message"] == failed["statusMessage"]
        answer = backend.client.post(COMPLETIONS, json={"model": model("one")})
        assert answer.status_code == 503
        assert "ended unexpectedly" in message_of(answer)
        assert backend.client.post(HOT_LOAD, headers=hot_load_headers("one"), json={}).status_code == 410


def test_an_idle_deployment_says_why_it_ended(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        echoes.processes["one"].terminate()  # the echo worker's way of ending on purpose

        assert "told to end by signal" in wait_for_state(backend, "one", "FAILED")["status"]["message"]


def test_a_deployment_scaled_to_zero_has_no_worker_and_answers_503(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one", hotLoadTrainerJob=TRAINER_JOB)
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        scaled = backend.client.patch(f"{DEPLOYMENTS}/one", json={"maxReplicaCount": 0, "minReplicaCount": 0}).json()

        assert echoes.processes["one"].wait(timeout=5) == 0
        assert (scaled["state"], scaled["replicaCount"], scaled["metadata"]["workerPid"]) == ("READY", 0, None)
        answer = backend.client.post(COMPLETIONS, json={"model": model("one")})
        assert (answer.status_code, "scaled to zero" in message_of(answer)) == (503, True)
        assert backend.client.post(HOT_LOAD, headers=hot_load_headers("one"), json={}).status_code == 400
        assert backend.client.get("/inference/v1/models").json()["data"] == []


def test_a_deleted_id_is_taken_until_it_is_deleted_hard(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        create = (f"{DEPLOYMENTS}?deploymentId=one", request_body(minReplicaCount=0, maxReplicaCount=0))

        taken = backend.client.post(create[0], json=create[1])
        assert (taken.status_code, "(READY)" in message_of(taken)) == (409, True)
        assert backend.client.delete(f"{DEPLOYMENTS}/one").status_code == 200
        assert echoes.processes["one"].wait(timeout=5) == 0
        assert backend.client.get(f"{DEPLOYMENTS}/one").json()["state"] == "DELETED"
        assert backend.client.post(create[0], json=create[1]).status_code == 409
        assert backend.client.patch(f"{DEPLOYMENTS}/one", json={"maxReplicaCount": 1}).status_code == 400

        assert backend.client.delete(f"{DEPLOYMENTS}/one?ignoreChecks=true&hard=true").status_code == 200
        assert backend.client.get(f"{DEPLOYMENTS}/one").status_code == 404
        assert backend.client.delete(f"{DEPLOYMENTS}/one?hard=true").status_code == 404
        assert backend.client.post(create[0], json=create[1]).json()["state"] == "READY"


def test_a_late_delete_does_not_touch_what_was_made_anew(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one", alive=False)
    store = Store(paths.store)
    anew = store.job("one", Kind.DEPLOYMENT)
    assert anew is not None

    async def remove(job: Job) -> None:
        async with httpx.AsyncClient() as client:
            await Lifecycle(Kind.DEPLOYMENT, paths.deployment_dir, store, client, "key").remove(job)

    asyncio.run(remove(replace(anew, created=anew.created - 1)))
    assert store.job("one", Kind.DEPLOYMENT) == anew
    asyncio.run(remove(anew))
    assert store.job("one", Kind.DEPLOYMENT) is None
    store.close()


def test_a_deployment_that_is_starting_answers_503_and_then_says_how_it_ended(
    paths: BackendPaths, echoes: Echoes
) -> None:
    echoes.add("one", alive=False, hotLoadTrainerJob=TRAINER_JOB)
    lock = acquire_lock(paths.deployment_dir("one") / "worker.lock")  # as a worker that still loads its model
    assert lock is not None
    with run_backend(paths) as backend:
        assert backend.client.get(f"{DEPLOYMENTS}/one").json()["state"] == "CREATING"
        for path, headers in ((COMPLETIONS, {}), (HOT_LOAD, hot_load_headers("one"))):
            answer = backend.client.post(path, headers=headers, json={"model": model("one")})
            assert (answer.status_code, "is starting" in message_of(answer)) == (503, True)

        os.close(lock)
        assert "ended unexpectedly" in wait_for_state(backend, "one", "FAILED")["statusMessage"]


def test_deployments_and_trainer_jobs_do_not_mix(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    store = Store(paths.store)
    add_running_job(store, paths, "one")
    store.close()
    trainer = start_echo_worker(paths, "one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        backend.wait_for_state("one", "JOB_STATE_RUNNING")
        assert [job["name"] for job in backend.client.get(JOBS).json()["rlorTrainerJobs"]] == [
            "accounts/local/rlorTrainerJobs/one"
        ]
        assert [found["name"] for found in backend.client.get(DEPLOYMENTS).json()["deployments"]] == [model("one")]

        backend.client.delete(f"{DEPLOYMENTS}/one?hard=true")
        assert echoes.processes["one"].wait(timeout=5) == 0
        assert trainer.poll() is None
        assert backend.job("one")["state"] == "JOB_STATE_RUNNING"
    assert trainer.wait(timeout=5) == 0


def test_deployments_are_taken_up_by_the_next_control_plane(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("alive")
    echoes.add("dead", alive=False)
    echoes.add("leftover", state=JobState.DELETED)
    with run_backend(paths) as backend:
        wait_for_state(backend, "alive", "READY")
        assert wait_for_state(backend, "dead", "FAILED")
        assert echoes.processes["leftover"].wait(timeout=10) == 0
        os.kill(backend.client.get("/cookbook/v1/status").json()["pid"], signal.SIGKILL)

        wait_for_state(backend, "alive", "READY")
        assert pid_is_alive(echoes.processes["alive"].pid)
        assert backend.client.post(COMPLETIONS, json={"model": model("alive")}).status_code == 200


def test_a_backend_with_a_live_deployment_is_not_idle(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths, idle_timeout_s=0.5):
        time.sleep(2.0)
        assert lock_is_held(paths.lock)
        echoes.processes["one"].terminate()
        wait_until(lambda: not lock_is_held(paths.lock))


def test_stop_ends_deployments_and_they_say_so(paths: BackendPaths, echoes: Echoes) -> None:
    echoes.add("one")
    with run_backend(paths) as backend:
        wait_for_state(backend, "one", "READY")
        assert backend.client.get("/cookbook/v1/status").json()["deployments"] == {"running": 1}

    assert echoes.processes["one"].wait(timeout=5) == 0
    with run_backend(paths) as backend:
        assert wait_for_state(backend, "one", "FAILED")["statusMessage"] == "the embedded backend was stopped"
