"""Checkpoint rows of a trainer job, read from the manifests on disk: they outlive the job, and the code version too.

Deleting one, the size and the step of each, and whether its files are all there, are additions of the embedded backend
to the training API.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer, rfc3339
from cookbook.backend.control_plane.context import Plane, plane_of
from cookbook.backend.control_plane.deployment_request import trainer_job_id
from cookbook.backend.control_plane.job_request import job_name
from cookbook.backend.snapshots import (
    Manifest,
    SnapshotInUse,
    delete_snapshot,
    list_manifests,
    remove_deleted,
    snapshot_dir,
)

__all__ = ["checkpoint_name", "delete_checkpoint", "list_checkpoints", "manifests_of"]

logger = logging.getLogger(__name__)

_MAX_PAGE = 1000
_DEFAULT_PAGE = 200
_FOLDER_NAME = re.compile(r"[a-z0-9-]+")


async def list_checkpoints(request: Request) -> Response:
    """GET rlorTrainerJobs/{job}/checkpoints?pageSize=&pageToken=: oldest first; the token counts the rows before."""
    plane = plane_of(request)
    manifests = await manifests_of(plane, request.path_params["job"])
    size = min(_whole(request, "pageSize", _DEFAULT_PAGE) or _DEFAULT_PAGE, _MAX_PAGE)
    first = _whole(request, "pageToken", 0)
    more = first + size < len(manifests)
    rows = await asyncio.to_thread(
        lambda: [_row(plane.paths.checkpoints, manifest) for manifest in manifests[first : first + size]]
    )
    return JsonAnswer(
        {
            "checkpoints": rows,
            "nextPageToken": str(first + size) if more else "",
        }
    )


async def delete_checkpoint(request: Request) -> Response:
    """DELETE rlorTrainerJobs/{job}/checkpoints/{checkpoint}[?kind=state|sampler]: for ever. Models made of it stay.

    One that a live process loads, serves or copies is refused (409). Doing it again (404) finishes what a kill of the
    control plane left half done.
    """
    plane = plane_of(request)
    job_id, name = request.path_params["job"], request.path_params["checkpoint"]
    manifests = await manifests_of(plane, job_id, finish_deleting=True)
    manifest = _one(manifests, job_id, name, request.query_params.get("kind"))
    folder = snapshot_dir(plane.paths.checkpoints, job_id, manifest.kind, name)
    try:
        await asyncio.to_thread(delete_snapshot, folder)
    except SnapshotInUse:
        raise _in_use(plane, manifest) from None
    except OSError as error:
        raise _undeletable(error) from error
    logger.info("%s checkpoint %s of trainer %s: deleted, %d bytes", manifest.kind, name, job_id, manifest.size_bytes)
    return JsonAnswer({})


async def manifests_of(plane: Plane, job_id: str, *, finish_deleting: bool = False) -> list[Manifest]:
    """The complete checkpoints of a job, oldest first, whether or not the job still exists.

    With `finish_deleting`, what was deleted but for a kill is removed from the disk before.

    Raises:
        ApiError: neither the job nor a checkpoint of it is known (404).
    """
    manifests: list[Manifest] = []
    if _FOLDER_NAME.fullmatch(job_id):
        if finish_deleting:
            try:
                await asyncio.to_thread(remove_deleted, plane.paths.checkpoints, job_id)
            except OSError as error:
                raise _undeletable(error) from error
        manifests = await asyncio.to_thread(list_manifests, plane.paths.checkpoints, job_id)
    if not manifests and plane.store.job(job_id) is None:
        raise ApiError(Code.NOT_FOUND, f"there is no trainer job {job_id!r} and no checkpoint of it.")
    return manifests


def checkpoint_name(job_id: str, checkpoint: str) -> str:
    """The resource name of a checkpoint; its last part is the name under which it was saved."""
    return f"{job_name(job_id)}/checkpoints/{checkpoint}"


def _row(checkpoints_dir: Path, manifest: Manifest) -> dict[str, Any]:
    created = rfc3339(manifest.created)
    return {
        "name": checkpoint_name(manifest.job_id, manifest.name),
        "createTime": created,
        "updateTime": created,
        "checkpointType": f"CHECKPOINT_TYPE_{_type(manifest)}",
        "promotable": manifest.promotable,
        "sizeBytes": manifest.size_bytes,
        "step": manifest.step,
        "hasAllFiles": _has_all_files(checkpoints_dir, manifest),
    }


def _has_all_files(checkpoints_dir: Path, manifest: Manifest) -> bool:
    """Whether each file is there and as large as it was written; what is in them is checked where it is loaded."""
    folder = snapshot_dir(checkpoints_dir, manifest.job_id, manifest.kind, manifest.name)
    try:
        return all((folder / name).stat().st_size == entry.size for name, entry in manifest.files.items())
    except OSError:
        return False


def _one(manifests: list[Manifest], job_id: str, name: str, kind: str | None) -> Manifest:
    """The checkpoint of that name, and of that kind where both kinds have it."""
    found = [manifest for manifest in manifests if manifest.name == name and kind in (None, manifest.kind)]
    if not found:
        what = "checkpoint" if kind is None else f"{kind} checkpoint"
        raise ApiError(Code.NOT_FOUND, f"trainer job {job_id} has no {what} {name!r}.")
    if len(found) > 1:
        raise ApiError(
            Code.INVALID_ARGUMENT,
            f"trainer job {job_id} has a state and a sampler checkpoint {name!r}. Say which: ?kind=state or sampler.",
        )
    return found[0]


def _in_use(plane: Plane, manifest: Manifest) -> ApiError:
    """The refusal; names the deployments that may be serving the checkpoint."""
    deployments = [
        job.job_id for job in plane.deployments.jobs() if job.is_live and trainer_job_id(job) == manifest.job_id
    ]
    linked = f" Live deployments of that trainer: {', '.join(deployments)}." if deployments else ""
    return ApiError(
        Code.IN_USE,
        f"{manifest.kind} checkpoint {manifest.name!r} of trainer job {manifest.job_id} is in use: a deployment serves "
        f"it, a trainer loads it, or it is being promoted. It was not deleted. Delete what uses it, or wait.{linked}",
    )


def _undeletable(error: OSError) -> ApiError:
    return ApiError(Code.FAILED_PRECONDITION, f"cannot delete {error.filename}: {error.strerror or error}.")


def _type(manifest: Manifest) -> str:
    lora = manifest.lora_rank > 0
    if manifest.kind == "state":
        return "TRAINING_LORA" if lora else "TRAINING"
    if manifest.checkpoint_type == "delta":
        return "INFERENCE_ARC_V2"
    return "INFERENCE_LORA" if lora and manifest.checkpoint_type != "merged_base" else "INFERENCE_BASE"


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    if text and not text.isdecimal():
        raise ApiError(
            Code.INVALID_ARGUMENT, f"{name} {text!r} is not a whole number. Leave it out to begin at the first row."
        )
    return int(text) if text else default
