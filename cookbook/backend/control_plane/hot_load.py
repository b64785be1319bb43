"""Weight sync: /hot_load/v1/models/hot_load, passed on to the deployment that the `fireworks-deployment` header names.

The worker is told with every request whose snapshots it may load: the link to a trainer job can change while it runs.
A deployment that cannot load again answers 400 or 410, which clients do not send again.
"""

from __future__ import annotations

import contextlib
import re

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from cookbook.backend.control_plane.answers import ApiError, Code
from cookbook.backend.control_plane.context import ACCOUNT, Plane
from cookbook.backend.control_plane.deployment_request import deployment_name, scaled_to_zero
from cookbook.backend.control_plane.deployments import existing_deployment, wire_state
from cookbook.backend.control_plane.models import resolve_base_model
from cookbook.backend.control_plane.proxy import RequestBody, Target
from cookbook.backend.control_plane.store import Job, JobState

__all__ = ["TRAINER_JOB_HEADER", "to_hot_load"]

TRAINER_JOB_HEADER = b"x-cookbook-trainer-job"
"""Tells the worker the trainer job (its full name) whose snapshots it loads; empty when there is none."""

_DEPLOYMENT = re.compile(rf"accounts/{ACCOUNT}/deployments/([a-z0-9-]+)")


async def to_hot_load(scope: Scope, receive: Receive, send: Send) -> None:
    """GET: what a deployment serves. POST: load a snapshot. Both are answered by its worker."""
    plane: Plane = scope["app"].state.plane
    headers = Headers(scope=scope)
    job = existing_deployment(plane, _deployment_id(headers))
    _check_base_model(plane, job, headers.get("fireworks-model"))
    if scope["method"] == "POST":
        _check_loadable(job)
    target = Target(
        plane.deployments,
        job.job_id,
        f"deployment {job.job_id}",
        "/hot_load",
        _gone,
        headers=((TRAINER_JOB_HEADER, (job.request["hotLoadTrainerJob"] or "").encode()),),
        timeout_s=None,
    )
    await plane.proxy.forward(scope, send, RequestBody(receive), target)


def _deployment_id(headers: Headers) -> str:
    value = headers.get("fireworks-deployment")
    named = _DEPLOYMENT.fullmatch(value or "")
    if named is None:
        raise ApiError(
            Code.INVALID_ARGUMENT,
            f"the header fireworks-deployment {value!r} does not name a deployment. Send {deployment_name('<id>')}.",
        )
    return named.group(1)


def _check_base_model(plane: Plane, job: Job, named: str | None) -> None:
    """ApiError (400) when the `fireworks-model` header names another base model than the deployment's."""
    own = job.spec["base_model"]
    if named is None or named == own:
        return
    with contextlib.suppress(ApiError):
        if str(resolve_base_model(plane.paths.models, named, adapters=True)) == job.spec["model_dir"]:
            return
    raise ApiError(
        Code.INVALID_ARGUMENT, f"deployment {job.job_id} is of base model {own!r}, not of {named!r}. Pass {own!r}."
    )


def _check_loadable(job: Job) -> None:
    """ApiError (400) unless the deployment may load snapshots, and says of which trainer job."""
    if not job.request["enableHotLoad"]:
        problem = "was created with enableHotLoad false. Set it to true"
    elif not job.request["hotLoadTrainerJob"]:
        problem = "is not linked to a trainer job. Set its hotLoadTrainerJob"
    else:
        return
    raise ApiError(Code.FAILED_PRECONDITION, f"deployment {job.job_id} {problem}, and load again.")


def _gone(called: str, job: Job | None) -> ApiError:
    if job is None or job.state == JobState.DELETED:
        return ApiError(Code.NOT_FOUND, f"there is no {called}. Create it.")
    if scaled_to_zero(job):
        return ApiError(Code.FAILED_PRECONDITION, f"{called} is scaled to zero. Set its maxReplicaCount to 1.")
    return ApiError(Code.LOST, f"{called} is {wire_state(job)}: {job.status_message}. Delete it, create it anew.")
