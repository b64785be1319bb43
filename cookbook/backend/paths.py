"""Where the embedded backend keeps its things under COOKBOOK_HOME, and the two file habits all of its processes share:
small JSON files are written beside and renamed, and whoever holds the flock of a lock file is the one who is alive.

Not here: the layout inside a checkpoint folder (cookbook/backend/snapshots.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BackendPaths", "acquire_lock", "lock_is_held", "read_json", "write_json"]

_LOCK_RETRY_S = 0.02


@dataclass(frozen=True)
class BackendPaths:
    """The files of one home (shared by all versions of the code) and of one code version in it.

    Checkpoints and models belong to the home: they outlive the code that wrote them. Lock, token, port and job records
    belong to the version, so that a new clone of the code never talks to an old server.
    """

    home: Path
    version: str

    @property
    def root(self) -> Path:
        return self.home / "backend" / self.version

    @property
    def lock(self) -> Path:
        """Held by the supervisor while it lives."""
        return self.root / "lock"

    @property
    def control_plane_lock(self) -> Path:
        """Held by the control plane while it lives: two of them must never share the store."""
        return self.root / "control-plane.lock"

    @property
    def supervisor_record(self) -> Path:
        return self.root / "supervisor.json"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def store(self) -> Path:
        return self.root / "state.sqlite"

    @property
    def supervisor_log(self) -> Path:
        return self.root / "logs" / "supervisor.log"

    @property
    def control_plane_log(self) -> Path:
        return self.root / "logs" / "control-plane.log"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    @property
    def models(self) -> Path:
        return self.home / "models"

    def job_dir(self, job_id: str) -> Path:
        return self.root / "jobs" / job_id

    def deployment_dir(self, deployment_id: str) -> Path:
        return self.root / "deployments" / deployment_id

    def create(self) -> None:
        """Make every directory, private to this user. OSError when the home cannot be written."""
        for folder in (self.home, self.checkpoints, self.models):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parts = [self.root / name for name in ("logs", "jobs", "deployments")]
        for folder in (self.home / "backend", self.root, *parts):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when the file is missing or not one (a writer that was killed)."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file in one step: a reader sees the old object or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def acquire_lock(path: Path, *, timeout_s: float = 0.0) -> int | None:
    """Take the exclusive flock of a file: its descriptor, or None when another process held it for `timeout_s`.

    The lock lives as long as any process has the descriptor open, so it ends with its holder even after kill -9, and a
    child that inherits the descriptor inherits the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(_LOCK_RETRY_S)
        else:
            return descriptor


def lock_is_held(path: Path) -> bool:
    """Whether a live process holds the exclusive flock of a file. A missing file is not held."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
