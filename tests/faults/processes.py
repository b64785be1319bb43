"""The processes of an embedded backend, found in /proc: which run, whose they are, and ending one with SIGKILL."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROLES", "BackendProcess", "backend_processes", "find_process", "kill_process", "state_of"]

ROLES = ("trainer", "reference", "deployment", "control-plane", "supervisor")
"""What a kill may be aimed at, the flow apart. trainer: that of the policy."""

_COMMANDS = {"supervise": "supervisor", "control-plane": "control-plane"}


@dataclass(frozen=True)
class BackendProcess:
    """One process of a backend."""

    pid: int
    role: str
    """One of ROLES."""
    resource_id: str
    """Trainer job or deployment; "" for the other two."""


def backend_processes(home: Path) -> list[BackendProcess]:
    """All processes of all backends of this home that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if "cookbook.backend" in words and (process := _parse(int(folder.name), words, home)) is not None:
            found.append(process)
    return found


def _parse(pid: int, words: list[str], home: Path) -> BackendProcess | None:
    command, *options = words[words.index("cookbook.backend") + 1 :]
    values = dict(zip(options[::2], options[1::2], strict=False))
    if command in _COMMANDS:
        return BackendProcess(pid, _COMMANDS[command], "") if values.get("--home") == str(home) else None
    folder = Path(values.get("--job-dir", "/"))
    if home not in folder.parents:
        return None
    if command == "deployment":
        return BackendProcess(pid, "deployment", folder.name)
    return BackendProcess(pid, "reference" if "-reference-g" in folder.name else "trainer", folder.name)


def find_process(home: Path, role: str, run_id: str) -> BackendProcess | None:
    """The process with this role, of workers the newest of this run; None when there is none at present."""
    found = [process for process in backend_processes(home) if process.role == role]
    if role in ("trainer", "reference", "deployment"):
        found = [process for process in found if run_id in process.resource_id]
    return max(found, key=lambda process: process.pid, default=None)


def kill_process(process: BackendProcess, timeout_s: float = 10.0) -> None:
    """End it with SIGKILL and wait until it is gone, or a zombie of its parent."""
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return
        if state == "Z":
            return
        time.sleep(0.005)
    raise TimeoutError(f"process {process.pid} ({process.role}) is still there {timeout_s:g} s after SIGKILL")


def state_of(pid: int) -> str:
    """Of a process, in the kernel's letters: T is stopped, Z has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
