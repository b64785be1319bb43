"""Reading requests to create or change a deployment: every field checked, and what its worker is started with.

Fields that only place a deployment on a cloud (region, accelerators on the manual path, bucket type, preemptible) are
accepted and have no effect here. Fields that would change what is computed are refused when they cannot be honoured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from cookbook.backend.control_plane.context import ACCOUNT
from cookbook.backend.control_plane.fields import Fields, bad, new_id
from cookbook.backend.control_plane.models import ADAPTED_MODEL, adapted_folder, context_length, resolve_base_model
from cookbook.backend.control_plane.shapes import DEPLOYMENT_SHAPE, find_deployment_shape
from cookbook.backend.control_plane.store import Job, JobState, Kind
from cookbook.backend.paths import BackendPaths

__all__ = [
    "DEFAULT_IDLE_S",
    "MAX_IDLE_S",
    "deployment_name",
    "names_replicas",
    "read_deployment_request",
    "read_deployment_update",
    "scaled_to_zero",
    "trainer_job_id",
]

DEFAULT_IDLE_S = 3 * 3600.0
"""A deployment without requests ends after this long. Long, because nobody asks it anything while a trainer trains."""

MAX_IDLE_S = 7 * 24 * 3600.0

_TRAINER_JOB = re.compile(rf"accounts/{ACCOUNT}/rlorTrainerJobs/([a-z0-9-]+)")
_SHAPE_OWNED = ("maxContextLength", "acceleratorType", "acceleratorCount", "precision", "worldSize", "ngpus")
_TRANSITION = "SYNC"  # sequences in flight end on the weights they began with
_UNSPECIFIED = ("", "UNSPECIFIED", "HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED", _TRANSITION)
_REPLICAS = ("minReplicaCount", "maxReplicaCount")
_MUTABLE = (
    *_REPLICAS,
    *("hotLoadTrainerJob", "hotLoadTransitionType", "enableHotLoad", "displayName", "description", "annotations"),
)
_DEFAULTS = {"minReplicaCount": 0, "maxReplicaCount": 1, "enableHotLoad": True, "hotLoadTransitionType": _TRANSITION}


def read_deployment_request(paths: BackendPaths, query: Mapping[str, str], body: dict[str, Any]) -> Job:
    """A new deployment, CREATING or scaled to zero, out of the query and the body of a create call. Nothing is started.

    Raises:
        ApiError: a field that cannot be used, named, with its value and the remedy (400); an unknown shape (404).
    """
    deployment_id = new_id(query, "deploymentId", "deployment")
    request = _checked(_DEFAULTS | body)
    fields = Fields(request)
    extra_values = fields.table("extraValues")
    if set(extra_values) - {ADAPTED_MODEL}:
        what = f"cannot be used but for {ADAPTED_MODEL}: pass options in extraArgs. Remove the others"
        raise bad("extraValues", extra_values, what)
    _check_shape(fields)
    base_model = fields.values.get("baseModel")
    model_dir = resolve_base_model(paths.models, base_model, adapters=True)
    base_dir = adapted_folder(model_dir, extra_values.get(ADAPTED_MODEL))
    now = time.time()
    spec = {
        "deployment_id": deployment_id,
        "account": ACCOUNT,
        "base_model": base_model,
        "model_dir": str(model_dir),
        "base_dir": str(base_dir),
        "max_context_length": fields.context_length(DEPLOYMENT_SHAPE.max_context_length, context_length(base_dir)),
        "inactivity_timeout_s": _idle_s(fields),
        "checkpoints_dir": str(paths.checkpoints),
        "hot_load_trainer_job": request.get("hotLoadTrainerJob"),
        "extra_args": fields.texts("extraArgs"),
    }
    return Job(
        job_id=deployment_id,
        state=JobState.CANCELLED if request["maxReplicaCount"] == 0 else JobState.CREATING,
        status_message="created with maxReplicaCount 0" if request["maxReplicaCount"] == 0 else "",
        created=now,
        updated=now,
        shape=DEPLOYMENT_SHAPE.version_name,
        request=request,
        spec=spec,
        kind=Kind.DEPLOYMENT,
    )


def read_deployment_update(job: Job, query: Mapping[str, str], body: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The request of a deployment after an update, and the fields (as in its JSON) that the update names.

    `updateMask` lists the fields to change, in snake_case or camelCase; one that the body lacks goes back to its
    default. Without a mask, the fields of the body are changed and no others.

    Raises:
        ApiError: a field that cannot be changed, or cannot have this value (400).
    """
    mask = query.get("updateMask", "")
    named = {_camel(path.strip()) for path in mask.split(",") if path.strip()} or set(body)
    for name in sorted(named):
        if name not in _MUTABLE:
            raise bad(name, body.get(name), f"cannot be changed; {', '.join(_MUTABLE)} can. Create another deployment")
    kept = {name: value for name, value in job.request.items() if name not in named}
    changes = {name: body[name] for name in named if name in body}
    return _checked(_DEFAULTS | kept | changes), named


