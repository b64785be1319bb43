"""The deployment worker's process: from spec.json to a served port, and its orderly end."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cookbook.backend.deployment.app import DeploymentApp
from cookbook.backend.deployment.engine import Engine
from cookbook.backend.deployment.spec import DeploymentSpec, read_spec
from cookbook.backend.deployment.tokenizer import TextModel
from cookbook.backend.deployment.weights import HotLoader, base_weights
from cookbook.backend.serving import serve_until_the_end, start_logging, token_of
from cookbook.errors import BackendError, ModelError

__all__ = ["main"]


def main(job_dir: Path) -> None:
    """Serve one deployment until it is idle for too long or told to stop. Does not return: it ends the process.

    The model is read before worker.json is written, so a worker that has announced itself can answer.
    BackendError when it cannot be served: bad spec, bad extra argument, or a model that cannot be computed here.
    """
    start_logging()
    spec = read_spec(job_dir)
    token = token_of("deployment")
    _configure_torch(spec)
    try:
        text = TextModel(spec.base_dir)
        model = base_weights(spec)
    except ModelError as error:
        raise BackendError(str(error)) from error
    engine = Engine(
        lambda: model,
        "",
        max_batch=spec.max_batch,
        max_context=spec.max_context_length,
        max_waiting=spec.max_waiting,
    )
    app = DeploymentApp(spec, engine, HotLoader(spec, engine), text, token)

    def is_idle() -> bool:
        return not app.busy and time.monotonic() - app.last_active > spec.inactivity_timeout_s

    serve_until_the_end(app.asgi, job_dir, is_idle=is_idle, inactivity_timeout_s=spec.inactivity_timeout_s)


def _configure_torch(spec: DeploymentSpec) -> None:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
