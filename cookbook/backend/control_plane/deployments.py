"""HTTP methods of deployments: create, get, list, update, delete.

A deployment is a job whose worker samples. Its states on the wire: CREATING, READY (a worker answers, or it is scaled
to zero), FAILED (its worker has ended, for whatever reason), DELETED.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer, failed_status, json_object, rfc3339
from cookbook.backend.control_plane.context import Plane, plane_of
from cookbook.backend.control_plane.deployment_request import (
    deployment_name,
    names_replicas,
    read_deployment_request,
    read_deployment_update,
    scaled_to_zero,
    trainer_job_id,
)
from cookbook.backend.control_plane.models import resolve_base_model
from cookbook.backend.control_plane.store import Job, JobState

__all__ = [
    "create_deployment",
    "delete_deployment",
    "existing_deployment",
    "get_deployment",
    "list_deployments",
    "update_deployment",
    "wire_state",
]

_START_GRACE_S = 20.0
"""How long create and update wait for the worker, so that the first GET says READY. Clients poll every 15 s."""


async def create_deployment(request: Request) -> Response:
    """POST deployments?deploymentId=...: 409 when the id is taken, by one that was deleted but not hard too."""
    plane = plane_of(request)
    job = read_deployment_request(plane.paths, request.query_params, await json_object(request))
    if not plane.store.add_job(job):
        taken = existing_deployment(plane, job.job_id)
        raise ApiError(
            Code.ALREADY_EXISTS,
            f"deployment {job.job_id} exists already ({wire_state(taken)}). Use it, delete it with hard=true, "
            "or choose another id.",
        )
    if job.is_live:
        plane.deployments.launch(job)
    return JsonAnswer(_resource(plane, await plane.deployments.settled(job.job_id, _START_GRACE_S)))


async def get_deployment(request: Request) -> Response:
    """GET deployments/{deployment}: 200 in state DELETED for one that was deleted but not hard."""
    plane = plane_of(request)
    return JsonAnswer(_resource(plane, existing_deployment(plane, request.path_params["deployment"])))


async def list_deployments(request: Request) -> Response:
    """GET deployments: all that there are, oldest first, on one page."""
    plane = plane_of(request)
    return JsonAnswer({"deployments": [_resource(plane, job) for job in plane.deployments.jobs()], "nextPageToken": ""})


async def update_deployment(request: Request) -> Response:
    """PATCH deployments/{deployment}?updateMask=...: scale, link to another trainer job, describe anew.

    maxReplicaCount 0 ends the worker; naming a replica count of 1 starts one when there is none, on the base model.
    """
    plane = plane_of(request)
    body = await json_object(request)
    job = existing_deployment(plane, request.path_params["deployment"])
    if job.state == JobState.DELETED:
        raise ApiError(Code.FAILED_PRECONDITION, f"deployment {job.job_id} was deleted. Create another one.")
    changed, named = read_deployment_update(job, request.query_params, body)
    spec = {**job.spec, "hot_load_trainer_job": changed["hotLoadTrainerJob"]}
    if names_replicas(named):
        await _scale(plane, plane.store.set_request(job, changed, spec))
    else:
        plane.store.set_request(job, changed, spec)
    return JsonAnswer(_resource(plane, await plane.deployments.settled(job.job_id, _START_GRACE_S)))


async def _scale(plane: Plane, job: Job) -> None:
    if scaled_to_zero(job):
        await plane.deployments.end(job.job_id, JobState.CANCELLED, "scaled to zero on request")
    elif not job.is_live:
        resolve_base_model(plane.paths.models, job.spec["base_model"], adapters=True)  # may be gone by now
        await plane.deployments.resume(job.job_id)


async def delete_deployment(request: Request) -> Response:
    """DELETE deployments/{deployment}[?hard=true]: answered when the worker has ended.

    With hard=true the deployment is forgotten and its id is free: the SDK makes a failed deployment anew under the same
    id. Without, it stays as DELETED and the id stays taken.
    """
    plane = plane_of(request)
    job = existing_deployment(plane, request.path_params["deployment"])
    if request.query_params.get("hard") == "true":
        await plane.deployments.remove(job)
    else:
        await plane.deployments.end(job.job_id, JobState.DELETED, "deleted on request")
    return JsonAnswer({})


def existing_deployment(plane: Plane, deployment_id: str) -> Job:
    """The deployment with an id, as it is now.

    Raises:
        ApiError: there is none (404).
    """
    job = plane.deployments.look(deployment_id)
    if job is None:
        raise ApiError(
            Code.NOT_FOUND, f"there is no deployment {deployment_id!r}. Create it, or look at the list of deployments."
        )
    return job


def wire_state(job: Job) -> str:
    """The state of a deployment as the API calls it."""
    if job.state == JobState.RUNNING:
        return "READY"
    if job.state == JobState.CANCELLED:
        # The API has no state for a deployment that ended on purpose, unless it was scaled to zero. FAILED is the one
        # that makes clients create it anew.
        return "READY" if scaled_to_zero(job) else "FAILED"
    return job.state.removeprefix("JOB_STATE_")


def _resource(plane: Plane, job: Job) -> dict[str, Any]:
    """A deployment as the API describes it: what was asked for, and how it fares."""
    state = wire_state(job)
    resource = {
        **job.request,
        "name": deployment_name(job.job_id),
        "state": state,
        "createTime": rfc3339(job.created),
        "updateTime": rfc3339(job.updated),
        "deploymentShape": job.shape,
        "maxContextLength": job.spec["max_context_length"],
        "replicaCount": 1 if job.state == JobState.RUNNING else 0,
        "statusMessage": job.status_message,
        "metadata": {
            "workerPid": job.worker_pid if job.is_live else None,
            "deploymentDir": str(plane.paths.deployment_dir(job.job_id)),
        },
    }
    if (linked := trainer_job_id(job)) is not None:
        resource["hotLoadBucketUrl"] = (plane.paths.checkpoints / linked / "sampler").as_uri()
    if state == "FAILED":
        resource["status"] = failed_status(job.status_message)
    return resource
