"""The supervisor as a process: its lock, its signals, and when it gives up on its control plane."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cookbook import embedded
from cookbook.backend.paths import BackendPaths, acquire_lock, lock_is_held, read_json
from cookbook.backend.supervisor import ALREADY_RUNNING
from tests.backend.conftest import wait_until

VERSION = "test"


def start(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cookbook.backend", "supervise", "--home", str(home), "--version", VERSION]
    return subprocess.Popen([*command, "--idle-timeout-s", "60"], stderr=subprocess.PIPE, text=True)


def ready(paths: BackendPaths) -> embedded.BackendStatus:
    files = embedded._Files(paths.home, VERSION)
    wait_until(lambda: embedded._running(files) is not None)
    running = embedded._running(files)
    assert running is not None
    return running[1]


def test_the_launcher_and_the_backend_agree_on_their_files(tmp_path: Path) -> None:
    theirs, ours = BackendPaths(tmp_path, VERSION), embedded._Files(tmp_path, VERSION)

    assert (ours.root, ours.lock, ours.token, ours.record) == (
        *(theirs.root, theirs.lock, theirs.token),
        theirs.supervisor_record,
    )
    assert (ours.supervisor_log, ours.control_plane_log) == (theirs.supervisor_log, theirs.control_plane_log)


def test_a_second_supervisor_leaves_the_first_alone(tmp_path: Path) -> None:
    first = start(tmp_path)
    state = ready(BackendPaths(tmp_path, VERSION))
    second = start(tmp_path)

    assert second.wait(timeout=20) == ALREADY_RUNNING == embedded._ALREADY_RUNNING
    assert ready(BackendPaths(tmp_path, VERSION)).supervisor_pid == state.supervisor_pid
    first.terminate()
    first.communicate(timeout=20)
    second.communicate()


def test_sigterm_ends_supervisor_and_control_plane_cleanly(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, VERSION)
    supervisor = start(tmp_path)
    ready(paths)
    supervisor.terminate()

    supervisor.communicate(timeout=20)
    assert supervisor.returncode == 0
    assert not lock_is_held(paths.control_plane_lock)
    assert "Application shutdown complete" in paths.control_plane_log.read_text()


def test_a_lock_ends_with_its_holder_even_after_kill_9(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, VERSION)
    supervisor = start(tmp_path)
    ready(paths)
    assert lock_is_held(paths.lock)
    supervisor.kill()
    supervisor.communicate()

    assert not lock_is_held(paths.lock)
    again = start(tmp_path)
    assert ready(paths).supervisor_pid == again.pid
    again.terminate()
    again.communicate(timeout=20)


def test_a_control_plane_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    paths = BackendPaths(tmp_path, VERSION)
    supervisor = start(tmp_path)
    ready(paths)
    paths.token.unlink()  # each further start fails on it
    os.kill(ready_pid(paths), signal.SIGKILL)

    _, stderr = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 2
    assert "error: the control plane died 6 times" in stderr
    assert str(paths.control_plane_log) in stderr


def ready_pid(paths: BackendPaths) -> int:
    """The control plane, found as the child of the supervisor: asking for its status takes the token."""
    record = read_json(paths.supervisor_record)
    assert record is not None
    children = Path(f"/proc/{record['pid']}/task/{record['pid']}/children").read_text().split()
    return int(children[0])


def test_acquire_lock_waits_only_as_long_as_told(tmp_path: Path) -> None:
    held = acquire_lock(tmp_path / "lock")
    assert held is not None
    began = time.monotonic()

    assert acquire_lock(tmp_path / "lock", timeout_s=0.2) is None
    assert 0.2 <= time.monotonic() - began < 2
    os.close(held)
    assert not lock_is_held(tmp_path / "lock")
