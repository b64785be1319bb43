"""The catalogue of training and deployment shapes: what kind of worker a job gets, and what the shape decides of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer
from cookbook.backend.control_plane.context import ACCOUNT

__all__ = [
    "DEPLOYMENT_SHAPE",
    "SHAPES",
    "DeploymentShape",
    "Shape",
    "find_deployment_shape",
    "find_shape",
    "get_deployment_shape",
    "get_deployment_shape_version",
    "get_shape_version",
    "list_deployment_shape_versions",
    "list_shape_versions",
    "select_shape",
]

VERSION = "v1"
_PREFIX = f"accounts/{ACCOUNT}/trainingShapes/"
_DEPLOYMENT_PREFIX = f"accounts/{ACCOUNT}/deploymentShapes/"


@dataclass(frozen=True)
class DeploymentShape:
    """The one kind of deployment. `max_context_length` is in tokens."""

    shape_id: str
    max_context_length: int = 4096

    @property
    def name(self) -> str:
        return f"{_DEPLOYMENT_PREFIX}{self.shape_id}"

    @property
    def version_name(self) -> str:
        return f"{self.name}/versions/{VERSION}"

    def version_resource(self) -> dict[str, Any]:
        """The shape's only version, as the API describes it."""
        snapshot = {"acceleratorType": "CPU", "acceleratorCount": 1, "precision": "BF16", "nodeCount": 1}
        snapshot["maxContextLength"] = self.max_context_length
        return {"name": self.version_name, "latestValidated": True, "validated": True, "snapshot": snapshot}


DEPLOYMENT_SHAPE = DeploymentShape("cpu")


@dataclass(frozen=True)
class Shape:
    """One training shape. `mode` is the API's trainerMode; `max_context_length` is in tokens."""

    shape_id: str
    mode: str
    max_context_length: int = 4096

    @property
    def name(self) -> str:
        return f"{_PREFIX}{self.shape_id}"

    def version_resource(self) -> dict[str, Any]:
        """The shape's only version, as the API describes it."""
        return {
            "name": f"{self.name}/versions/{VERSION}",
            "latestValidated": True,
            "snapshot": {
                "trainerMode": self.mode,
                "trainerImageTag": "local",
                "maxSupportedContextLength": self.max_context_length,
                "nodeCount": 1,
                "acceleratorType": "CPU",
                "acceleratorCount": 1,
                "baseModelWeightPrecision": "BF16",
                "deploymentShapeVersion": DEPLOYMENT_SHAPE.version_name,
                "trainerShardingScheme": {"pipelineParallelism": 1},
            },
        }

    def check(self, *, lora_rank: int, forward_only: bool) -> None:
        """ApiError (400) when a job of this rank cannot run on this shape."""
        if self.mode == "POLICY_TRAINER" and lora_rank > 0:
            problem = f"trains all parameters, loraRank is {lora_rank}. Use {_PREFIX}cpu-lora, or loraRank 0."
        elif self.mode == "LORA_TRAINER" and lora_rank == 0 and not forward_only:
            problem = f"trains a LoRA adapter, loraRank is 0. Use {_PREFIX}cpu-full, or loraRank 1 or more."
        elif self.mode == "FORWARD_ONLY" and not forward_only:
            problem = f"cannot train. Set forwardOnly, or use {_PREFIX}cpu-lora or {_PREFIX}cpu-full."
        else:
            return
        raise ApiError(Code.INVALID_ARGUMENT, f"trainingShape {self.name} ({self.mode}) {problem}")


SHAPES = (
    Shape("cpu-lora", "LORA_TRAINER"),
    Shape("cpu-full", "POLICY_TRAINER"),
    Shape("cpu-forward", "FORWARD_ONLY"),
)


def find_shape(name: str) -> Shape:
    """The shape with a full resource name, with or without its version.

    Raises:
        ApiError: there is none (404).
    """
    for shape in SHAPES:
        if name in (shape.name, f"{shape.name}/versions/{VERSION}"):
            return shape
    known = ", ".join(shape.name for shape in SHAPES)
    raise ApiError(
        Code.NOT_FOUND, f"there is no training shape {name!r}. The embedded backend has {known} (version {VERSION})."
    )


def find_deployment_shape(name: str) -> DeploymentShape:
    """The deployment shape with a full resource name, with or without its version.

    Raises:
        ApiError: there is none (404).
    """
    if name in (DEPLOYMENT_SHAPE.name, DEPLOYMENT_SHAPE.version_name):
        return DEPLOYMENT_SHAPE
    raise ApiError(
        Code.NOT_FOUND,
        f"there is no deployment shape {name!r}. The embedded backend has {DEPLOYMENT_SHAPE.name} (version {VERSION}).",
    )


def select_shape(*, lora_rank: int, forward_only: bool) -> Shape:
    """The shape for a job that names none."""
    if forward_only:
        return SHAPES[2]
    return SHAPES[0] if lora_rank > 0 else SHAPES[1]


async def list_shape_versions(request: Request) -> Response:
    """GET trainingShapes/{shape}/versions, with or without filter=latest_validated=true: all shapes are validated."""
    _check_filter(request)
    shape = find_shape(_PREFIX + request.path_params["shape"])
    return JsonAnswer({"trainingShapeVersions": [shape.version_resource()], "nextPageToken": ""})


async def get_shape_version(request: Request) -> Response:
    """GET trainingShapes/{shape}/versions/{version}."""
    shape = find_shape("{prefix}{shape}/versions/{version}".format(prefix=_PREFIX, **request.path_params))
    return JsonAnswer(shape.version_resource())


async def get_deployment_shape(request: Request) -> Response:
    """GET deploymentShapes/{shape}."""
    shape = find_deployment_shape(_DEPLOYMENT_PREFIX + request.path_params["shape"])
    return JsonAnswer({"name": shape.name, "latestVersion": shape.version_name})


async def list_deployment_shape_versions(request: Request) -> Response:
    """GET deploymentShapes/{shape}/versions, with or without filter=latest_validated=true."""
    _check_filter(request)
    shape = find_deployment_shape(_DEPLOYMENT_PREFIX + request.path_params["shape"])
    return JsonAnswer({"deploymentShapeVersions": [shape.version_resource()], "nextPageToken": ""})


async def get_deployment_shape_version(request: Request) -> Response:
    """GET deploymentShapes/{shape}/versions/{version}."""
    shape = find_deployment_shape(
        "{prefix}{shape}/versions/{version}".format(prefix=_DEPLOYMENT_PREFIX, **request.path_params)
    )
    return JsonAnswer(shape.version_resource())


def _check_filter(request: Request) -> None:
    condition = request.query_params.get("filter", "")
    if condition.replace(" ", "") not in ("", "latest_validated=true"):
        raise ApiError(
            Code.INVALID_ARGUMENT, f"filter {condition!r} is not supported: leave it out, or use latest_validated=true."
        )
