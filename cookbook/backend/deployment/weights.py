"""The weights that a deployment serves: its base model, and the snapshots of a trainer job loaded over it.

A snapshot is verified and read while the old weights still serve; only the exchange stops the sampling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cookbook.backend.deployment.engine import Engine
from cookbook.backend.deployment.llama import LlamaModel
from cookbook.backend.deployment.spec import DeploymentSpec
from cookbook.backend.snapshots import Manifest, SnapshotHold, load_manifest, snapshot_dir, verify
from cookbook.errors import CheckpointError, ModelError

__all__ = ["HotLoader", "base_weights"]

logger = logging.getLogger(__name__)

POST_HOLD_S = 40.0
"""How long a load may take inside its POST, which clients give 60 s; then they ask for its state."""

DRAIN_TIMEOUT_S = 600.0
"""How long a load waits for the completions in flight. As long as clients wait for a load."""

_Make = Callable[[LlamaModel], LlamaModel]


def base_weights(spec: DeploymentSpec) -> LlamaModel:
    """The deployment's base model. ModelError when it cannot be served."""
    model = LlamaModel.load(spec.base_dir, spec.compute_dtype)
    return model if spec.base_dir == spec.model_dir else model.with_adapter(spec.model_dir)


@dataclass(frozen=True)
class _State:
    """What the last load came to. `target` and `error` as in the status that clients read."""

    stage: Literal["idle", "loading", "done", "error"] = "idle"
    target: str | None = None
    error: str | None = None


class HotLoader:
    """Loads snapshots into the engine, one after another. Lives on the event loop; works in threads."""

    def __init__(self, spec: DeploymentSpec, engine: Engine) -> None:
        self._spec = spec
        self._engine = engine
        self._state = _State()
        self._serving: tuple[str | None, str] | None = None
        self._wanted: tuple[str | None, str] | None = None
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._holds_base = True
        self._hold: SnapshotHold | None = None
        """On the snapshot that is served: it is not deleted meanwhile."""

    @property
    def loading(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def target(self) -> str | None:
        """The snapshot that is being loaded, or could not be."""
        return self._state.target

    async def settled(self, timeout_s: float) -> bool:
        """Whether, at once or within `timeout_s`, no weights are being exchanged."""
        if self._open.is_set():
            return True
        try:
            await asyncio.wait_for(self._open.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def load(self, identity: str, job: str | None, *, reset_prompt_cache: bool) -> None:
        """Serve a snapshot of a trainer job. Returns when it is served, or has failed, or takes too long to wait for.

        What came of it is in `status`. A load that is asked for again while it runs, or after it, is not done twice.
        """
        wanted = (job, identity)
        if not self.loading and self._serving == wanted:
            self._state = _State("done")
            if reset_prompt_cache:
                await asyncio.to_thread(self._engine.reset_prefix_cache)
            return
        if not self.loading or self._wanted != wanted:
            self._wanted = wanted
            self._task = asyncio.create_task(self._carry_out(identity, job))
        assert self._task is not None
        # Not wait_for: the client that gives up must not end the load.
        await asyncio.wait([self._task], timeout=POST_HOLD_S)

    def status(self) -> dict[str, Any]:
        """The hot load status of the training API. `error` says why the load of the target failed."""
        state = self._state
        version = self._engine.version
        return {
            "replicas": [
                {
                    "current_snapshot_identity": version,
                    "readiness": state.stage != "loading",
                    "loading_state": {
                        "stage": state.stage,
                        "target_snapshot_identity": state.target,
                        "error": state.error,
                    },
                    "loaded_adapters": [],
                }
            ]
        }

    async def _carry_out(self, identity: str, job: str | None) -> None:
        async with self._one_at_a_time:
            self._state = _State("loading", identity)
            hold: SnapshotHold | None = None
            try:
                folder = self._folder(identity, job)
                hold = await asyncio.to_thread(SnapshotHold, folder)
                make, keeps_base = await asyncio.to_thread(self._prepare, folder)
                self._open.clear()
                await asyncio.to_thread(self._engine.load, identity, make, DRAIN_TIMEOUT_S)
            except Exception as error:
                expected = isinstance(error, CheckpointError | ModelError | TimeoutError)
                logger.error("snapshot %s cannot be loaded: %s", identity, error, exc_info=not expected)
                self._state = _State("error", identity, str(error) if expected else repr(error))
            else:
                logger.info("serves snapshot %s of trainer job %s", identity, job)
                self._holds_base = keeps_base
                self._serving = (job, identity)
                self._state = _State("done")
                self._hold, hold = hold, self._hold
            finally:
                self._open.set()
                if hold is not None:
                    hold.close()

    def _folder(self, identity: str, job: str | None) -> Path:
        """Where a snapshot lies. CheckpointError without a trainer job, or when the name cannot be one."""
        if job is None:
            raise CheckpointError(
                f"snapshot {identity!r} cannot be found: the deployment is linked to no trainer job. "
                "Set its hotLoadTrainerJob."
            )
        return snapshot_dir(self._spec.checkpoints_dir, job, "sampler", identity)

    def _prepare(self, folder: Path) -> tuple[_Make, bool]:
        """How to make the new model out of the present one, and whether that leaves the base weights in it.

        Raises:
            CheckpointError: the snapshot is missing, damaged, or of another model.
            ModelError: its weights cannot be served.
        """
        manifest = load_manifest(folder)
        if manifest.base_model != self._spec.base_model:
            raise CheckpointError(
                f"snapshot {folder.name!r} of trainer job {manifest.job_id} is of {manifest.base_model}, this "
                f"deployment serves {self._spec.base_model}. Deploy that model, "
                "or link the deployment to a trainer of its own."
            )
        verify(folder, manifest)
        if not _is_adapter(manifest):
            model = LlamaModel.load(folder, self._spec.compute_dtype)
            return (lambda _: model), False
        if self._holds_base:
            return (lambda present: present.with_adapter(folder)), True
        model = LlamaModel.load(self._spec.base_dir, self._spec.compute_dtype).with_adapter(folder)
        return (lambda _: model), True


def _is_adapter(manifest: Manifest) -> bool:
    return manifest.lora_rank > 0 and manifest.checkpoint_type != "merged_base"
