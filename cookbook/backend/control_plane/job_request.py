"""Reading a request to create a trainer job: every field checked, and what its worker is started with worked out.

Fields that only place a job on a cloud (region, reservation, image tag, accelerators on the manual path) are accepted
and have no effect here. Fields that would change what the job computes are refused when they cannot be honoured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from cookbook.backend.control_plane.context import ACCOUNT
from cookbook.backend.control_plane.fields import Fields, bad, new_id
from cookbook.backend.control_plane.models import context_length, resolve_base_model
from cookbook.backend.control_plane.shapes import Shape, find_shape, select_shape
from cookbook.backend.control_plane.store import Job, JobState
from cookbook.backend.paths import BackendPaths

__all__ = ["DEFAULT_INACTIVITY_S", "MAX_INACTIVITY_S", "job_name", "read_job_request"]

DEFAULT_INACTIVITY_S = 900.0
MAX_INACTIVITY_S = 3 * 3600.0

_SHAPE_OWNED = ("maxContextLength", "acceleratorType", "acceleratorCount", "nodeCount")
_NOT_HERE = {
    "projectionHeadDim": "there is no projection head in the embedded trainer",
    "extraValues": "the embedded trainer takes its options from extraArgs",
    "disableInactivityCleanup": "an embedded trainer always ends when idle; raise inactivityTimeout (3 hours at most)",
    "hotLoadDeploymentId": "link the deployment to the trainer with its hotLoadTrainerJob",
}


def read_job_request(paths: BackendPaths, query: Mapping[str, str], body: dict[str, Any]) -> Job:
    """A new job, in state CREATING, out of the query and the body of a create call. Nothing is started or stored.

    Raises:
        ApiError: a field that cannot be used, named, with its value and the remedy (400); an unknown shape (404).
    """
    job_id = new_id(query, "rlorTrainerJobId", "trainer")
    fields = _fields(body)
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
        "max_context_length": fields.context_length(shape.max_context_length, context_length(model_dir)),
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


def _refuse_what_is_not_here(fields: Fields, query: Mapping[str, str]) -> None:
    for name, reason in _NOT_HERE.items():
        if fields.values.get(name):
            raise bad(name, fields.values[name], f"cannot be used: {reason}. Remove the field")
    if query.get("deploymentId"):
        raise bad(
            "deploymentId", query["deploymentId"], f"cannot be used: {_NOT_HERE['hotLoadDeploymentId']}. Remove it"
        )
    for name in ("nodeCount", "trainerReplicaCount"):
        if fields.whole(name, 1, least=0) > 1:
            raise bad(name, fields.values[name], "must be 1: an embedded trainer is one process on this machine")
    fields.text("displayName")


def _shape(query: Mapping[str, str], fields: Fields, *, lora_rank: int, forward_only: bool) -> Shape:
    """The shape that the request names, or the one that suits it."""
    name = query.get("trainingShape")
    if not name:
        return select_shape(lora_rank=lora_rank, forward_only=forward_only)
    shape = find_shape(name)
    for field in _SHAPE_OWNED:
        if fields.values.get(field):
            raise bad(
                field, fields.values[field], f"is decided by trainingShape {name}. Remove {field}, or trainingShape"
            )
    shape.check(lora_rank=lora_rank, forward_only=forward_only)
    return shape


def _fields(body: dict[str, Any]) -> Fields:
    """Body and trainingConfig of a request as one table."""
    config = body.get("trainingConfig")
    if not isinstance(config, dict):
        raise bad("trainingConfig", config, "must be an object with baseModel and loraRank")
    return Fields({**body, **config})