def names_replicas(named: set[str]) -> bool:
    """Whether an update that names these fields scales a deployment."""
    return not named.isdisjoint(_REPLICAS)


def scaled_to_zero(job: Job) -> bool:
    """Whether a deployment is to have no worker."""
    return bool(job.request["maxReplicaCount"] == 0)


def deployment_name(deployment_id: str) -> str:
    """The resource name of a deployment, under which completions ask for it too."""
    return f"accounts/{ACCOUNT}/deployments/{deployment_id}"


def trainer_job_id(job: Job) -> str | None:
    """The id of the trainer job whose snapshots a deployment loads."""
    linked = job.request.get("hotLoadTrainerJob")
    return str(linked).rpartition("/")[2] if linked else None


def _checked(request: dict[str, Any]) -> dict[str, Any]:
    """The request itself, its fields that an update may change checked and brought to one form."""
    fields = Fields(request)
    for name in ("displayName", "description"):
        fields.text(name)
    fields.table("annotations")
    fields.flag("enableHotLoad")
    least, most = (fields.whole(name, 0, least=0) for name in _REPLICAS)
    if least > 1:
        raise bad("minReplicaCount", least, "must be 0 or 1: an embedded deployment is one process on this machine")
    if least > most:
        raise bad("minReplicaCount", least, f"is more than maxReplicaCount {most}")
    transition = fields.text("hotLoadTransitionType").upper()
    if transition not in _UNSPECIFIED:
        raise bad(
            "hotLoadTransitionType",
            request["hotLoadTransitionType"],
            f"cannot be used: a completion is never finished on other weights than it began with. Use {_TRANSITION}",
        )
    trainer_job = request.get("hotLoadTrainerJob") or None
    if trainer_job is not None and not (isinstance(trainer_job, str) and _TRAINER_JOB.fullmatch(trainer_job)):
        raise bad("hotLoadTrainerJob", trainer_job, f"is not of the form accounts/{ACCOUNT}/rlorTrainerJobs/<job>")
    return {**request, "hotLoadTransitionType": _TRANSITION, "hotLoadTrainerJob": trainer_job}


def _check_shape(fields: Fields) -> None:
    """ApiError when the request names an unknown shape, or a field that its shape decides."""
    name = fields.text("deploymentShape")
    if not name:
        return
    find_deployment_shape(name)
    for field in _SHAPE_OWNED:
        if fields.values.get(field):
            raise bad(
                field, fields.values[field], f"is decided by deploymentShape {name}. Remove {field}, or deploymentShape"
            )


def _idle_s(fields: Fields) -> float:
    policy = fields.values.get("autoscalingPolicy") or {}
    if not isinstance(policy, dict):
        raise bad("autoscalingPolicy", policy, "must be an object such as {'scaleToZeroWindow': '3600s'}")
    return Fields(policy).duration_s("scaleToZeroWindow", DEFAULT_IDLE_S, at_most=MAX_IDLE_S)


def _camel(path: str) -> str:
    first, *rest = path.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)
