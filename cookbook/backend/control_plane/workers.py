"""Worker processes: start one in its job's folder, see whether it lives, end it, and say why it ended.

A worker inherits the flock of worker.lock in its folder and holds it for as long as it lives, whoever started it. So
"alive" needs no pid: a control plane that was killed between starting a worker and noting its pid still finds it, and a
pid that the system gave to another process is never taken for a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cookbook.backend.paths import acquire_lock, lock_is_held, read_json, write_json

__all__ = ["End", "WorkerRecord", "end_of", "is_alive", "read_record", "start", "terminate"]

# Idle threads of one worker must not take the cores from another. But sleeping at once costs small operations more than
# they take: waiting a few microseconds for the next one first doubles the speed of sampling.
_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
_START_MARK = "--- worker started"
_TAIL_BYTES = 32 * 1024
_ERROR_LINE = re.compile(r"^(?:error: |(?:[\w.]*\.)?\w*(?:Error|Exception|Interrupt)\b: ?)")
_TERM_GRACE_S = 10.0
_KILL_GRACE_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker says of itself in worker.json once it can be asked for its health."""

    pid: int
    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class End:
    """How a worker ended: `on_purpose` (idle, or told to) or not, and what to tell the job's owner."""

    on_purpose: bool
    message: str


def start(job_dir: Path, spec: dict[str, Any], *, kind: str, token: str) -> subprocess.Popen[bytes]:
    """Start a worker of one kind (a process of `python -m cookbook.backend`) on a job's spec.

    Its own session, so that it survives the control plane; its output appended to worker.log.
    OSError when the folder cannot be written or the process not be started, or when an older worker still lives.
    """
    job_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = acquire_lock(job_dir / "worker.lock")
    if lock is None:
        raise OSError(f"the previous worker of {job_dir} is still alive")
    try:
        for name in ("worker.json", "exit.json"):
            (job_dir / name).unlink(missing_ok=True)
        write_json(job_dir / "spec.json", spec)
        with (job_dir / "worker.log").open("ab") as log:
            log.write(f"{_START_MARK} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, "-m", "cookbook.backend", kind, "--job-dir", str(job_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_THREADS, "COOKBOOK_BACKEND_TOKEN": token},
                start_new_session=True,
                pass_fds=(lock,),
            )
    finally:
        os.close(lock)  # the worker's copy keeps it


def is_alive(job_dir: Path) -> bool:
    """Whether a worker of this job lives."""
    return lock_is_held(job_dir / "worker.lock")


def read_record(job_dir: Path) -> WorkerRecord | None:
    """The worker's own record, or None while it has not written one."""
    record = read_json(job_dir / "worker.json") or {}
    pid, port = record.get("pid"), record.get("port")
    return WorkerRecord(pid, port) if isinstance(pid, int) and isinstance(port, int) else None


async def terminate(job_dir: Path, known_pid: int | None) -> None:
    """End a job's worker: SIGTERM, and SIGKILL to its whole session when it does not end in time.

    Raises:
        TimeoutError: it survived both.
    """

    def send(kill: Callable[[int, int], None], signum: int) -> None:
        record = read_record(job_dir)
        pid = known_pid or (record.pid if record is not None else None)
        # The lock says that the worker lives, so the pid is still its own.
        if pid is not None and is_alive(job_dir):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signum)

    for kill, signum, grace_s in ((os.kill, signal.SIGTERM, _TERM_GRACE_S), (os.killpg, signal.SIGKILL, _KILL_GRACE_S)):
        send(kill, signum)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not is_alive(job_dir):
                return
            await asyncio.sleep(_POLL_S)
    raise TimeoutError(f"the worker in {job_dir} is still alive after SIGTERM and SIGKILL")


def end_of(job_dir: Path, returncode: int | None, *, kind: str = "trainer") -> End:
    """Why a worker that is no longer alive ended. `returncode` is None when another process was its parent."""
    note = read_json(job_dir / "exit.json") or {}
    reason = note.get("reason")
    if isinstance(reason, str):
        return End(on_purpose=True, message=reason)
    log = job_dir / "worker.log"
    if returncode is None:
        how = "ended unexpectedly"
    elif returncode < 0:
        how = f"was killed by {signal.Signals(-returncode).name}"
    else:
        how = f"ended with exit status {returncode}"
    return End(on_purpose=False, message=f"the {kind}'s process {how}: {_last_words(log)} (log: {log})")


def _last_words(log: Path) -> str:
    """The last error in a worker's log since its last start, or else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    lines = [line.strip() for line in text.rpartition(_START_MARK)[2].splitlines()[1:] if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    if errors:
        return errors[-1].removeprefix("error: ")[:1000]
    return lines[-1][:1000] if lines else "it wrote nothing"
