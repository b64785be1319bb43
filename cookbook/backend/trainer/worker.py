"""The trainer worker's process: from spec.json to a served port, and its orderly end."""

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
from transformers.utils.logging import disable_progress_bar

from cookbook.backend.decoder import read_config
from cookbook.backend.paths import write_json
from cookbook.backend.snapshots import remove_leftovers
from cookbook.backend.trainer.app import TrainerApp
from cookbook.backend.trainer.engine import Engine
from cookbook.backend.trainer.futures import FutureStore
from cookbook.backend.trainer.job import JobSpec, read_spec
from cookbook.backend.trainer.models import ModelStore
from cookbook.backend.trainer.operations import Operations
from cookbook.errors import BackendError, ModelError

__all__ = ["TOKEN_VARIABLE", "main"]

TOKEN_VARIABLE = "COOKBOOK_BACKEND_TOKEN"
_WATCH_INTERVAL_S = 1.0
_SHUTDOWN_GRACE_S = 2


def main(job_dir: Path) -> None:
    """Serve one trainer job until it is idle for too long or told to stop. Does not return: it ends the process.

    BackendError when the job cannot be served: bad spec, bad extra argument, or a model that cannot be trained here.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    spec = read_spec(job_dir)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise BackendError(f"{TOKEN_VARIABLE} is not set: trainer workers are started by the control plane.")
    try:
        architecture = str(read_config(spec.model_dir).model_type)
    except ModelError as error:
        raise BackendError(str(error)) from error
    _configure_torch(spec)
    disable_progress_bar()  # its carriage returns have no place in a log
    remove_leftovers(spec.checkpoints_dir, spec.job_id)
    engine = Engine(Operations(ModelStore(spec)).execute, FutureStore(job_dir / "results"))
    app = TrainerApp(spec, engine, token, architecture=architecture)
    reason = asyncio.run(_serve(spec, app))
    write_json(job_dir / "exit.json", {"reason": reason})
    logging.getLogger(__name__).info("ends: %s", reason)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(
        0
    )  # the compute thread may be inside torch, where an ordinary exit would pull the interpreter from under it


def _configure_torch(spec: JobSpec) -> None:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    if spec.compute_dtype == "bfloat16":
        # Float32 products (the head) may then round their inputs to bfloat16 where that is faster; sums stay float32.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


async def _serve(spec: JobSpec, app: TrainerApp) -> str:
    """Serve until the end and say why it came."""
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
    server = _Server(config, spec.job_dir / "worker.json", listener.getsockname()[1])
    reasons = ["told to stop"]
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, setattr, server, "should_exit", True)
    watcher = asyncio.create_task(_watch(spec, app, server, reasons))
    await server.serve(sockets=[listener])
    watcher.cancel()
    return reasons[-1]


async def _watch(spec: JobSpec, app: TrainerApp, server: uvicorn.Server, reasons: list[str]) -> None:
    """Close sessions gone silent; end the worker when nobody has asked it anything for too long."""
    while not server.should_exit:
        await asyncio.sleep(_WATCH_INTERVAL_S)
        app.close_silent_sessions()
        if time.monotonic() - app.last_active > spec.inactivity_timeout_s:
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
