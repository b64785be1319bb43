"""The deployment worker's process: from spec.json to a served port, and its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path

import torch
import uvicorn

from cookbook.backend.deployment.app import DeploymentApp
from cookbook.backend.deployment.engine import Engine
from cookbook.backend.deployment.spec import DeploymentSpec, read_spec
from cookbook.backend.deployment.tokenizer import TextModel
from cookbook.backend.deployment.weights import HotLoader, base_folder, base_weights
from cookbook.backend.paths import write_json
from cookbook.errors import BackendError, ModelError

__all__ = ["TOKEN_VARIABLE", "main"]

TOKEN_VARIABLE = "COOKBOOK_BACKEND_TOKEN"
_WATCH_INTERVAL_S = 1.0
_SHUTDOWN_GRACE_S = 2


def main(job_dir: Path) -> None:
    """Serve one deployment until it is idle for too long or told to stop. Does not return: it ends the process.

    The model is read before worker.json is written, so a worker that has announced itself can answer.
    BackendError when it cannot be served: bad spec, bad extra argument, or a model that cannot be computed here.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    spec = read_spec(job_dir)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise BackendError(f"{TOKEN_VARIABLE} is not set: deployment workers are started by the control plane.")
    _configure_torch(spec)
    try:
        text = TextModel(base_folder(spec.model_dir))
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
    reason = asyncio.run(_serve(spec, engine, text, token))
    write_json(job_dir / "exit.json", {"reason": reason})
    logging.getLogger(__name__).info("ends: %s", reason)
    logging.shutdown()
    sys.stdout.flush()
    # The compute thread may be inside torch, where an ordinary exit would pull the interpreter from under it.
    os._exit(0)


def _configure_torch(spec: DeploymentSpec) -> None:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)


async def _serve(spec: DeploymentSpec, engine: Engine, text: TextModel, token: str) -> str:
    """Serve until the end and say why it came."""
    app = DeploymentApp(spec, engine, HotLoader(spec, engine), text, token)
    config = uvicorn.Config(
        app.asgi,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SHUTDOWN_GRACE_S,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # asyncio sets this only on sockets whose protocol is named; without it each small answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _Server(config, spec.folder / "worker.json", listener.getsockname()[1])
    reasons = ["told to stop"]
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, setattr, server, "should_exit", True)
    watcher = asyncio.create_task(_watch(spec, app, server, reasons))
    await server.serve(sockets=[listener])
    watcher.cancel()
    return reasons[-1]


async def _watch(spec: DeploymentSpec, app: DeploymentApp, server: uvicorn.Server, reasons: list[str]) -> None:
    """End the worker when nobody has asked it for anything for too long."""
    while not server.should_exit:
        await asyncio.sleep(_WATCH_INTERVAL_S)
        if not app.busy and time.monotonic() - app.last_active > spec.inactivity_timeout_s:
            reasons.append(f"no requests for {spec.inactivity_timeout_s:g} s (inactivity timeout)")
            server.should_exit = True


class _Server(uvicorn.Server):
    """Announces itself in worker.json once it listens, and leaves signals to this module."""

    def __init__(self, config: uvicorn.Config, record: Path, port: int) -> None:
        super().__init__(config)
        self._record = record
        self._port = port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        write_json(self._record, {"pid": os.getpid(), "port": self._port, "started": time.time()})

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
