"""The launcher: start on first use, one server for many callers, the version handshake, clear errors, clean ends."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cookbook import embedded
from cookbook.backend.paths import BackendPaths, lock_is_held
from cookbook.errors import BackendError
from tests.backend.conftest import pid_is_alive, wait_until

PACKAGE = Path(embedded.__file__).parent


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose backend, if a test starts one, is stopped at the end."""
    yield tmp_path / "home"
    embedded.stop(tmp_path / "home")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_call_starts_a_backend_and_the_next_finds_it(home: Path) -> None:
    assert embedded.status(home) is None
    first = embedded.ensure_running(home)
    state = embedded.status(home)

    assert embedded.ensure_running(home) == first
    assert state is not None
    assert (state.base_url, state.version, state.jobs) == (first.base_url, embedded.code_version(), {})
    assert first.base_url.startswith("http://127.0.0.1:")


def test_the_key_is_private(home: Path) -> None:
    endpoint = embedded.ensure_running(home)
    key = endpoint.api_key.get_secret_value()

    assert len(key) >= 32
    assert key not in repr(endpoint)
    assert embedded.token_path(home).read_text() == key
    assert mode_of(embedded.token_path(home)) == 0o600
    assert mode_of(embedded.token_path(home).parent) == 0o700
    assert mode_of(home) == 0o700


def test_a_key_that_others_could_read_is_closed_and_kept(home: Path) -> None:
    paths = BackendPaths(home, embedded.code_version())
    paths.create()
    paths.token.write_text("an-earlier-key")
    paths.token.chmod(0o644)

    assert embedded.ensure_running(home).api_key.get_secret_value() == "an-earlier-key"
    assert mode_of(paths.token) == 0o600


