"""What the control plane makes of requests, without a trainer: keys, bodies, errors, shapes, models, job requests."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cookbook import embedded
from cookbook.backend.control_plane.answers import ApiError
from cookbook.backend.control_plane.auth import MAX_BODY_BYTES
from cookbook.backend.control_plane.job_request import read_job_request
from cookbook.backend.paths import BackendPaths
from tests.backend.conftest import JOBS, TRAINER, Backend, run_backend

SHAPES = "accounts/local/trainingShapes"
MODEL = "accounts/local/models/tiny"
PATHS = [
    ("GET", "/v1/accounts"),
    ("GET", JOBS),
    ("POST", f"{JOBS}?rlorTrainerJobId=x"),
    ("DELETE", f"{JOBS}/x"),
    ("POST", f"{JOBS}/x:resume"),
    ("GET", f"/v1/{SHAPES}/cpu-lora/versions"),
    ("POST", "/v1/accounts/local/checkpoints/x:promote"),
    ("GET", "/cookbook/v1/status"),
    ("POST", "/cookbook/v1/stop"),
    ("POST", f"{TRAINER}/x/api/v1/forward_backward"),
    ("GET", "/no/such/path"),
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with run_backend(BackendPaths(tmp_path_factory.mktemp("home"), embedded.code_version())) as running:
        yield running


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "headers",
    [{}, {"X-Api-Key": "wrong"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic Og=="}, {"X-Api-Key": ""}],
    ids=["no key", "wrong key", "wrong bearer", "basic", "empty key"],
)
def test_every_path_refuses_a_stranger(backend: Backend, method: str, path: str, headers: dict[str, str]) -> None:
    answer = httpx.request(method, backend.endpoint.base_url + path, headers=headers, trust_env=False)

    assert answer.status_code == 401
    assert answer.json()["error"]["status"] == "UNAUTHENTICATED"


def test_the_key_is_accepted_in_either_header(backend: Backend) -> None:
    url = f"{backend.endpoint.base_url}/v1/accounts?pageSize=2"
    for headers in ({"X-Api-Key": backend.token}, {"Authorization": f"bearer {backend.token}"}):
        assert httpx.get(url, headers=headers, trust_env=False).json() == {"accounts": [{"name": "accounts/local"}]}


def test_the_backend_listens_on_loopback_only(backend: Backend) -> None:
    port = int(backend.endpoint.base_url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [columns[1] for columns in rows if columns[3] == "0A" and int(columns[1].partition(":")[2], 16) == port]

    assert listening == [f"0100007F:{port:04X}"]


def test_a_body_above_the_limit_is_refused_before_it_is_read(backend: Backend) -> None:
    connection = http.client.HTTPConnection(backend.endpoint.base_url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", JOBS)
    connection.putheader("X-Api-Key", backend.token)
    connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    connection.endheaders()
    answer = connection.getresponse()

    assert answer.status == 413
    assert f"{MAX_BODY_BYTES + 1} bytes" in answer.read().decode()
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("PATCH", f"{JOBS}/x", 405),
        ("GET", f"{JOBS}/x", 404),
        ("DELETE", f"{JOBS}/x", 404),
        ("POST", f"{JOBS}/x:resume", 404),
        ("POST", f"{JOBS}/x:cancel", 404),
        ("GET", f"{JOBS}/x/checkpoints", 404),
        ("GET", f"{JOBS}/..%2F..%2Fetc/checkpoints", 404),
        ("GET", "/v1/accounts/other/models", 404),
        ("GET", f"/v1/{SHAPES}/gpu/versions", 404),
        ("GET", f"/v1/{SHAPES}/cpu-lora/versions/v9", 404),
        ("GET", "/v1/accounts/local/operations/x", 404),
        ("GET", "/v1/accounts/local/models/..", 404),
        ("GET", "/v1/accounts/local/models/nothing", 404),
    ],
)
def test_what_does_not_exist_is_an_error_in_the_form_of_the_api(
    backend: Backend, method: str, path: str, status: int
) -> None:
    answer = backend.client.request(method, path)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert isinstance(error["code"], int)
    assert error["message"]
    assert error["details"] == []


@pytest.mark.parametrize("body", [b"[1]", b"{", b'"x"'])
def test_a_body_that_is_no_object_is_refused(backend: Backend, body: bytes) -> None:
    answer = backend.client.post(f"{JOBS}?rlorTrainerJobId=a", content=body)

    assert answer.status_code == 400
    assert "the request body is" in message_of(answer)


@pytest.mark.parametrize(
    ("shape", "mode"), [("cpu-lora", "LORA_TRAINER"), ("cpu-full", "POLICY_TRAINER"), ("cpu-forward", "FORWARD_ONLY")]
)
def test_a_shape_resolves_to_its_latest_validated_version(backend: Backend, shape: str, mode: str) -> None:
    query = {"filter": "latest_validated=true", "pageSize": 1}
    found = backend.client.get(f"/v1/{SHAPES}/{shape}/versions", params=query).json()["trainingShapeVersions"]

    assert [version["name"] for version in found] == [f"{SHAPES}/{shape}/versions/v1"]
    assert found[0] == backend.client.get(f"/v1/{found[0]['name']}").json()
    assert found[0]["snapshot"]["trainerMode"] == mode
    assert found[0]["snapshot"]["maxSupportedContextLength"] == 4096
    refused = backend.client.get(f"/v1/{SHAPES}/{shape}/versions", params={"filter": "mode=x"})
    assert refused.status_code == 400


def test_models_of_the_home_are_listed_with_what_they_are(backend: Backend) -> None:
    models = backend.paths.models
    for name, config in (("dense", {}), ("mixture", {"num_local_experts": 8})):
        (models / name).mkdir()
        (models / name / "config.json").write_text(json.dumps(config))
    (models / "adapter").mkdir()
    (models / "adapter" / "adapter_config.json").write_text('{"r": 8, "target_modules": ["q_proj"]}')
    (models / ".promote-half").mkdir()
    (models / ".promote-half" / "config.json").write_text("{}")

    found = {model["name"]: model for model in backend.client.get("/v1/accounts/local/models").json()["models"]}

    assert list(found) == [f"accounts/local/models/{name}" for name in ("adapter", "dense", "mixture")]
    assert found["accounts/local/models/adapter"]["kind"] == "HF_PEFT_ADDON"
    assert found["accounts/local/models/adapter"]["peftDetails"]["r"] == 8
    assert found["accounts/local/models/dense"]["baseModelDetails"] == {"moe": False}
    assert backend.client.get("/v1/accounts/local/models/mixture").json()["baseModelDetails"] == {"moe": True}


@pytest.fixture
def paths(tmp_path: Path) -> BackendPaths:
    """A home with one model, `tiny`, that was made for 512 tokens, and an adapter."""
    made = BackendPaths(tmp_path, "test")
    (made.models / "tiny").mkdir(parents=True)
    (made.models / "tiny" / "config.json").write_text('{"max_position_embeddings": 512}')
    (made.models / "adapter").mkdir()
    (made.models / "adapter" / "adapter_config.json").write_text("{}")
    return made


def request_body(top: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    return {"serviceMode": True, "trainingConfig": {"baseModel": MODEL, "loraRank": 8, **config}, **(top or {})}


def test_a_job_request_becomes_the_spec_of_a_worker(paths: BackendPaths) -> None:
    body = request_body({"inactivityTimeout": "90.5s", "nodeCount": 1}, extraArgs=["--threads=1"], maxContextLength=256)
    job = read_job_request(paths, {"rlorTrainerJobId": "job-a", "skipValidations": "true"}, body)

    assert job.spec == {
        "job_id": "job-a",
        "job_name": "accounts/local/rlorTrainerJobs/job-a",
        "account": "local",
        "base_model": MODEL,
        "model_dir": str(paths.models / "tiny"),
        "lora_rank": 8,
        "max_context_length": 256,
        "forward_only": False,
        "extra_args": ["--threads=1"],
        "inactivity_timeout_s": 90.5,
        "checkpoints_dir": str(paths.checkpoints),
        "models_dir": str(paths.models),
    }


@pytest.mark.parametrize(
    ("rank", "forward_only", "shape"), [(8, False, "cpu-lora"), (0, False, "cpu-full"), (0, True, "cpu-forward")]
)
def test_without_a_shape_the_one_that_suits_is_taken(
    paths: BackendPaths, rank: int, forward_only: bool, shape: str
) -> None:
    job = read_job_request(paths, {}, request_body({"forwardOnly": forward_only}, loraRank=rank))

    assert job.shape == f"{SHAPES}/{shape}"
    assert job.spec["inactivity_timeout_s"] == 900
    assert job.job_id.startswith("trainer-")


def test_the_context_is_the_shapes_but_never_longer_than_the_models(paths: BackendPaths) -> None:
    def length(limit: int | None) -> int:
        config = {} if limit is None else {"max_position_embeddings": limit}
        (paths.models / "tiny" / "config.json").write_text(json.dumps(config))
        shape = {"trainingShape": f"{SHAPES}/cpu-lora/versions/v1"}
        return int(read_job_request(paths, shape, request_body()).spec["max_context_length"])

    assert [length(512), length(8192), length(None)] == [512, 4096, 4096]


def test_a_base_model_may_be_an_absolute_folder(paths: BackendPaths) -> None:
    folder = paths.models / "tiny"
    assert read_job_request(paths, {}, request_body(baseModel=str(folder))).spec["model_dir"] == str(folder)


LORA = {"trainingShape": f"{SHAPES}/cpu-lora"}
FULL = {"trainingShape": f"{SHAPES}/cpu-full"}
FORWARD = {"trainingShape": f"{SHAPES}/cpu-forward"}


@pytest.mark.parametrize(
    ("query", "body", "message"),
    [
        ({}, request_body(maxContextLength=1024), r"maxContextLength 1024 is more than .* was made for \(512\)"),
        ({}, request_body(maxContextLength=-1), "maxContextLength -1 must be a whole number"),
        ({}, request_body(baseModel="accounts/local/models/none"), "cookbook models pull none"),
        ({}, request_body(baseModel="accounts/fireworks/models/x"), "is not a model of the embedded backend"),
        ({}, request_body(baseModel="accounts/local/models/../../etc"), "is not a model of the embedded backend"),
        ({}, request_body(baseModel="/no/folder"), "there is no config.json in /no/folder"),
        ({}, request_body(baseModel="accounts/local/models/adapter"), "It is a LoRA adapter"),
        ({}, request_body(baseModel=None), "baseModel None is not a model"),
        ({}, request_body(loraRank=-1), "loraRank -1 must be a whole number"),
        ({}, request_body(loraRank="8"), "loraRank '8' must be a whole number"),
        ({}, request_body(extraArgs="--threads=1"), "extraArgs '--threads=1' must be a list of strings"),
        ({}, request_body(projectionHeadDim=8), "projectionHeadDim 8 cannot be used"),
        ({}, request_body({"forwardOnly": "yes"}), "forwardOnly 'yes' must be true or false"),
        ({}, request_body({"nodeCount": 2}), "nodeCount 2 must be 1"),
        ({}, request_body({"trainerReplicaCount": 2}), "trainerReplicaCount 2 must be 1"),
        ({}, request_body({"displayName": "x" * 64}), "must be a text of fewer than 64"),
        ({}, request_body({"inactivityTimeout": "1h"}), "inactivityTimeout '1h' must be a duration"),
        ({}, request_body({"inactivityTimeout": "10801s"}), "must be more than 0s and at most 10800s"),
        ({}, request_body({"inactivityTimeout": "0s"}), "must be more than 0s and at most 10800s"),
        ({}, request_body({"extraValues": {"a": "b"}}), "extraValues .* cannot be used"),
        ({}, {"trainingConfig": None}, "trainingConfig None must be an object"),
        ({"rlorTrainerJobId": "../up"}, request_body(), r"rlorTrainerJobId '\.\./up' must be 1 to 63 of a-z"),
        ({"rlorTrainerJobId": "Job"}, request_body(), "rlorTrainerJobId 'Job' must be"),
        ({"deploymentId": "d"}, request_body(), "deploymentId 'd' cannot be used"),
        ({"trainingShape": "cpu-lora"}, request_body(), "there is no training shape 'cpu-lora'"),
        (LORA, request_body(maxContextLength=256), "maxContextLength 256 is decided by trainingShape"),
        (LORA, request_body(acceleratorType="NVIDIA_H200"), "acceleratorType 'NVIDIA_H200' is decided by"),
        (LORA, request_body(acceleratorCount=1), "acceleratorCount 1 is decided by"),
        (LORA, request_body({"nodeCount": 1}), "nodeCount 1 is decided by"),
        (LORA, request_body(loraRank=0), "trains a LoRA adapter, loraRank is 0"),
        (FULL, request_body(loraRank=8), "trains all parameters, loraRank is 8"),
        (FORWARD, request_body(), "cannot train. Set forwardOnly"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_its_value(
    paths: BackendPaths, query: dict[str, str], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError, match=message):
        read_job_request(paths, query, body)


def test_a_reference_may_run_forward_only_on_a_lora_shape(paths: BackendPaths) -> None:
    job = read_job_request(paths, LORA, request_body({"forwardOnly": True}, loraRank=0))
    assert job.spec["forward_only"]
