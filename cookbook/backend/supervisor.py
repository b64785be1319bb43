"""The supervisor: owns the lock, the token and the listening socket of one backend, and keeps a control plane running.

The socket stays bound here, so a control plane that is killed loses no port: its successor accepts what queued up.
The control plane ends itself when this process dies (its end of a pipe closes). Trainer workers outlive both.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from cookbook.backend.paths import BackendPaths, acquire_lock, read_json, write_json
from cookbook.errors import BackendError

__all__ = ["ALREADY_RUNNING", "supervise"]

ALREADY_RUNNING = 3
"""Exit status: another supervisor of this home and version lives."""

_LOCK_WAIT_S = 3.0  # longer than a status check holds the lock, and than a supervisor takes to end
_PORT_WAIT_S = 1.0  # the control plane of a killed supervisor needs a moment to let go of its port
_BACKLOG = 1024
_MAX_RESTARTS = 5
_RESTART_WINDOW_S = 60.0


def supervise(paths: BackendPaths, *, port: int, idle_timeout_s: float) -> int:
    """Run a backend until its control plane ends by itself (idle, or told to stop) and return the exit status.

    Raises:
        BackendError: the home cannot be written, the port is taken, or the control plane does not stay up.
    """
    os.umask(0o077)
    try:
        paths.create()
        lock = acquire_lock(paths.lock, timeout_s=_LOCK_WAIT_S)
        if lock is None:
            return ALREADY_RUNNING
        previous = read_json(paths.supervisor_record) or {}
        paths.supervisor_record.unlink(missing_ok=True)  # from here on, a record means that its writer is alive
        _ensure_token(paths.token)
        with _listen(port, previous.get("port")) as listener:
            _write_record(paths, listener.getsockname()[1])
            return _ControlPlaneKeeper(paths, listener, idle_timeout_s).run()
    except OSError as error:
        raise BackendError(
            f"the backend cannot use {error.filename or paths.home}: {error.strerror or error}. "
            "Free space or permissions there, or set COOKBOOK_HOME to another directory."
        ) from error


def _ensure_token(path: Path) -> None:
    """Make the token once. It outlives the supervisor, because workers that do so were given it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_uid != os.getuid():
            raise BackendError(
                f"{path} belongs to another user; set COOKBOOK_HOME to a directory of your own."
            ) from None
        path.chmod(0o600)
        if path.read_text().strip():
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    with open(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32))


def _listen(port: int, previous_port: object) -> socket.socket:
    """A listening socket on 127.0.0.1: on `port`, or for 0 on the previous port if it is free, else on any.

    The previous port keeps the URLs of clients valid that were running when the last supervisor was killed.
    """
    if port == 0 and isinstance(previous_port, int):
        listener = _try_bind(previous_port, _PORT_WAIT_S)
        if listener is not None:
            return listener
    listener = _try_bind(port, _PORT_WAIT_S)
    if listener is None:
        raise BackendError(
            f"port {port} is in use (by {_port_owner(port)}): "
            "choose another port, 0 for any free one, or end that process."
        )
    return listener


def _try_bind(port: int, wait_s: float) -> socket.socket | None:
    deadline = time.monotonic() + wait_s
    while True:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno == errno.EACCES:
                raise BackendError(f"port {port} may not be bound by this user: choose one from 1024 up.") from error
            if error.errno != errno.EADDRINUSE:
                raise
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)
        else:
            return listener


def _port_owner(port: int) -> str:
    """Who listens on a port, as far as /proc shows it to this user."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, rows):
            if columns[3] == "0A" and int(columns[1].rsplit(":", 1)[1], 16) == port:
                sockets.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(entry) in sockets for entry in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {process.name}: {command[:120]}"
        except OSError:  # another user's process, or one that ended meanwhile
            continue
    return "a process that this user cannot see"


def _write_record(paths: BackendPaths, port: int) -> None:
    record = {
        "pid": os.getpid(),
        "port": port,
        "base_url": f"http://127.0.0.1:{port}",
        "version": paths.version,
        "started": time.time(),
    }
    write_json(paths.supervisor_record, record)


class _ControlPlaneKeeper:
    """Starts control planes on one socket until one ends on purpose."""

    def __init__(self, paths: BackendPaths, listener: socket.socket, idle_timeout_s: float) -> None:
        self._paths = paths
        self._listener = listener
        self._idle_timeout_s = idle_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._told_to_stop = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._forward)
        signal.signal(signal.SIGINT, self._forward)
        # Nothing is ever written: the write end closes when this process ends, however it ends.
        read_end, _write_end = os.pipe()
        deaths: deque[float] = deque(maxlen=_MAX_RESTARTS)
        while True:
            status = self._run_once(read_end)
            if status == 0 or self._told_to_stop:
                return 0
            self._note_death(status, deaths)

    def _run_once(self, parent_fd: int) -> int:
        listen_fd = self._listener.fileno()
        command = [
            *(sys.executable, "-m", "cookbook.backend", "control-plane"),
            *("--home", str(self._paths.home), "--version", self._paths.version),
            *("--idle-timeout-s", str(self._idle_timeout_s)),
            *("--listen-fd", str(listen_fd), "--parent-fd", str(parent_fd)),
        ]
        with self._paths.control_plane_log.open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(listen_fd, parent_fd)
            )
        self._child = child
        if self._told_to_stop:  # the signal came before there was a child to forward it to
            child.terminate()
        return child.wait()

    def _note_death(self, status: int, deaths: deque[float]) -> None:
        """Log a death and pause before the next start; give up when they come too fast."""
        if status == 2:
            raise BackendError(_last_error(self._paths.control_plane_log))
        now = time.monotonic()
        if len(deaths) == _MAX_RESTARTS and now - deaths[0] < _RESTART_WINDOW_S:
            raise BackendError(
                f"the control plane died {_MAX_RESTARTS + 1} times in {now - deaths[0]:.0f} s "
                f"(last exit status {status}); its log is {self._paths.control_plane_log}"
            )
        deaths.append(now)
        print(f"control plane ended with status {status}; starting it again", file=sys.stderr, flush=True)
        time.sleep(0.1 * (2 ** (len(deaths) - 1) - 1))  # the first restart is immediate

    def _forward(self, signum: int, _frame: object) -> None:
        self._told_to_stop = True
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"the control plane could not start; its log is {log}"
