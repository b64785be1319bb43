"""Reading a request to create a trainer job: every field checked, and what its worker is started with worked out.

Fields that only place a job on a cloud (region, reservation, image tag, accelerators on the manual path) are accepted
and have no effect here. Fields that would change what the job computes are refused when they cannot be honoured.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cookbook.backend.control_plane.answers import ApiError, Code
from cookbook.backend.control_plane.context import ACCOUNT
from cookbook.backend.control_plane.models import context_length, resolve_base_model
from cookbook.backend.control_plane.shapes import Shape, find_shape, select_shape
from cookbook.backend.control_plane.store import Job, JobState
from cookbook.backend.paths import BackendPaths

__all__ = ["DEFAULT_INACTIVITY_S", "MAX_INACTIVITY_S", "job_name", "read_job_request"]

DEFAULT_INACTIVITY_S = 900.0
MAX_INACTIVITY_S = 3 * 3600.0

_JOB_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DURATION = re.compile(r"(\d+(?:\.\d{1,9})?)s")
_MAX_DISPLAY_NAME = 64

_SHAPE_OWNED = ("maxContextLength", "acceleratorType", "acceleratorCount", "nodeCount")
_NOT_HERE = {
    "projectionHeadDim": "there is no projection head in the embedded trainer",
    "extraValues": "the embedded trainer takes its options from extraArgs",
    "disableInactivityCleanup": "an embedded trainer always ends when idle; raise inactivityTimeout (3 hours at most)",
    "hotLoadDeploymentId": "link the deployment to the trainer with its hotLoadTrainerJob",
}


@dataclass(frozen=True)
class _Fields:
    """Body and trainingConfig of a request as one table, with the checks that name a field and its value."""

    values: dict[str, Any]

    @classmethod
    def read(cls, body: dict[str, Any]) -> _Fields:
        config = body.get("trainingConfig")
        if not isinstance(config, dict):
            raise _bad("trainingConfig", config, "must be an object with baseModel and loraRank")
        return cls({**body, **config})

    def whole(self, name: str, default: int, *, least: int) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _bad(name, value, f"must be a whole number, {least} or more")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise _bad(name, value, "must be true or false")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _bad(name, value, "must be a list of strings")
        return value

    def duration_s(self, name: str, default: float, *, at_most: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        matched = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if matched is None:
            raise _bad(name, value, "must be a duration in seconds such as '3600s'")
        if not 0 < float(matched.group(1)) <= at_most:
            raise _bad(name, value, f"must be more than 0s and at most {at_most:.0f}s")
        return float(matched.group(1))


def read_job_request(paths: BackendPaths, query: Mapping[str, str], body: dict[str, Any]) -> Job:
    """A new job, in state CREATING, out of the query and the body of a create call. Nothing is started or stored.

    Raises:
        ApiError: a field that cannot be used, named, with its value and the remedy (400); an unknown shape (404).
    """
    job_id = _job_id(query)
    fields = _Fields.read(body)
    _refuse_what_is_not_here(fields, query)
    lora_rank = fields.whole("loraRank", 0, least=0)
    forward_only = fields.flag("forwardOnly")
    shape = _shape(query, fields, lora_rank=lora_rank, forward_only=forward_only)
    base_model = fields.values.get("baseModel")
    model_dir = resolve_base_model(paths.models, base_model)
    now = time.time()
    spec = {
        "job_id": job_id,
        "job_name": job_name(job_id),
        "account": ACCOUNT,
        "base_model": base_model,
        "model_dir": str(model_dir),
        "lora_rank": lora_rank,
        "max_context_length": _max_context_length(fields, shape, context_length(model_dir)),
        "forward_only": forward_only,
        "extra_args": fields.texts("extraArgs"),
        "inactivity_timeout_s": fields.duration_s("inactivityTimeout", DEFAULT_INACTIVITY_S, at_most=MAX_INACTIVITY_S),
        "checkpoints_dir": str(paths.checkpoints),
        "models_dir": str(paths.models),
    }
    return Job(
        job_id=job_id,
        state=JobState.CREATING,
        status_message="",
        created=now,
        updated=now,
        shape=shape.name,
        request=body,
        spec=spec,
    )


def job_name(job_id: str) -> str:
    """The resource name of a trainer job."""
    return f"accounts/{ACCOUNT}/rlorTrainerJobs/{job_id}"


def _job_id(query: Mapping[str, str]) -> str:
    job_id = query.get("rlorTrainerJobId") or f"trainer-{secrets.token_hex(4)}"
    if not _JOB_ID.fullmatch(job_id):
        raise _bad(
            "rlorTrainerJobId", job_id, "must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a-z or 0-9"
        )
    return job_id


def _refuse_what_is_not_here(fields: _Fields, query: Mapping[str, str]) -> None:
    for name, reason in _NOT_HERE.items():
        if fields.values.get(name):
            raise _bad(name, fields.values[name], f"cannot be used: {reason}. Remove the field")
    if query.get("deploymentId"):
        raise _bad(
            "deploymentId", query["deploymentId"], f"cannot be used: {_NOT_HERE['hotLoadDeploymentId']}. Remove it"
        )
    for name in ("nodeCount", "trainerReplicaCount"):
        if fields.whole(name, 1, least=0) > 1:
            raise _bad(name, fields.values[name], "must be 1: an embedded trainer is one process on this machine")
    display_name = fields.values.get("displayName", "")
    if not isinstance(display_name, str) or len(display_name) >= _MAX_DISPLAY_NAME:
        raise _bad("displayName", display_name, f"must be a text of fewer than {_MAX_DISPLAY_NAME} characters")


def _shape(query: Mapping[str, str], fields: _Fields, *, lora_rank: int, forward_only: bool) -> Shape:
    """The shape that the request names, or the one that suits it."""
    name = query.get("trainingShape")
    if not name:
        return select_shape(lora_rank=lora_rank, forward_only=forward_only)
    shape = find_shape(name)
    for field in _SHAPE_OWNED:
        if fields.values.get(field):
            raise _bad(
                field, fields.values[field], f"is decided by trainingShape {name}. Remove {field}, or trainingShape"
            )
    shape.check(lora_rank=lora_rank, forward_only=forward_only)
    return shape


def _max_context_length(fields: _Fields, shape: Shape, model_limit: int | None) -> int:
    """Tokens a datum may have: as requested, else the shape's, never above what the model was made for."""
    requested = fields.whole("maxContextLength", 0, least=0)
    if model_limit is None:
        return requested or shape.max_context_length
    if requested > model_limit:
        raise _bad(
            "maxContextLength",
            requested,
            f"is more than baseModel {fields.values['baseModel']} was made for ({model_limit}). "
            f"Ask for {model_limit} or fewer",
        )
    return requested or min(shape.max_context_length, model_limit)


def _bad(field: str, value: object, problem: str) -> ApiError:
    return ApiError(Code.INVALID_ARGUMENT, f"{field} {value!r} {problem}.")
