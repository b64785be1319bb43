"""The trainer worker's process: from spec.json to a served port, and its orderly end."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from cookbook.backend.core_turns import CoreTurns
from cookbook.backend.decoder import read_config
from cookbook.backend.serving import serve_until_the_end, start_logging, token_of
from cookbook.backend.snapshots import remove_leftovers
from cookbook.backend.trainer.app import TrainerApp
from cookbook.backend.trainer.engine import Engine
from cookbook.backend.trainer.futures import FutureStore
from cookbook.backend.trainer.job import JobSpec, read_spec
from cookbook.backend.trainer.models import ModelStore
from cookbook.backend.trainer.operations import Operations
from cookbook.backend.trainer.saves import StateSaves
from cookbook.errors import BackendError, ModelError

__all__ = ["main"]

_SAVE_GRACE_S = 6.0
_ABANDON_GRACE_S = 1.0


def main(job_dir: Path) -> None:
    """Serve one trainer job until it is idle for too long or told to stop. Does not return: it ends the process.

    BackendError when the job cannot be served: bad spec, bad extra argument, or a model that cannot be trained here.
    """
    start_logging()
    spec = read_spec(job_dir)
    token = token_of("trainer")
    try:
        architecture = str(read_config(spec.model_dir).model_type)
    except ModelError as error:
        raise BackendError(str(error)) from error
    _configure_torch(spec)
    disable_progress_bar()  # its carriage returns have no place in a log
    remove_leftovers(spec.checkpoints_dir, spec.job_id)
    turns = CoreTurns(spec.checkpoints_dir.parent, threads=torch.get_num_threads())
    saves = StateSaves()
    engine = Engine(Operations(ModelStore(spec), turns.turn, saves).execute, FutureStore(job_dir / "results"))
    app = TrainerApp(spec, engine, token, architecture=architecture, being_written=saves.being_written)

    def is_idle() -> bool:
        app.close_silent_sessions()
        return time.monotonic() - app.last_active > spec.inactivity_timeout_s and not engine.has_deferred

    def end_saves() -> None:
        """A save that is under way is finished, or leaves nothing behind."""
        if not engine.stop(_SAVE_GRACE_S):
            saves.abandon()
            engine.stop(_ABANDON_GRACE_S)

    serve_until_the_end(
        app.asgi,
        job_dir,
        is_idle=is_idle,
        inactivity_timeout_s=spec.inactivity_timeout_s,
        before_exit=end_saves,
    )


def _configure_torch(spec: JobSpec) -> None:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    if spec.compute_dtype == "bfloat16":
        # Float32 products (the head) may then round their inputs to bfloat16 where that is faster; sums stay float32.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
