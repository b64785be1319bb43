"""What worker processes of both kinds share: a port that is announced once it listens, and an orderly end.

What is served: trainer/worker.py and deployment/worker.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from cookbook.backend.paths import write_json
from cookbook.errors import BackendError

__all__ = ["TOKEN_VARIABLE", "serve_until_the_end", "start_logging", "token_of"]

TOKEN_VARIABLE = "COOKBOOK_BACKEND_TOKEN"
_WATCH_INTERVAL_S = 1.0
_SHUTDOWN_GRACE_S = 2


def start_logging() -> None:
    """Log to stderr, which is the worker's log file."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


def token_of(kind: str) -> str:
    """The token that this worker of one kind was started with. BackendError when there is none."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise BackendError(f"{TOKEN_VARIABLE} is not set: {kind} workers are started by the control plane.")
    return token


def serve_until_the_end(
    asgi: ASGIApp,
    folder: Path,
    *,
    is_idle: Callable[[], bool],
    inactivity_timeout_s: float,
    before_exit: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Serve on a free port of loopback, write why it ended to exit.json, and end the process.

    Args:
        folder: of the worker; worker.json appears in it once the port listens.
        is_idle: asked every second: whether nobody has wanted anything for `inactivity_timeout_s`, which ends it.
        before_exit: called when nothing is served any more, to end what is under way. The control plane kills a worker
            that it has told to stop after 10 s.
    """
    reason = asyncio.run(_serve(asgi, folder / "worker.json", is_idle, inactivity_timeout_s))
    before_exit()
    write_json(folder / "exit.json", {"reason": reason})
    logging.getLogger(__name__).info("ends: %s", reason)
    logging.shutdown()
    sys.stdout.flush()
    # The compute thread may be inside torch, where an ordinary exit would pull the interpreter from under it.
    os._exit(0)


async def _serve(asgi: ASGIApp, record: Path, is_idle: Callable[[], bool], inactivity_timeout_s: float) -> str:
    """Serve until the end and say why it came."""
    config = uvicorn.Config(
        asgi,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SHUTDOWN_GRACE_S,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # asyncio sets this only on sockets whose protocol is named; without it each small answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _Server(config, record, listener.getsockname()[1])
    reasons = ["told to stop"]

    async def watch() -> None:
        while not server.should_exit:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if is_idle():
                reasons.append(f"no requests for {inactivity_timeout_s:g} s (inactivity timeout)")
                server.should_exit = True

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, setattr, server, "should_exit", True)
    watcher = asyncio.create_task(watch())
    await server.serve(sockets=[listener])
    watcher.cancel()
    return reasons[-1]


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
