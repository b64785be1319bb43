"""Completions: POST /inference/v1/{completions,chat/completions}, passed on to the deployment that `model` names.

A mistake that stays one answers 400, never 404: clients take a 404 for a deployment that is loading, and wait. A
deployment that has no worker answers 503.
"""

from __future__ import annotations

import contextlib
import re

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer
from cookbook.backend.control_plane.context import ACCOUNT, Plane, plane_of
from cookbook.backend.control_plane.deployment_request import deployment_name, scaled_to_zero
from cookbook.backend.control_plane.deployments import wire_state
from cookbook.backend.control_plane.proxy import ClientGone, RequestBody, Target
from cookbook.backend.control_plane.store import LIVE_STATES, Job, JobState, Kind

__all__ = ["MAX_COMPLETION_BYTES", "list_served", "to_deployment"]

MAX_COMPLETION_BYTES = 64 * 2**20
"""Largest completion request: it is held in memory to see for whom it is. A prompt of 8 million tokens fits."""

_DEPLOYMENT = re.compile(rf"accounts/{ACCOUNT}/deployments/([a-z0-9-]+)")
_PREFIX = "/inference"


async def to_deployment(scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a completion on to the worker of the deployment that its body names, with the path below /inference."""
    plane: Plane = scope["app"].state.plane
    body = RequestBody(receive)
    with contextlib.suppress(ClientGone):
        deployment_id = _deployment_id(await body.read(at_most=MAX_COMPLETION_BYTES))
        path = scope["path"].removeprefix(_PREFIX)
        called = f"deployment {deployment_id}"
        target = Target(plane.deployments, deployment_id, called, path, _gone, timeout_s=None)
        await plane.proxy.forward(scope, send, body, target)


async def list_served(request: Request) -> Response:
    """GET /inference/v1/models: the deployments that can be asked for completions."""
    jobs = plane_of(request).store.jobs(LIVE_STATES, kind=Kind.DEPLOYMENT)
    served = [
        {"id": deployment_name(job.job_id), "object": "model", "created": int(job.created), "owned_by": ACCOUNT}
        for job in jobs
    ]
    return JsonAnswer({"object": "list", "data": served})


def _deployment_id(raw: bytes) -> str:
    """The deployment that a completion's body names; ApiError (400) when it names none."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(Code.INVALID_ARGUMENT, f"the request body is not JSON: {error}. Send a JSON object.") from error
    model = body.get("model") if isinstance(body, dict) else None
    named = _DEPLOYMENT.fullmatch(model) if isinstance(model, str) else None
    if named is not None:
        return named.group(1)
    remedy = f"Pass the name of a deployment, {deployment_name('<id>')}."
    if isinstance(model, str) and "/models/" in model:
        remedy = f"It is a model: create a deployment with baseModel {model}, and ask for {deployment_name('<id>')}."
    raise ApiError(Code.INVALID_ARGUMENT, f"model {model!r} is not a deployment. {remedy}")


def _gone(called: str, job: Job | None) -> ApiError:
    if job is None or job.state == JobState.DELETED:
        return ApiError(Code.INVALID_ARGUMENT, f"there is no {called}. Create it.")
    if scaled_to_zero(job):
        return ApiError(Code.UNAVAILABLE, f"{called} is scaled to zero. Set its maxReplicaCount to 1.")
    return ApiError(
        Code.UNAVAILABLE, f"{called} is {wire_state(job)}: {job.status_message}. Delete it, create it anew."
    )
