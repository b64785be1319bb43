"""The process that works for a flow run: found and told to stop, once, by another process of its machine.

No Prefect: which flow runs are to be ended is in tasks/cancelling.py. What a process does that is told to stop:
tasks/termination.py.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cookbook.files import file_lock, read_json, write_json
from cookbook.run import LOCK_FILE, RUN_FILE, owner_of

__all__ = ["RunProcess", "process_of"]

TELL_AGAIN_S = 300.0
"""Seconds beyond its grace after which a process that still owns its run may be told again: nothing is being saved any
more, and whoever told it may have been killed before the signal was sent."""

END_S = 15.0
"""Seconds for a process that has let go of its run to report how it ended, and to end."""

STOP_FILE = ".stop.json"  # of processes of this machine, so that no mirror has it
STOP_LOCK_FILE = ".stop.lock"
_LOCK_TIMEOUT_S = 5.0
_POLL_S = 0.2


@dataclass(frozen=True)
class RunProcess:
    """A process of this machine that owns a run."""

    log_path: Path
    owner: Mapping[str, Any]
    """As it has written itself into the run's lock: pid, host, started, ..."""

    @property
    def pid(self) -> int:
        """Its id, on this machine."""
        return int(self.owner["pid"])

    def tell_to_stop(self) -> bool:
        """SIGTERM, once for all who ask; whether it was sent now. A second one would break off the save under way.

        Raises:
            ProcessLookupError: the process of that id is not the one that owns the run; it was not told.
            CheckpointError: it cannot be written down that it is told; it was not.
            OSError: it belongs to another user.
        """
        with file_lock(self.log_path / STOP_LOCK_FILE, _LOCK_TIMEOUT_S):
            if self._was_told() or not self._is_there():
                return False
            told = {"owner": dict(self.owner), "time": datetime.now(UTC).isoformat(timespec="seconds")}
            write_json(self.log_path / STOP_FILE, told)  # first: whoever is killed here has told it once at most
            if not self._is_there():  # the disk may have taken its time
                return False
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            return True

    def wait_until_ended(self, timeout_s: float) -> bool:
        """Wait until it has let go of its run, and a little for its end; False when it has not within `timeout_s`.

        Raises:
            CheckpointError: the lock of the run cannot be opened.
        """
        if not _waited(lambda: not self._owns(), timeout_s):
            return False
        _waited(lambda: not _exists(self.pid), END_S)
        return True

    def _owns(self) -> bool:
        return owner_of(self.log_path) == self.owner

    def _was_told(self) -> bool:
        """Whether it was told, and may still be saving."""
        told = read_json(self.log_path / STOP_FILE) or {}
        if told.get("owner") != self.owner:
            return False
        config = (read_json(self.log_path / RUN_FILE) or {}).get("config") or {}
        allowed = timedelta(seconds=TELL_AGAIN_S + config.get("sigterm_grace_s", 0.0))  # evaluations have no grace
        return datetime.now(UTC) - datetime.fromisoformat(told["time"]) < allowed

    def _is_there(self) -> bool:
        """Whether it still owns its run.

        The id in the lock may be that of another process: where containers share a host name, and for the moment in
        which a new owner has the lock and has not written itself into it. That one must not be told.
        """
        lock = self.log_path / LOCK_FILE
        if _has_open(self.pid, lock) or not self._owns():
            return self._owns()
        raise ProcessLookupError(
            f"process {self.pid} of this machine does not hold {lock}, which names it. If its owner is in another "
            "container, end it there"
        )


def process_of(log_path: Path, flow_run_id: str) -> RunProcess | None:
    """The process that owns a run for this flow run; None when there is none.

    Raises:
        ProcessLookupError: it cannot be told from this machine.
        CheckpointError: the lock of the run cannot be opened.
    """
    owner = owner_of(log_path)
    if not log_path.exists() or (owner is not None and owner.get("host") != socket.gethostname()):
        raise ProcessLookupError("its process, if it lives, is on another machine")
    is_its_own = owner is not None and owner.get("started_by") == flow_run_id
    return RunProcess(log_path, owner) if owner is not None and is_its_own else None


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; True where that cannot be told (macOS)."""
    if not Path("/proc/self/fd").exists():
        return True
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # no such process
        return False
    return any(_is_same(descriptor, path) for descriptor in descriptors)


def _is_same(descriptor: Path, path: Path) -> bool:
    try:
        return descriptor.samefile(path)
    except FileNotFoundError:  # closed meanwhile
        return False


def _waited(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
