"""The control plane as a process: an inherited socket, one event loop, and three ways to end.

Exit status 0: told to stop (over HTTP, or SIGTERM) or idle; the supervisor then ends too. 2: it cannot start, with the
reason on stderr. Anything else is a crash, after which the supervisor starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sqlite3
from collections.abc import Generator

import uvicorn

from cookbook.backend.control_plane.app import build_app
from cookbook.backend.control_plane.store import Store
from cookbook.backend.paths import BackendPaths, acquire_lock
from cookbook.errors import BackendError

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_LOCK_WAIT_S = 10.0
_ORPHANED = 70
_MAX_OPEN_FILES = 65536


def serve(paths: BackendPaths, *, listen_fd: int, parent_fd: int, idle_timeout_s: float) -> int:
    """Serve the training API on an inherited listening socket until told to stop or idle, and return 0.

    Ends at once, without touching its workers, when the other end of `parent_fd` closes: the supervisor has died, and
    the next one brings a control plane that takes the workers up.

    Raises:
        BackendError: the state of an older control plane cannot be taken over.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every proxied request
    if acquire_lock(paths.control_plane_lock, timeout_s=_LOCK_WAIT_S) is None:
        raise BackendError(f"another control plane still holds {paths.control_plane_lock}; end it, then start again.")
    _check_store(paths)
    _allow_many_connections()
    app = build_app(
        paths,
        token=paths.token.read_text().strip(),
        idle_timeout_s=idle_timeout_s,
        stop=lambda: server.stop(),  # the application comes first, the server after
    )
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than clients keep an idle connection, so that it is they who close it.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )
    server = _Server(config, parent_fd)
    with socket.socket(fileno=listen_fd) as listener:
        server.run(sockets=[listener])
    return 0


def _allow_many_connections() -> None:
    """Raise the soft limit of open files: a long poll that is passed on takes two, and 1024 is the usual limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _check_store(paths: BackendPaths) -> None:
    """BackendError when the state file cannot be read and written: a reason that a restart would not remove."""
    try:
        Store(paths.store).close()
    except sqlite3.Error as error:
        raise BackendError(
            f"{paths.store} cannot be used: {error}. Free space or permissions there, or move the file away "
            "(trainer jobs are forgotten then; checkpoints and models are kept)."
        ) from error


class _Server(uvicorn.Server):
    """uvicorn's server, ended by SIGTERM with status 0, and by the death of the supervisor on the spot."""

    def __init__(self, config: uvicorn.Config, parent_fd: int) -> None:
        super().__init__(config)
        self._parent_fd = parent_fd

    def stop(self) -> None:
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Called by uvicorn around the serving. Its own version would raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        loop.add_reader(self._parent_fd, self._orphaned)
        yield
        loop.remove_reader(self._parent_fd)

    def _orphaned(self) -> None:
        logger.error("the supervisor has died; the workers stay for the next one")
        os._exit(_ORPHANED)
