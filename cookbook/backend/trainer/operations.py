"""What each operation of the wire protocol does to a model. Runs on the compute thread; requests come parsed as JSON.

A failed operation leaves weights, moments and accumulated gradients as they were, except that a step refused for a
gradient that is not finite drops that gradient.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import orjson

from cookbook.backend.snapshots import (
    SnapshotHold,
    SnapshotKind,
    list_manifests,
    load_manifest,
    snapshot_dir,
    verify,
    write_snapshot,
)
from cookbook.backend.trainer import compute, lora
from cookbook.backend.trainer.engine import Deferred, Operation
from cookbook.backend.trainer.models import Accumulated, Model, ModelStore
from cookbook.backend.trainer.optimizer import Optimizer
from cookbook.backend.trainer.saves import StateSaves
from cookbook.backend.trainer.state import read_state
from cookbook.backend.trainer.wire import (
    Parsed,
    forward_answer,
    parse_forward,
    parse_optim,
    require,
)
from cookbook.errors import DOES_NOT_FIT, CheckpointError, RequestRejected

__all__ = ["Operations"]

_CROSS_JOB = "cross_job://"
_LOCAL_MODELS = "accounts/local/models/"
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CHECKPOINT_TYPES = ("base", "delta", "merged_base")
_COMPUTES = ("forward", "forward_backward", "optim_step")
_EXPORT_PRECISIONS = (None, "source", "bf16")


class Operations:
    """The handlers, by the kind of operation."""

    def __init__(
        self,
        store: ModelStore,
        turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        saves: StateSaves | None = None,
    ) -> None:
        """
        Args:
            turn: entered around what computes on all cores: `CoreTurns.turn`.
            saves: of this worker; None = of these operations alone.
        """
        self._store = store
        self._saves = saves or StateSaves()
        self._turn = turn
        self._spec = store.spec
        self._handlers: dict[str, Callable[[Model, Parsed], Parsed | Deferred]] = {
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "load_weights": self._load_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "load_adapter": self._load_adapter,
        }

    def execute(self, operation: Operation) -> Parsed | Deferred:
        """Run one operation and return its result, the JSON object of the wire protocol, or what gives it."""
        model_id = operation.model_id
        if operation.kind == "create_model":
            self._store.create(model_id, orjson.loads(operation.body))
            return {"model_id": model_id, "type": "create_model", "supports_router_replay": False}
        if operation.kind == "unload_model":
            self._store.remove(model_id)
            self._saves.free_memory()
            return {"model_id": model_id, "type": "unload_model"}
        model = self._store.use(model_id)
        if operation.kind not in ("forward", "forward_backward"):
            model.keeper.drop()
        with self._turn() if operation.kind in _COMPUTES else contextlib.nullcontext():
            return self._handlers[operation.kind](model, orjson.loads(operation.body))

    def _forward(self, model: Model, body: Parsed) -> Parsed:
        request = parse_forward(body, self._store.sizes(model), is_backward=False)
        forward = compute.forward if model.optimizer is None else model.keeper.forward
        result = forward(model.decoder, request.data, request.kernel, request.config)
        top_k = compute.top_k(model.decoder, request.data, request.top_k) if request.top_k else None
        return forward_answer(result, top_k)

    def _forward_backward(self, model: Model, body: Parsed) -> Parsed:
        _require_optimizer(model, "forward_backward")
        request = parse_forward(body, self._store.sizes(model), is_backward=True)
        kept = model.keeper.take(request.data)
        before = model.take_gradients()
        try:
            result = compute.forward_backward(model.decoder, request.data, request.kernel, request.config, kept)
            model.add_gradients(before)
        except BaseException:
            model.put_gradients(before)
            raise
        sums = model.accumulated
        model.accumulated = Accumulated(
            sums.num_requests + 1,
            sums.num_loss_tokens + result.num_loss_tokens,
            sums.num_sequences + result.num_sequences,
        )
        return forward_answer(result, None)

    def _optim_step(self, model: Model, body: Parsed) -> Parsed:
        optimizer = _require_optimizer(model, "optim_step")
        request = parse_optim(body)
        sums = model.accumulated
        if sums.num_requests == 0:
            raise RequestRejected("optim_step without a gradient: send forward_backward before it.")
        divisors = {"none": 1, "num_loss_tokens": sums.num_loss_tokens, "num_sequences": sums.num_sequences}
        try:
            result = optimizer.step(request.adam, float(max(1, divisors[request.normalization])))
        except RequestRejected:
            model.drop_gradients()
            raise
        model.accumulated = Accumulated()
        metrics = {
            "grad_norm": result.grad_norm,
            "grad_norm_rms": result.grad_norm / math.sqrt(result.num_weights),
            "grad_norm_post_clip": result.grad_norm_post_clip,
            "lr": request.adam.learning_rate,
            "num_loss_tokens": float(sums.num_loss_tokens),
            "num_sequences": float(sums.num_sequences),
        }
        return {"metrics": metrics}

    def _save_weights(self, model: Model, body: Parsed) -> Parsed | Deferred:
        _require_own_weights(model, "save_weights")
        name = require(body, "path", str)
        if not _DNS_LABEL.fullmatch(name):
            raise RequestRejected(
                f"checkpoint name {name!r} cannot be used: clients load names of lower-case letters, digits and inner "
                "hyphens only, at most 63. Rename it."
            )
        manifest = self._store.manifest(model, "state", name, None)
        write = self._saves.begin(self._folder("state", name), manifest, model.state())
        answer = {"path": name, "type": "save_weights"}
        if write is None:
            return answer

        def finish() -> Parsed:
            write()
            return answer

        return Deferred(finish)

    def _save_weights_for_sampler(self, model: Model, body: Parsed) -> Parsed:
        _require_own_weights(model, "save_weights_for_sampler")
        name = require(body, "path", str)
        kind = body.get("checkpoint_type") or "base"
        if kind not in _CHECKPOINT_TYPES:
            raise RequestRejected(f"checkpoint_type must be one of {', '.join(_CHECKPOINT_TYPES)}, got {kind!r}.")
        if body.get("export_precision") not in _EXPORT_PRECISIONS:
            raise RequestRejected(f"export_precision must be source or bf16, got {body['export_precision']!r}.")
        if kind == "merged_base" and model.lora is None:
            raise RequestRejected(
                "checkpoint_type merged_base is for LoRA models; this one is full-parameter: use base."
            )
        if kind == "delta" and not self._has_sampler_snapshot():
            raise RequestRejected(
                f"checkpoint_type delta needs an earlier sampler snapshot, and job {self._spec.job_id} has none. "
                "Save a base first."
            )
        is_merged = kind == "merged_base"
        write_snapshot(
            self._folder("sampler", name),
            self._store.manifest(model, "sampler", name, kind),
            lambda folder: self._store.write_sampler(folder, model, merged=is_merged),
        )
        return {"path": name, "type": "save_weights_for_sampler"}

    def _load_weights(self, model: Model, body: Parsed) -> Parsed:
        _require_own_weights(model, "load_weights")
        path = require(body, "path", str)
        with_optimizer = body.get("optimizer") is True and model.optimizer is not None
        folder = self._resolve(path)
        self._saves.wait(folder)
        try:
            with SnapshotHold(folder):
                return self._load_from(model, path, folder, with_optimizer)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path!r} cannot be read: {error}. Use an older checkpoint.") from error

    def _load_from(self, model: Model, path: str, folder: Path, with_optimizer: bool) -> Parsed:
        manifest = load_manifest(folder)
        if (manifest.kind, manifest.lora_rank) != ("state", model.lora_rank):
            raise CheckpointError(
                f"checkpoint {path!r} {DOES_NOT_FIT}: it is a {manifest.kind} checkpoint of lora_rank "
                f"{manifest.lora_rank}, this model wants state of lora_rank {model.lora_rank}. Name another one, or "
                "create the model with that rank."
            )
        if model.lora is not None and manifest.base_model != self._spec.base_model:
            raise CheckpointError(
                f"checkpoint {path!r} {DOES_NOT_FIT}: it is a LoRA adapter of {manifest.base_model}, this model's base "
                f"is {self._spec.base_model}. Use the same base_model."
            )
        verify(folder, manifest)
        shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
        state = read_state(folder, shapes, with_moments=with_optimizer and manifest.step > 0)
        model.set_weights(state.weights)
        model.drop_gradients()  # they were taken at the weights that are gone
        if model.optimizer is not None:
            model.optimizer.restore(manifest.step if with_optimizer else 0, state.moments)
        return {"path": path, "type": "load_weights"}

    def _load_adapter(self, model: Model, body: Parsed) -> Parsed:
        path = require(body, "adapter_path", str)
        if model.lora is None:
            raise RequestRejected("load_adapter is for LoRA models; this one has no adapter. Use load_weights.")
        is_local = path.startswith(_LOCAL_MODELS)
        folder = self._spec.models_dir / path.removeprefix(_LOCAL_MODELS) if is_local else Path(path)
        if not folder.is_absolute() or ".." in folder.parts:
            raise RequestRejected(
                f"adapter_path must be {_LOCAL_MODELS}<id> or an absolute folder of this machine, got {path!r}."
            )
        model.set_weights(lora.read_adapter(folder, model.lora, model.parameters))
        model.drop_gradients()
        if model.optimizer is not None:
            model.optimizer.restore(0, {})
        return {"model_id": model.model_id, "adapter_path": path, "type": "load_adapter"}

    def _resolve(self, path: str) -> Path:
        if not path.startswith(_CROSS_JOB):
            return self._folder("state", path)
        job_id, _, name = path.removeprefix(_CROSS_JOB).partition("/")
        return snapshot_dir(self._spec.checkpoints_dir, job_id, "state", name)

    def _folder(self, kind: SnapshotKind, name: str) -> Path:
        return snapshot_dir(self._spec.checkpoints_dir, self._spec.job_id, kind, name)

    def _has_sampler_snapshot(self) -> bool:
        manifests = list_manifests(self._spec.checkpoints_dir, self._spec.job_id)
        return any(manifest.kind == "sampler" for manifest in manifests)


def _require_optimizer(model: Model, what: str) -> Optimizer:
    if model.optimizer is None:
        raise RequestRejected(
            f"{what} on a model that is only for forward (a base_only reference, or any model of a forward-only job). "
            "Send it to a trained model."
        )
    return model.optimizer


def _require_own_weights(model: Model, what: str) -> None:
    if not model.parameters:
        raise RequestRejected(f"{what} on a base_only reference, whose weights are those of the base model for ever.")
