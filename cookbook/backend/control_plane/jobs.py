"""HTTP methods of trainer jobs: create, get, list, resume, cancel, delete."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer, failed_status, json_object, rfc3339
from cookbook.backend.control_plane.context import Plane, plane_of
from cookbook.backend.control_plane.job_request import job_name, read_job_request
from cookbook.backend.control_plane.models import resolve_base_model
from cookbook.backend.control_plane.store import Job, JobState

__all__ = ["cancel_job", "create_job", "delete_job", "existing_job", "get_job", "list_jobs", "resume_job"]

_START_GRACE_S = 30.0
"""How long create and :resume wait for the worker, so that the first GET says RUNNING. Clients poll every 5 s."""


async def create_job(request: Request) -> Response:
    """POST rlorTrainerJobs?rlorTrainerJobId=...: 409 when the id is taken, by a deleted job too."""
    plane = plane_of(request)
    job = read_job_request(plane.paths, request.query_params, await json_object(request))
    if not plane.store.add_job(job):
        taken = plane.store.job(job.job_id)
        state = taken.state if taken is not None else "unknown"
        raise ApiError(
            Code.ALREADY_EXISTS,
            f"trainer job {job.job_id} exists already ({state}). Use it (:resume when it has stopped), or another id.",
        )
    plane.trainers.launch(job)
    return JsonAnswer(_resource(plane, await plane.trainers.settled(job.job_id, _START_GRACE_S)))


async def get_job(request: Request) -> Response:
    """GET rlorTrainerJobs/{job}: 200 for a deleted one too, in state JOB_STATE_DELETED."""
    plane = plane_of(request)
    return JsonAnswer(_resource(plane, existing_job(plane, request.path_params["job"])))


async def list_jobs(request: Request) -> Response:
    """GET rlorTrainerJobs: every job there ever was, oldest first, on one page."""
    plane = plane_of(request)
    return JsonAnswer(
        {"rlorTrainerJobs": [_resource(plane, job) for job in plane.trainers.jobs()], "nextPageToken": ""}
    )


async def resume_job(request: Request) -> Response:
    """POST rlorTrainerJobs/{job}:resume: a stopped job gets a new worker; a live one stays as it is."""
    plane = plane_of(request)
    job = existing_job(plane, request.path_params["job"])
    if job.state == JobState.DELETED:
        raise ApiError(
            Code.FAILED_PRECONDITION, f"trainer job {job.job_id} was deleted and cannot be resumed. Create another one."
        )
    resolve_base_model(plane.paths.models, job.spec["base_model"])  # it may be gone since the job was created
    await plane.trainers.resume(job.job_id)
    return JsonAnswer(_resource(plane, await plane.trainers.settled(job.job_id, _START_GRACE_S)))


async def cancel_job(request: Request) -> Response:
    """POST rlorTrainerJobs/{job}:cancel: answered when the worker has ended. A stopped job stays as it is."""
    plane = plane_of(request)
    job = existing_job(plane, request.path_params["job"])
    return JsonAnswer(
        _resource(plane, await plane.trainers.end(job.job_id, JobState.CANCELLED, "cancelled on request"))
    )


async def delete_job(request: Request) -> Response:
    """DELETE rlorTrainerJobs/{job}: answered when the worker has ended. The id stays taken, checkpoints stay."""
    plane = plane_of(request)
    job = existing_job(plane, request.path_params["job"])
    await plane.trainers.end(job.job_id, JobState.DELETED, "deleted on request; its checkpoints are kept")
    return JsonAnswer({})


def existing_job(plane: Plane, job_id: str) -> Job:
    """The job with an id, as it is now.

    Raises:
        ApiError: there is none (404).
    """
    job = plane.trainers.look(job_id)
    if job is None:
        raise ApiError(Code.NOT_FOUND, f"there is no trainer job {job_id!r}. Create it, or look at the list of jobs.")
    return job


def _resource(plane: Plane, job: Job) -> dict[str, Any]:
    """A job as the API describes it: what was asked for, with the effective context length, and how it fares."""
    config = dict(job.request["trainingConfig"])
    config["maxContextLength"] = job.spec["max_context_length"]
    resource = {
        **job.request,
        "name": job_name(job.job_id),
        "state": job.state,
        "createTime": rfc3339(job.created),
        "updateTime": rfc3339(job.updated),
        "trainingConfig": config,
        "trainingShape": job.shape,
        "inactivityTimeout": f"{job.spec['inactivity_timeout_s']:g}s",
        "statusMessage": job.status_message,
        "metadata": {
            "workerPid": job.worker_pid if job.is_live else None,
            "jobDir": str(plane.paths.job_dir(job.job_id)),
        },
    }
    if job.state == JobState.FAILED:
        resource["status"] = failed_status(job.status_message)
    return resource