def test_four_processes_at_once_get_one_backend(home: Path) -> None:
    script = (
        "from pathlib import Path; from cookbook import embedded; import sys; "
        "print(embedded.ensure_running(Path(sys.argv[1])).base_url); print(embedded.status(Path(sys.argv[1])))"
    )
    callers = [
        subprocess.Popen([sys.executable, "-c", script, str(home)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    answers = [caller.communicate(timeout=60)[0].splitlines() for caller in callers]

    assert len({base_url for base_url, _ in answers}) == 1
    assert len({line.split("supervisor_pid=")[1].split(",")[0] for _, line in answers}) == 1


def test_a_server_of_other_code_is_never_reused(home: Path, tmp_path: Path) -> None:
    ours = embedded.ensure_running(home)
    copy = tmp_path / "clone" / "cookbook"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "errors.py").open("a") as file:
        file.write("# another clone\n")
    script = (
        "from pathlib import Path; from cookbook import embedded; import sys; home = Path(sys.argv[1]); "
        "print(embedded.ensure_running(home).base_url, embedded.stop(home))"
    )
    theirs = subprocess.run(
        [sys.executable, "-c", script, str(home)], cwd=copy.parent, capture_output=True, text=True, check=True
    ).stdout.split()

    assert theirs[0] != ours.base_url
    assert theirs[1] == "True"
    assert embedded.status(home) is not None  # stopping theirs has left ours alone


def test_the_code_version_covers_every_file_that_the_backend_runs(tmp_path: Path) -> None:
    script = "from cookbook import embedded; print(embedded.code_version())"
    copy = tmp_path / "cookbook"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def version() -> str:
        return subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    before = version()
    (copy / "evaluation" / "extra.py").write_text("")  # client code: no new server for it
    assert version() == before
    seen = {before}
    for name in ("errors.py", "losses/__init__.py", "backend/paths.py", "backend/control_plane/app.py"):
        with (copy / name).open("a") as file:
            file.write("#\n")
        seen.add(version())
    assert len(seen) == 5


def test_a_port_in_use_is_an_error_that_names_its_owner(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=rf"port {port} is in use \(by process {os.getpid()}: .*\): choose"):
            embedded.ensure_running(home, port=port)


def test_the_port_asked_for_is_used_and_another_one_refused(home: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    assert embedded.ensure_running(home, port=port).base_url == f"http://127.0.0.1:{port}"
    assert embedded.ensure_running(home).base_url == f"http://127.0.0.1:{port}"
    with pytest.raises(BackendError, match=f"runs at http://127.0.0.1:{port} already, port {port + 1} was asked for"):
        embedded.ensure_running(home, port=port + 1)


def test_a_home_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=rf"{tmp_path}/file/home.*: Not a directory.*COOKBOOK_HOME"):
        embedded.ensure_running(tmp_path / "file" / "home")


def test_a_state_file_that_cannot_be_used_is_an_error_that_names_it(home: Path) -> None:
    paths = BackendPaths(home, embedded.code_version())
    paths.create()
    paths.store.write_bytes(b"this is no database" * 100)
    with pytest.raises(BackendError, match=r"state\.sqlite cannot be used: file is not a database"):
        embedded.ensure_running(home)


def test_a_supervisor_that_dies_at_its_start_shows_the_end_of_its_log(home: Path) -> None:
    paths = BackendPaths(home, embedded.code_version())
    paths.create()
    paths.token.mkdir()
    with pytest.raises(BackendError, match=r"the backend cannot use .*token: Is a directory"):
        embedded.ensure_running(home)


def test_a_supervisor_that_crashes_shows_the_end_of_its_log(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clone" / "cookbook"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "backend" / "supervisor.py").write_text("raise RuntimeError('broken clone')")
    script = "import sys, pathlib; from cookbook import embedded; embedded.ensure_running(pathlib.Path(sys.argv[1]))"
    ended = subprocess.run([sys.executable, "-c", script, str(home)], cwd=copy.parent, capture_output=True, text=True)

    assert ended.returncode == 1
    assert "BackendError: the embedded backend ended with status 1 before it answered" in ended.stderr
    assert "RuntimeError: broken clone" in ended.stderr


def test_a_killed_control_plane_comes_back_under_the_same_address(home: Path) -> None:
    endpoint = embedded.ensure_running(home)
    before = embedded.status(home)
    assert before is not None
    os.kill(before.control_plane_pid, signal.SIGKILL)

    assert embedded.ensure_running(home) == endpoint
    after = embedded.status(home)
    assert after is not None
    assert after.supervisor_pid == before.supervisor_pid
    assert after.control_plane_pid != before.control_plane_pid


def test_after_both_were_killed_a_new_backend_takes_over_address_and_key(home: Path) -> None:
    endpoint = embedded.ensure_running(home)
    state = embedded.status(home)
    assert state is not None
    for pid in (state.supervisor_pid, state.control_plane_pid):
        os.kill(pid, signal.SIGKILL)

    assert embedded.ensure_running(home) == endpoint
    assert embedded.status(home) != state


def test_a_control_plane_ends_when_only_its_supervisor_was_killed(home: Path) -> None:
    embedded.ensure_running(home)
    state = embedded.status(home)
    assert state is not None
    os.kill(state.supervisor_pid, signal.SIGKILL)

    wait_until(lambda: not pid_is_alive(state.control_plane_pid) or _is_zombie(state.control_plane_pid))
    assert embedded.status(home) is None


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_key_is_not_sent_to_whoever_took_the_port_of_a_dead_backend(home: Path) -> None:
    endpoint = embedded.ensure_running(home)
    embedded.stop(home)
    port = int(endpoint.base_url.rpartition(":")[2])
    asked: list[str] = []

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(500)

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever).start()
        assert embedded.status(home) is None
        assert embedded.ensure_running(home).base_url != endpoint.base_url
        stranger.shutdown()

    assert asked == []


def test_stop_ends_every_process_and_says_whether_there_was_one(home: Path) -> None:
    embedded.ensure_running(home)
    state = embedded.status(home)
    assert state is not None

    assert embedded.stop(home)
    wait_until(lambda: not pid_is_alive(state.supervisor_pid))
    assert not pid_is_alive(state.control_plane_pid)
    assert embedded.status(home) is None
    assert not embedded.stop(home)


def test_an_idle_backend_ends_by_itself(home: Path) -> None:
    embedded.ensure_running(home, idle_timeout_s=1.0)
    state = embedded.status(home)
    assert state is not None

    began = time.monotonic()
    # Asking for its status would keep it awake.
    wait_until(lambda: not lock_is_held(BackendPaths(home, state.version).lock))
    assert 0.5 < time.monotonic() - began < 10
