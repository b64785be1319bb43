"""Checkpoint rows of a trainer job, read from the manifests on disk: they outlive the job, and the code version too."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer, rfc3339
from cookbook.backend.control_plane.context import Plane, plane_of
from cookbook.backend.control_plane.job_request import job_name
from cookbook.backend.snapshots import Manifest, list_manifests

__all__ = ["checkpoint_name", "list_checkpoints", "manifests_of"]

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
    return JsonAnswer(
        {
            "checkpoints": [_row(manifest) for manifest in manifests[first : first + size]],
            "nextPageToken": str(first + size) if more else "",
        }
    )


async def manifests_of(plane: Plane, job_id: str) -> list[Manifest]:
    """The complete checkpoints of a job, oldest first, whether or not the job still exists.

    Raises:
        ApiError: neither the job nor a checkpoint of it is known (404).
    """
    manifests: list[Manifest] = []
    if _FOLDER_NAME.fullmatch(job_id):
        manifests = await asyncio.to_thread(list_manifests, plane.paths.checkpoints, job_id)
    if not manifests and plane.store.job(job_id) is None:
        raise ApiError(Code.NOT_FOUND, f"there is no trainer job {job_id!r} and no checkpoint of it.")
    return manifests


def checkpoint_name(job_id: str, checkpoint: str) -> str:
    """The resource name of a checkpoint; its last part is the name under which it was saved."""
    return f"{job_name(job_id)}/checkpoints/{checkpoint}"


def _row(manifest: Manifest) -> dict[str, Any]:
    created = rfc3339(manifest.created)
    return {
        "name": checkpoint_name(manifest.job_id, manifest.name),
        "createTime": created,
        "updateTime": created,
        "checkpointType": f"CHECKPOINT_TYPE_{_type(manifest)}",
        "promotable": manifest.promotable,
    }


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
