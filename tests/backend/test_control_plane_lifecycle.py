"""Jobs across deaths: of workers, of the control plane, of the whole backend. The workers here only echo."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cookbook import embedded
from cookbook.backend.control_plane import workers
from cookbook.backend.control_plane.store import JobState, Store
from cookbook.backend.paths import BackendPaths, lock_is_held, write_json
from tests.backend.conftest import JOBS, TRAINER, add_running_job, run_backend, start_echo_worker, wait_until


@pytest.fixture
def paths(tmp_path: Path) -> BackendPaths:
    """A home with two jobs recorded as running, `one` and `two`, and no process."""
    made = BackendPaths(tmp_path / "home", embedded.code_version())
    made.create()
    store = Store(made.store)
    add_running_job(store, made, "one")
    add_running_job(store, made, "two")
    store.close()
    return made


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to end after the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def control_plane_pid(paths: BackendPaths) -> int:
    state = embedded.status(paths.home)
    assert state is not None
    return state.control_plane_pid


def test_workers_survive_a_killed_control_plane(paths: BackendPaths, started: list[subprocess.Popen[bytes]]) -> None:
    started.append(start_echo_worker(paths, "one"))
    with run_backend(paths) as backend:
        backend.wait_for_state("one", "JOB_STATE_RUNNING")
        killed = control_plane_pid(paths)
        os.kill(killed, signal.SIGKILL)

        backend.wait_for_state("one", "JOB_STATE_RUNNING")
        assert control_plane_pid(paths) != killed
        assert started[0].poll() is None
        assert backend.client.get(f"{TRAINER}/one/api/v1/healthz").status_code == 200


def test_after_the_whole_backend_was_killed_live_workers_are_taken_up_and_dead_ones_failed(
    paths: BackendPaths, started: list[subprocess.Popen[bytes]]
) -> None:
    started += [start_echo_worker(paths, "one"), start_echo_worker(paths, "two")]
    with run_backend(paths) as backend:
        for job_id in ("one", "two"):
            backend.wait_for_state(job_id, "JOB_STATE_RUNNING")
        state = embedded.status(paths.home)
        assert state is not None
        for pid in (state.supervisor_pid, state.control_plane_pid, started[1].pid):
            os.kill(pid, signal.SIGKILL)
    half_written = {job_id: paths.checkpoints / job_id / "state" / ".writing-a" for job_id in ("one", "two")}
    half_deleted = paths.checkpoints / "two" / "sampler" / ".deleting-b"
    for folder in (*half_written.values(), half_deleted):
        folder.mkdir(parents=True)

    with run_backend(paths) as backend:
        backend.wait_for_state("one", "JOB_STATE_RUNNING")
        assert backend.job("two")["state"] == "JOB_STATE_FAILED"
        wait_until(lambda: not half_written["two"].exists() and not half_deleted.exists())
        assert half_written["one"].exists(), "its worker lives, and may be writing it"
        assert started[0].poll() is None
        assert backend.client.get(f"{TRAINER}/one/api/v1/healthz").status_code == 200
        assert backend.client.get(f"{TRAINER}/two/api/v1/healthz").status_code == 410


def test_a_pid_that_now_belongs_to_another_process_is_no_worker(
    paths: BackendPaths, started: list[subprocess.Popen[bytes]]
) -> None:
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started.append(innocent)
    paths.job_dir("one").mkdir()
    (paths.job_dir("one") / "worker.lock").touch()
    write_json(paths.job_dir("one") / "worker.json", {"pid": innocent.pid, "port": 1})

    with run_backend(paths) as backend:
        assert backend.job("one")["state"] == "JOB_STATE_FAILED"
        backend.client.post(f"{JOBS}/one:cancel")
        backend.client.delete(f"{JOBS}/one")
    assert innocent.poll() is None


def test_a_worker_that_ends_by_itself_cancels_its_job_with_its_reason(
    paths: BackendPaths, started: list[subprocess.Popen[bytes]]
) -> None:
    started.append(start_echo_worker(paths, "one"))
    with run_backend(paths) as backend:
        backend.wait_for_state("one", "JOB_STATE_RUNNING")
        started[0].terminate()  # the echo worker's way of ending on purpose

        job = backend.wait_for_state("one", "JOB_STATE_CANCELLED")
        assert job["statusMessage"] == f"told to end by signal {signal.SIGTERM:d}"
        assert backend.client.get(f"{TRAINER}/one/api/v1/healthz").status_code == 410


def test_stop_ends_the_workers_and_the_jobs_say_so(paths: BackendPaths, started: list[subprocess.Popen[bytes]]) -> None:
    started += [start_echo_worker(paths, "one"), start_echo_worker(paths, "two")]
    with run_backend(paths) as backend:
        for job_id in ("one", "two"):
            backend.wait_for_state(job_id, "JOB_STATE_RUNNING")

    assert [worker.wait(timeout=5) for worker in started] == [0, 0]
    store = Store(paths.store)
    assert {(job.state, job.status_message) for job in store.jobs()} == {
        (JobState.CANCELLED, "the embedded backend was stopped")
    }
    store.close()


def test_a_worker_that_will_not_end_is_killed(
    paths: BackendPaths, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_TERM_GRACE_S", 0.3)
    started.append(start_echo_worker(paths, "one"))
    os.kill(started[0].pid, signal.SIGSTOP)  # deaf to SIGTERM

    asyncio.run(workers.terminate(paths.job_dir("one"), None))

    assert started[0].wait(timeout=1) == -signal.SIGKILL


def test_a_worker_left_over_from_a_killed_cancel_is_ended(
    paths: BackendPaths, started: list[subprocess.Popen[bytes]]
) -> None:
    started.append(start_echo_worker(paths, "one"))
    store = Store(paths.store)
    job = store.job("one")
    assert job is not None
    store.set_state(job, JobState.CANCELLED, "cancelled on request")
    store.close()

    with run_backend(paths) as backend:
        assert started[0].wait(timeout=10) == 0
        assert backend.job("one")["statusMessage"] == "cancelled on request"


def test_a_backend_with_a_running_job_is_not_idle(paths: BackendPaths, started: list[subprocess.Popen[bytes]]) -> None:
    started.append(start_echo_worker(paths, "one"))
    with run_backend(paths, idle_timeout_s=0.5):
        time.sleep(2.0)
        assert lock_is_held(paths.lock)
        started[0].terminate()
        wait_until(lambda: not lock_is_held(paths.lock))


def test_jobs_are_listed_with_what_a_janitor_needs(paths: BackendPaths, started: list[subprocess.Popen[bytes]]) -> None:
    started.append(start_echo_worker(paths, "one"))
    with run_backend(paths) as backend:
        jobs = backend.client.get(JOBS).json()["rlorTrainerJobs"]

    assert [job["name"].rpartition("/")[2] for job in jobs] == ["one", "two"]
    assert jobs[1]["state"] == "JOB_STATE_FAILED"
    assert jobs[0]["createTime"] <= jobs[1]["createTime"]
    assert jobs[0]["metadata"]["jobDir"] == str(paths.job_dir("one"))


@pytest.mark.parametrize(
    ("log", "returncode", "message"),
    [
        (
            "Traceback (most recent call last):\n  File x\nValueError: bad rank\nbye\n",
            1,
            "exit status 1: ValueError: bad",
        ),
        ("error: unknown extra argument --x\n", 2, "exit status 2: unknown extra argument --x"),
        ("a.b.ModelError: no weights\n", 1, "exit status 1: a.b.ModelError: no weights"),
        ("loading\n", -9, "was killed by SIGKILL: loading"),
        ("", None, "ended unexpectedly: it wrote nothing"),
    ],
)
def test_a_dead_worker_is_described_by_its_last_error(
    tmp_path: Path, log: str, returncode: int | None, message: str
) -> None:
    earlier = "--- worker started then\nOSError: from an earlier start\n"
    (tmp_path / "worker.log").write_text(f"{earlier}--- worker started now\n{log}")

    end = workers.end_of(tmp_path, returncode)

    assert not end.on_purpose
    assert message in end.message
    assert str(tmp_path / "worker.log") in end.message
