"""The embedded backend from the outside: start it on first use, ask how it fares, stop it.

The backend is a process of its own (`python -m cookbook.backend`), which this module never imports. One runs per home
and code version: a server of other code is never reused.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from cookbook.errors import BackendError

__all__ = [
    "BackendStatus",
    "Endpoint",
    "code_version",
    "ensure_running",
    "find",
    "has_workers",
    "is_up",
    "log_path",
    "status",
    "stop",
    "token_path",
]

_PACKAGE = Path(__file__).resolve().parent
_DISTRIBUTION = "cookbook-flows"

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0  # a worker may take 15 s, a promotion's copy as long as the disk takes
_REQUEST_TIMEOUT_S = 10.0
_POLL_S = 0.02
_USER_ERROR = 2  # exit status of a supervisor whose last line says what to do
_ALREADY_RUNNING = 3  # another supervisor holds the lock

_started: list[subprocess.Popen[bytes]] = []  # kept, so that a supervisor that ends before this process is reaped


@dataclass(frozen=True)
class Endpoint:
    """Where a backend answers, and its key. The key does not show in a repr."""

    base_url: str
    api_key: SecretStr


@dataclass(frozen=True)
class BackendStatus:
    """A backend that runs: its address and version, the processes, seconds since the control plane began, and how many
    trainer jobs it has in each state (`running`, `failed`, ...)."""

    base_url: str
    version: str
    supervisor_pid: int
    control_plane_pid: int
    uptime_s: float
    jobs: dict[str, int]


def ensure_running(home: Path, *, port: int = 0, idle_timeout_s: float = 1800) -> Endpoint:
    """The backend of this home and of this version of the code, started if it does not run.

    Any number of processes may call this at once; one backend results. It outlives its callers, and ends by itself
    after `idle_timeout_s` seconds without a trainer job and without a request. `port` 0 means any.

    Raises:
        BackendError: the home cannot be written, the port is taken, it runs on another port than the one asked for, or
            it does not start; says why and where its log is.
    """
    files = _Files(home.expanduser().absolute(), code_version())
    running = _running(files)
    if running is None:
        with _launch_lock(files):
            running = _running(files) or _start(files, port, idle_timeout_s)
    endpoint, _ = running
    if port and not endpoint.base_url.endswith(f":{port}"):
        raise BackendError(
            f"the embedded backend of {files.home} runs at {endpoint.base_url} already, port {port} was asked for. "
            "Leave the port at 0, or stop the backend first."
        )
    return endpoint


def status(home: Path) -> BackendStatus | None:
    """How the backend of this home and code version fares, or None when it does not run."""
    running = _running(_Files(home.expanduser().absolute(), code_version()))
    return running[1] if running is not None else None


def find(home: Path, *, timeout_s: float) -> Endpoint | None:
    """The backend of this home and code version if it runs; it is not started.

    Raises:
        BackendError: it runs, but has not answered within `timeout_s`.
    """
    running = _running(_Files(home.expanduser().absolute(), code_version()), timeout_s)
    return running[0] if running is not None else None


def is_up(home: Path, version: str) -> bool:
    """Whether the backend of this home and of a version of the code lives. Cheap: nobody is asked."""
    return _is_held(_Files(home.expanduser().absolute(), version).lock)


def has_workers(home: Path) -> bool:
    """Whether a trainer or deployment of this home and code version lives, also without its backend.

    Nobody is asked, and no lock is tried: a backend that is asked every few minutes would never be idle.
    """
    root = _Files(home.expanduser().absolute(), code_version()).root
    return any(_is_alive(record) for kind in ("jobs", "deployments") for record in root.glob(f"{kind}/*/worker.json"))


def _is_alive(worker: Path) -> bool:
    """Whether the process of a worker's record lives; another one may have got its number since."""
    try:
        os.kill(int(json.loads(worker.read_bytes())["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def stop(home: Path) -> bool:
    """End the backend of this home and code version, its trainers included. False when it did not run.

    Raises:
        BackendError: it did not end in time; names the process.
    """
    files = _Files(home.expanduser().absolute(), code_version())
    running = _running(files)
    if running is None:
        return False
    endpoint, state = running
    with suppress(OSError, http.client.HTTPException):  # it may be gone before it has answered
        _call("POST", endpoint, "/cookbook/v1/stop")
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while _is_held(files.lock):
        if time.monotonic() >= deadline:
            raise BackendError(
                f"the embedded backend (process {state.supervisor_pid}) did not end in {_STOP_TIMEOUT_S:.0f} s. "
                f"Its log is {files.control_plane_log}; `kill -9 {state.supervisor_pid}` ends it."
            )
        time.sleep(_POLL_S)
    _reap()
    return True


def token_path(home: Path) -> Path:
    """The file with the key of the backend of this home and code version (it need not exist yet)."""
    return _Files(home.expanduser().absolute(), code_version()).token


def log_path(home: Path) -> Path:
    """The control plane's log; each trainer's own log is named in its job's metadata."""
    return _Files(home.expanduser().absolute(), code_version()).control_plane_log


def code_version() -> str:
    """`<package version>-<12 hex>`: the hash of every file that a backend process runs."""
    try:
        release = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        release = "checkout"
    files = [_PACKAGE / "errors.py", *(_PACKAGE / "backend").rglob("*.py"), *(_PACKAGE / "losses").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{release}-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class _Files:
    """The few files of a backend that its launcher reads; the backend itself makes and owns them."""

    home: Path
    version: str

    @property
    def root(self) -> Path:
        return self.home / "backend" / self.version

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def launch_lock(self) -> Path:
        return self.root / "launch.lock"

    @property
    def record(self) -> Path:
        return self.root / "supervisor.json"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def supervisor_log(self) -> Path:
        return self.root / "logs" / "supervisor.log"

    @property
    def control_plane_log(self) -> Path:
        return self.root / "logs" / "control-plane.log"


@contextmanager
def _launch_lock(files: _Files) -> Iterator[None]:
    """Only one process at a time starts a backend of this home and version."""
    try:
        files.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (files.root.parent, files.root, files.supervisor_log.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(files.launch_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackendError(
            f"cannot write {error.filename} below the home {files.home}: {error.strerror}. "
            "Free space or permissions there, or set COOKBOOK_HOME to another directory."
        ) from error
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S + _REQUEST_TIMEOUT_S
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise BackendError(
                    f"another process has been starting the backend for {_START_TIMEOUT_S + _REQUEST_TIMEOUT_S:.0f} s "
                    f"and still holds {files.launch_lock}. Its log is {files.supervisor_log}."
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _start(files: _Files, port: int, idle_timeout_s: float) -> tuple[Endpoint, BackendStatus]:
    """Start a supervisor and wait until its control plane answers."""
    command = [
        *(sys.executable, "-m", "cookbook.backend", "supervise"),
        *("--home", str(files.home), "--version", files.version),
        *("--port", str(port), "--idle-timeout-s", str(idle_timeout_s)),
    ]
    _reap()
    with files.supervisor_log.open("ab") as log:
        # Started from the folder above the package, so that a checkout that is not installed is found as well.
        child = subprocess.Popen(
            command, cwd=_PACKAGE.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _started.append(child)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        running = _running(files)
        if running is not None:
            return running
        if child.poll() not in (None, _ALREADY_RUNNING):
            raise _start_failure(files, child.returncode)
        time.sleep(_POLL_S)
    raise BackendError(
        f"the embedded backend did not answer within {_START_TIMEOUT_S:.0f} s of its start. "
        f"Its logs are {files.supervisor_log} and {files.control_plane_log}."
    )


def _start_failure(files: _Files, returncode: int) -> BackendError:
    lines = files.supervisor_log.read_text(errors="replace").splitlines()
    if returncode == _USER_ERROR and lines and lines[-1].startswith("error: "):
        return BackendError(lines[-1].removeprefix("error: "))
    tail = "\n".join(f"  {line}" for line in lines[-15:])
    return BackendError(
        f"the embedded backend ended with status {returncode} before it answered. "
        f"The end of its log ({files.supervisor_log}):\n{tail}"
    )


def _running(files: _Files, timeout_s: float = _START_TIMEOUT_S) -> tuple[Endpoint, BackendStatus] | None:
    """The backend, if it runs and answers with its version; None when it does not run, or is starting."""
    record = _record_of_live_supervisor(files)
    if record is None:
        return None
    endpoint = Endpoint(record["base_url"], SecretStr(files.token.read_text().strip()))
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = _call("GET", endpoint, "/cookbook/v1/status", min(timeout_s, _REQUEST_TIMEOUT_S))
            break
        except (OSError, http.client.HTTPException) as error:
            # Its control plane is being restarted, or it ended just now.
            if not _is_held(files.lock):
                return None
            if time.monotonic() >= deadline:
                raise BackendError(
                    f"the embedded backend at {endpoint.base_url} does not answer ({error}). "
                    f"Its log is {files.control_plane_log}; `kill -9 {record['pid']}` ends it."
                ) from error
            time.sleep(_POLL_S)
    if answer.get("version") != files.version:
        raise BackendError(
            f"the server at {endpoint.base_url} is version {answer.get('version')!r}, this code is {files.version!r}. "
            "Stop that server."
        )
    state = BackendStatus(
        base_url=endpoint.base_url,
        version=files.version,
        supervisor_pid=record["pid"],
        control_plane_pid=answer["pid"],
        uptime_s=answer["uptime_s"],
        jobs=answer["jobs"],
    )
    return endpoint, state


def _record_of_live_supervisor(files: _Files) -> dict[str, Any] | None:
    """supervisor.json, if its writer lives. The token must not go to whoever took the port of a dead one."""
    if not _is_held(files.lock):
        return None
    try:
        record = json.loads(files.record.read_bytes())
        os.kill(record["pid"], 0)
    except (FileNotFoundError, ProcessLookupError):  # not written yet, or from before the present holder of the lock
        return None
    return dict(record)


def _call(method: str, endpoint: Endpoint, path: str, timeout_s: float = _REQUEST_TIMEOUT_S) -> dict[str, Any]:
    """One request to the backend. The standard library's client, because it knows no proxies and no redirects.

    Raises:
        BackendError: the answer is not 200.
        OSError, http.client.HTTPException: there is no answer.
    """
    host = endpoint.base_url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=timeout_s)
    try:
        connection.request(method, path, headers={"X-Api-Key": endpoint.api_key.get_secret_value()})
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise BackendError(
            f"{method} {endpoint.base_url}{path} answered {answer.status}: {body[:200].decode(errors='replace')}"
        )
    return dict(json.loads(body))


def _is_held(lock: Path) -> bool:
    """Whether a live process holds the lock file."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reap() -> None:
    _started[:] = [child for child in _started if child.poll() is None]
