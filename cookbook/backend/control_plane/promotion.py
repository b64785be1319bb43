"""Promotion: a sampler checkpoint becomes a named model. Operations are recorded, and run again after a kill.

Running one twice is harmless: the copy is made beside the model's folder and renamed, and a model that already came
from the same checkpoint is left as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer, json_object, rfc3339
from cookbook.backend.control_plane.checkpoints import checkpoint_name, manifests_of
from cookbook.backend.control_plane.context import ACCOUNT, Plane, plane_of
from cookbook.backend.control_plane.models import BASE_MODEL, PEFT_ADDON, model_resource, resolve_base_model
from cookbook.backend.control_plane.store import Operation, Store
from cookbook.backend.paths import BackendPaths, read_json, write_json
from cookbook.backend.snapshots import Manifest, SnapshotHold, load_manifest, snapshot_dir, verify
from cookbook.errors import CheckpointError

__all__ = ["Promotions", "get_operation", "promote_checkpoint"]

logger = logging.getLogger(__name__)

_ASYNC_GRACE_S = 5.0
"""How long an asynchronous promotion may take inside its POST. Clients poll an unfinished one every 10 s."""

_MODEL_ID = re.compile(rf"accounts/{ACCOUNT}/models/([a-z0-9-]{{1,63}})")
_JOB_NAME = re.compile(rf"accounts/{ACCOUNT}/rlorTrainerJobs/([a-z0-9-]+)")


class Promotions:
    """The promotions of one control plane: recorded, then carried out in threads."""

    def __init__(self, paths: BackendPaths, store: Store) -> None:
        self._paths = paths
        self._store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def begin(self, job_id: str, checkpoint: str, output_model: str) -> Operation:
        """Start promoting, or find the same promotion under way.

        Raises:
            ApiError: the output model exists, or is being made, out of something else (409).
        """
        source = checkpoint_name(job_id, checkpoint)
        for operation in self._store.unfinished_operations():
            if operation.output_model == output_model and operation.operation_id in self._tasks:
                if checkpoint_name(operation.job_id, operation.checkpoint) != source:
                    raise _taken(output_model, f"is being made out of checkpoint {operation.checkpoint}")
                return operation
        folder = self._paths.models / output_model
        if folder.exists() and _source_of(folder) != source:
            raise _taken(output_model, f"exists already, made from {_source_of(folder) or 'something else'}")
        operation = Operation(secrets.token_hex(8), job_id, checkpoint, output_model, created=time.time())
        self._store.add_operation(operation)
        self._start(operation)
        return operation

    async def settled(self, operation: Operation, timeout_s: float | None) -> Operation:
        """The operation once it is done, or as it is after `timeout_s` (None = however long it takes)."""
        if (task := self._tasks.get(operation.operation_id)) is not None:
            await asyncio.wait([task], timeout=timeout_s)
        return self._store.operation(operation.operation_id) or operation

    def restart_unfinished(self) -> None:
        """Carry out the operations that an earlier control plane left behind."""
        for operation in self._store.unfinished_operations():
            logger.info("promotion %s: running it again", operation.operation_id)
            self._start(operation)

    def _start(self, operation: Operation) -> None:
        task = asyncio.create_task(self._carry_out(operation))
        self._tasks[operation.operation_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(operation.operation_id))

    async def _carry_out(self, operation: Operation) -> None:
        try:
            await asyncio.to_thread(_install, self._paths, operation)
        except CheckpointError as error:
            self._fail(operation, Code.FAILED_PRECONDITION, str(error))
        except FileExistsError:
            self._fail(operation, Code.ALREADY_EXISTS, "the model exists already. Choose another output model.")
        except OSError as error:
            where = error.filename or self._paths.models
            self._fail(operation, Code.FAILED_PRECONDITION, f"cannot write {where}: {error.strerror or error}.")
        except Exception as error:
            logger.exception("promotion %s", operation.operation_id)
            self._fail(operation, Code.INTERNAL, f"{type(error).__name__}: {error}")
        else:
            logger.info("promotion %s: model %s is ready", operation.operation_id, operation.output_model)
            self._store.finish_operation(operation)

    def _fail(self, operation: Operation, code: Code, message: str) -> None:
        message = f"checkpoint {operation.checkpoint} could not be promoted to {operation.output_model}: {message}"
        logger.error("promotion %s: %s", operation.operation_id, message)
        self._store.finish_operation(operation, code=code.grpc, error=message)


def _install(paths: BackendPaths, operation: Operation) -> None:
    """Copy a snapshot to a model's folder, unless it is there already; blocking.

    Raises:
        CheckpointError: the snapshot is damaged or gone.
        FileExistsError: the model exists, made from something else.
        OSError: no space, no permission.
    """
    source = checkpoint_name(operation.job_id, operation.checkpoint)
    target = paths.models / operation.output_model
    if target.exists():
        if _source_of(target) != source:
            raise FileExistsError(target)
        return
    snapshot = snapshot_dir(paths.checkpoints, operation.job_id, "sampler", operation.checkpoint)
    with SnapshotHold(snapshot):
        _copy_snapshot(paths, operation, snapshot, target)


def _copy_snapshot(paths: BackendPaths, operation: Operation, snapshot: Path, target: Path) -> None:
    manifest = load_manifest(snapshot)
    verify(snapshot, manifest)
    copy = paths.models / f".promote-{operation.operation_id}"
    shutil.rmtree(copy, ignore_errors=True)  # half of it may be there from before a kill
    try:
        for name in manifest.files:
            _copy_file(snapshot / name, copy / name)
        record = {
            "source": checkpoint_name(operation.job_id, operation.checkpoint),
            "kind": _kind(manifest),
            "base_model": manifest.base_model,
            "created": rfc3339(time.time()),
        }
        write_json(copy / "model.json", record)
        copy.rename(target)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _kind(manifest: Manifest) -> str:
    return PEFT_ADDON if manifest.lora_rank > 0 and manifest.checkpoint_type != "merged_base" else BASE_MODEL


def _source_of(folder: Path) -> object:
    return (read_json(folder / "model.json") or {}).get("source")


def _taken(output_model: str, how: str) -> ApiError:
    return ApiError(
        Code.ALREADY_EXISTS,
        f"output_model accounts/{ACCOUNT}/models/{output_model} {how}. Choose another output model.",
    )


async def promote_checkpoint(request: Request) -> Response:
    """POST checkpoints/{checkpoint}:promote: the model once it is made, or the operation with async_promotion."""
    plane = plane_of(request)
    checkpoint = request.path_params["checkpoint"]
    body = await json_object(request)
    job_id = _named(body, "trainer_job_id", _JOB_NAME, f"accounts/{ACCOUNT}/rlorTrainerJobs/<job>")
    output_model = _named(body, "output_model", _MODEL_ID, f"accounts/{ACCOUNT}/models/<1 to 63 of a-z, 0-9, '-'>")
    manifest = _promotable(await manifests_of(plane, job_id), job_id, checkpoint)
    _check_base_model(plane, body.get("base_model"), manifest)
    asynchronous = bool(body.get("async_promotion"))
    operation = plane.promotions.begin(job_id, checkpoint, output_model)
    operation = await plane.promotions.settled(operation, _ASYNC_GRACE_S if asynchronous else None)
    if asynchronous:
        return JsonAnswer({"operation": _resource(plane, operation)})
    if operation.code:
        raise ApiError(Code.of_grpc(operation.code), operation.error)
    return JsonAnswer({"model": _model(plane, output_model)})


async def get_operation(request: Request) -> Response:
    """GET operations/{operation}."""
    plane = plane_of(request)
    operation = plane.store.operation(request.path_params["operation"])
    if operation is None:
        raise ApiError(Code.NOT_FOUND, f"there is no operation {request.path_params['operation']!r}.")
    return JsonAnswer(_resource(plane, operation))


def _named(body: dict[str, Any], field: str, pattern: re.Pattern[str], form: str) -> str:
    value = body.get(field)
    matched = pattern.fullmatch(value) if isinstance(value, str) else None
    if matched is None:
        raise ApiError(Code.INVALID_ARGUMENT, f"{field} {value!r} is not of the form {form}.")
    return matched.group(1)


def _promotable(manifests: list[Manifest], job_id: str, checkpoint: str) -> Manifest:
    """The sampler checkpoint of that name, if it can become a model."""
    same_name = [manifest for manifest in manifests if manifest.name == checkpoint]
    samplers = [manifest for manifest in same_name if manifest.kind == "sampler"]
    if not same_name:
        promotable = [manifest.name for manifest in manifests if manifest.promotable]
        raise ApiError(
            Code.NOT_FOUND,
            f"trainer job {job_id} has no checkpoint {checkpoint!r}. Its promotable ones are {promotable}.",
        )
    if not samplers:
        problem = "is a training state. Save one with save_weights_for_sampler_ext, and promote that"
    elif not samplers[0].promotable:
        problem = f"is a {samplers[0].checkpoint_type} and not promotable. Save one with checkpoint_type base"
    else:
        return samplers[0]
    raise ApiError(Code.FAILED_PRECONDITION, f"checkpoint {checkpoint} of trainer job {job_id} {problem}.")


def _check_base_model(plane: Plane, base_model: object, manifest: Manifest) -> None:
    """ApiError (400) unless `base_model` is what the checkpoint was trained from, under whichever of its names."""
    if base_model == manifest.base_model:
        return
    models_dir = plane.paths.models
    if base_model is not None:
        given = resolve_base_model(models_dir, base_model)
        with contextlib.suppress(ApiError):  # what it was trained from may be gone; its name alone counts then
            if given == resolve_base_model(models_dir, manifest.base_model):
                return
    raise ApiError(
        Code.INVALID_ARGUMENT,
        f"base_model {base_model!r} is not what checkpoint {manifest.name} was trained from. "
        f"Pass {manifest.base_model!r}.",
    )


def _resource(plane: Plane, operation: Operation) -> dict[str, Any]:
    """An operation as the API describes it; done with either `response` (the model) or `error`."""
    resource: dict[str, Any] = {
        "name": f"accounts/{ACCOUNT}/operations/{operation.operation_id}",
        "done": operation.done,
        "metadata": {
            "checkpoint": checkpoint_name(operation.job_id, operation.checkpoint),
            "createTime": rfc3339(operation.created),
        },
    }
    if operation.code:
        resource["error"] = {"code": operation.code, "message": operation.error, "details": []}
    elif operation.done:
        resource["response"] = _model(plane, operation.output_model)
    return resource


def _model(plane: Plane, output_model: str) -> dict[str, Any]:
    """A model that was made: its resource, or only its name when its folder was removed since."""
    return model_resource(plane.paths.models, output_model) or {"name": f"accounts/{ACCOUNT}/models/{output_model}"}
