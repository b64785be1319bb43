"""Checkpoint rows and promotion over HTTP, on real snapshots: what is listed, what becomes a model, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cookbook import embedded
from cookbook.backend.control_plane.store import Operation, Store
from cookbook.backend.paths import BackendPaths, lock_is_held, read_json
from cookbook.backend.snapshots import Manifest, SnapshotHold, SnapshotKind, snapshot_dir, write_snapshot
from tests.backend.conftest import JOBS, Backend, run_backend, wait_until

BASE = "accounts/local/models/tiny"
MODELS = "/v1/accounts/local/models"


def save(
    paths: BackendPaths,
    name: str,
    *,
    job_id: str = "job",
    kind: SnapshotKind = "sampler",
    checkpoint_type: str | None = "base",
    lora_rank: int = 0,
    created: float = 1.0,
) -> Path:
    """A snapshot with three small files, one of them in a folder."""
    folder = snapshot_dir(paths.checkpoints, job_id, kind, name)
    promotable = kind == "sampler" and checkpoint_type != "delta"
    manifest = Manifest(kind, name, job_id, BASE, lora_rank, checkpoint_type, promotable, created, step=3)

    def write(target: Path) -> None:
        config = "adapter_config.json" if lora_rank and checkpoint_type == "base" else "config.json"
        (target / config).write_text('{"r": 8}')
        (target / "model.safetensors").write_bytes(name.encode() * 1000)
        (target / "extra").mkdir()
        (target / "extra" / "notes.txt").write_text("n")

    write_snapshot(folder, manifest, write)
    return folder


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    paths = BackendPaths(tmp_path_factory.mktemp("home"), embedded.code_version())
    (paths.models / "tiny").mkdir(parents=True)
    (paths.models / "tiny" / "config.json").write_text("{}")
    save(paths, "step-2", kind="state", checkpoint_type=None, created=2.0)
    save(paths, "step-1", created=1.0)
    save(paths, "step-3", checkpoint_type="delta", created=3.5)
    save(paths, "lora-4", lora_rank=8, created=4.0)
    save(paths, "merged-5", lora_rank=8, checkpoint_type="merged_base", created=5.0)
    save(paths, "lora-state-6", kind="state", checkpoint_type=None, lora_rank=8, created=6.0)
    with run_backend(paths) as running:
        yield running


def promote(backend: Backend, checkpoint: str, output: str, **changes: Any) -> httpx.Response:
    body = {
        "output_model": f"accounts/local/models/{output}",
        "trainer_job_id": "accounts/local/rlorTrainerJobs/job",
        "base_model": BASE,
        "async_promotion": True,
        **changes,
    }
    return backend.client.post(f"/v1/accounts/local/checkpoints/{checkpoint}:promote", json=body)


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


def test_rows_are_listed_oldest_first_for_a_job_that_this_store_never_knew(backend: Backend) -> None:
    rows = backend.client.get(f"{JOBS}/job/checkpoints").json()["checkpoints"]

    assert [row["name"].rpartition("/")[2] for row in rows] == [
        *("step-1", "step-2", "step-3", "lora-4", "merged-5", "lora-state-6")
    ]
    assert [(row["checkpointType"].removeprefix("CHECKPOINT_TYPE_"), row["promotable"]) for row in rows] == [
        ("INFERENCE_BASE", True),
        ("TRAINING", False),
        ("INFERENCE_ARC_V2", False),
        ("INFERENCE_LORA", True),
        ("INFERENCE_BASE", True),
        ("TRAINING_LORA", False),
    ]
    assert rows[2]["createTime"] == "1970-01-01T00:00:03.500000Z"
    assert rows[0]["name"] == "accounts/local/rlorTrainerJobs/job/checkpoints/step-1"


def test_each_row_has_the_size_of_its_files(backend: Backend) -> None:
    rows = backend.client.get(f"{JOBS}/job/checkpoints").json()["checkpoints"]

    assert rows[0]["sizeBytes"] == len('{"r": 8}') + 6 * 1000 + 1


def test_a_deleted_checkpoint_is_gone_and_the_model_made_of_it_stays(backend: Backend) -> None:
    folder = save(backend.paths, "step-1", job_id="deleting")
    other = save(backend.paths, "step-2", job_id="deleting", kind="state", checkpoint_type=None)
    url = f"{JOBS}/deleting/checkpoints"
    promote(backend, "step-1", "kept-model", trainer_job_id="accounts/local/rlorTrainerJobs/deleting")

    assert backend.client.delete(f"{url}/step-1").json() == {}
    assert [row["name"].rpartition("/")[2] for row in backend.client.get(url).json()["checkpoints"]] == ["step-2"]
    assert (folder.exists(), other.exists()) == (False, True)
    assert (backend.paths.models / "kept-model" / "model.safetensors").is_file()
    again = backend.client.delete(f"{url}/step-1")
    assert (again.status_code, message_of(again)) == (404, "trainer job deleting has no checkpoint 'step-1'.")
    assert backend.client.delete(f"{JOBS}/nobody/checkpoints/step-1").status_code == 404


def test_a_name_of_both_kinds_is_deleted_only_with_its_kind(backend: Backend) -> None:
    save(backend.paths, "same", job_id="twins")
    state = save(backend.paths, "same", job_id="twins", kind="state", checkpoint_type=None)
    url = f"{JOBS}/twins/checkpoints/same"

    assert "Say which: ?kind=state or sampler" in message_of(backend.client.delete(url))
    assert backend.client.delete(url, params={"kind": "other"}).status_code == 404
    assert backend.client.delete(url, params={"kind": "sampler"}).status_code == 200
    assert state.exists()


def test_a_checkpoint_in_use_is_not_deleted(backend: Backend) -> None:
    folder = save(backend.paths, "step-1", job_id="in-use")
    url = f"{JOBS}/in-use/checkpoints/step-1"

    with SnapshotHold(folder):
        refused = backend.client.delete(url)
    assert refused.status_code == 409
    assert "sampler checkpoint 'step-1' of trainer job in-use is in use" in message_of(refused)
    assert (folder / "model.safetensors").is_file()
    assert backend.client.delete(url).status_code == 200


def test_a_deletion_that_a_kill_left_half_done_is_finished_when_it_is_asked_for_again(backend: Backend) -> None:
    folder = save(backend.paths, "step-1", job_id="half-deleted")
    half = folder.with_name(".deleting-step-1-00000000")
    folder.rename(half)

    assert backend.client.delete(f"{JOBS}/half-deleted/checkpoints/step-1").status_code == 404
    assert not half.exists()


def test_pages_add_up_to_the_whole_list(backend: Backend) -> None:
    url = f"{JOBS}/job/checkpoints"
    pages, token = [], ""
    while True:
        page = backend.client.get(url, params={"pageSize": 4, "pageToken": token}).json()
        pages.append(page["checkpoints"])
        token = page["nextPageToken"]
        if not token:
            break

    assert [len(page) for page in pages] == [4, 2]
    assert [row for page in pages for row in page] == backend.client.get(url).json()["checkpoints"]
    assert backend.client.get(url, params={"pageToken": "x"}).status_code == 400


def test_a_half_written_checkpoint_is_not_listed(backend: Backend) -> None:
    folder = snapshot_dir(backend.paths.checkpoints, "half", "sampler", "step-1")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")

    assert backend.client.get(f"{JOBS}/half/checkpoints").status_code == 404


@pytest.mark.parametrize(
    ("checkpoint", "kind"), [("step-1", "HF_BASE_MODEL"), ("lora-4", "HF_PEFT_ADDON"), ("merged-5", "HF_BASE_MODEL")]
)
def test_a_promoted_checkpoint_is_a_model_of_its_own(backend: Backend, checkpoint: str, kind: str) -> None:
    operation = promote(backend, checkpoint, f"out-{checkpoint}").json()["operation"]

    assert operation["done"]
    assert operation["response"]["kind"] == kind
    assert operation["response"]["state"] == "READY"
    assert backend.client.get(f"/v1/{operation['name']}").json() == operation
    folder = backend.paths.models / f"out-{checkpoint}"
    assert (folder / "model.safetensors").read_bytes() == checkpoint.encode() * 1000
    assert (folder / "extra" / "notes.txt").read_text() == "n"
    record = read_json(folder / "model.json")
    assert record is not None
    assert record["source"] == f"accounts/local/rlorTrainerJobs/job/checkpoints/{checkpoint}"
    assert (record["kind"], record["base_model"]) == (kind, BASE)
    assert backend.client.get(f"{MODELS}/out-{checkpoint}").json() == operation["response"]


def test_a_synchronous_promotion_answers_with_the_model(backend: Backend) -> None:
    answer = promote(backend, "step-1", "sync", async_promotion=False)

    assert answer.status_code == 200
    assert answer.json()["model"]["name"] == "accounts/local/models/sync"


def test_the_base_model_may_be_named_by_its_folder(backend: Backend) -> None:
    answer = promote(backend, "step-1", "by-folder", base_model=str(backend.paths.models / "tiny"))
    assert answer.json()["operation"]["done"]

    promote(backend, "step-1", "other-base")
    refused = promote(backend, "step-1", "by-other", base_model="accounts/local/models/other-base")
    assert refused.status_code == 400
    assert "is not what checkpoint step-1 was trained from" in message_of(refused)


def test_promoting_again_is_done_already_and_changes_nothing(backend: Backend) -> None:
    promote(backend, "step-1", "twice")
    before = (backend.paths.models / "twice" / "model.json").stat()
    again = promote(backend, "step-1", "twice")

    assert again.json()["operation"]["response"]["name"] == "accounts/local/models/twice"
    assert (backend.paths.models / "twice" / "model.json").stat() == before


def test_a_model_made_from_something_else_is_not_replaced(backend: Backend) -> None:
    promote(backend, "step-1", "occupied")
    answer = promote(backend, "merged-5", "occupied")

    assert answer.status_code == 409
    assert "exists already, made from accounts/local/rlorTrainerJobs/job/checkpoints/step-1" in message_of(answer)
    assert promote(backend, "step-1", "tiny").status_code == 409  # the base model itself


@pytest.mark.parametrize(
    ("checkpoint", "changes", "status", "message"),
    [
        ("step-2", {}, 400, "checkpoint step-2 of trainer job job is a training state"),
        ("step-3", {}, 400, "is a delta and not promotable"),
        ("step-9", {}, 404, r"has no checkpoint 'step-9'. Its promotable ones are \['step-1'"),
        ("step-1", {"trainer_job_id": "accounts/local/rlorTrainerJobs/nobody"}, 404, "no trainer job 'nobody'"),
        ("step-1", {"trainer_job_id": "job"}, 400, "trainer_job_id 'job' is not of the form"),
        ("step-1", {"output_model": "accounts/local/models/Big_Name"}, 400, "output_model .* is not of the form"),
        ("step-1", {"output_model": "accounts/other/models/x"}, 400, "output_model .* is not of the form"),
        ("step-1", {"base_model": None}, 400, f"base_model None is not what .* Pass '{BASE}'"),
        ("step-1", {"base_model": "accounts/local/models/none"}, 400, "there is no config.json in"),
    ],
)
def test_what_cannot_be_promoted_is_refused_with_the_reason(
    backend: Backend, checkpoint: str, changes: dict[str, Any], status: int, message: str
) -> None:
    answer = promote(backend, checkpoint, "refused", **changes)

    assert answer.status_code == status
    assert re.search(message, message_of(answer))
    assert not (backend.paths.models / "refused").exists()


def test_a_damaged_checkpoint_becomes_an_error_not_a_model(backend: Backend) -> None:
    folder = save(backend.paths, "step-1", job_id="damaged")
    (folder / "model.safetensors").write_bytes(b"step-2" * 1000)
    job = {"trainer_job_id": "accounts/local/rlorTrainerJobs/damaged"}

    operation = promote(backend, "step-1", "from-damaged", **job).json()["operation"]
    assert operation["done"]
    assert f"checkpoint file {folder / 'model.safetensors'} is damaged" in operation["error"]["message"]
    assert promote(backend, "step-1", "from-damaged", async_promotion=False, **job).status_code == 400
    assert not list(backend.paths.models.glob("*from-damaged*"))
    assert not list(backend.paths.models.glob(".promote-*"))


def test_a_models_folder_that_cannot_be_written_becomes_an_error_that_names_it(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, embedded.code_version())
    paths.create()
    save(paths, "step-1")
    with run_backend(paths) as backend:
        paths.models.rmdir()
        paths.models.touch()
        answer = promote(backend, "step-1", "out", async_promotion=False)

    assert answer.status_code == 400
    assert f"cannot write {paths.models}" in message_of(answer)
    paths.models.unlink()


def test_an_operation_that_a_kill_left_unfinished_is_run_again(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, embedded.code_version())
    paths.create()
    save(paths, "step-1")
    store = Store(paths.store)
    store.add_operation(Operation("half", "job", "step-1", "out", created=time.time()))
    store.close()
    (paths.models / ".promote-half").mkdir()
    (paths.models / ".promote-half" / "model.safetensors").write_bytes(b"half of")

    with run_backend(paths) as backend:
        url = "/v1/accounts/local/operations/half"
        wait_until(lambda: backend.client.get(url).json()["done"])
        assert backend.client.get(url).json()["response"]["name"] == "accounts/local/models/out"
    assert (paths.models / "out" / "model.safetensors").read_bytes() == b"step-1" * 1000
    assert not (paths.models / ".promote-half").exists()


def test_an_unfinished_operation_does_not_replace_a_model_that_came_meanwhile(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, embedded.code_version())
    paths.create()
    save(paths, "step-1")
    store = Store(paths.store)
    store.add_operation(Operation("late", "job", "step-1", "out", created=time.time()))
    store.close()
    (paths.models / "out").mkdir()
    (paths.models / "out" / "config.json").write_text('{"mine": true}')

    with run_backend(paths) as backend:
        url = "/v1/accounts/local/operations/late"
        wait_until(lambda: backend.client.get(url).json()["done"])
        assert backend.client.get(url).json()["error"]["code"] == 6
    assert (paths.models / "out" / "config.json").read_text() == '{"mine": true}'


def test_the_store_survives_kill_9(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, embedded.code_version())
    paths.create()
    save(paths, "step-1")
    (paths.models / "tiny").mkdir()
    (paths.models / "tiny" / "config.json").write_text("{}")
    with run_backend(paths) as backend:
        name = promote(backend, "step-1", "out").json()["operation"]["name"]
        state = embedded.status(paths.home)
        assert state is not None
        os.kill(state.control_plane_pid, signal.SIGKILL)
        wait_until(lambda: lock_is_held(paths.control_plane_lock))

        assert backend.client.get(f"/v1/{name}").json()["done"]


def test_model_json_is_valid_json_with_its_time(backend: Backend) -> None:
    promote(backend, "step-1", "timed")
    record = json.loads((backend.paths.models / "timed" / "model.json").read_text())

    assert set(record) == {"source", "kind", "base_model", "created"}
    assert record["created"].endswith("Z")
    assert backend.client.get(f"{MODELS}/timed").json()["createTime"] == record["created"]
