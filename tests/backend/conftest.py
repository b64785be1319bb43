"""A backend of its own for the tests of one file, with jobs whose workers only echo (echo_worker.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cookbook import embedded
from cookbook.backend.control_plane.store import Job, JobState, Store
from cookbook.backend.paths import BackendPaths

ECHO_WORKER = Path(__file__).with_name("echo_worker.py")
JOBS = "/v1/accounts/local/rlorTrainerJobs"
TRAINER = "/training/v1/rlorTrainerJobs/local"


@dataclass(frozen=True)
class Backend:
    """A running backend: its files, and a client that carries the token."""

    paths: BackendPaths
    endpoint: embedded.Endpoint
    client: httpx.Client

    @property
    def token(self) -> str:
        return self.endpoint.api_key.get_secret_value()

    def job(self, job_id: str) -> dict[str, object]:
        """The job as the API describes it."""
        answer = self.client.get(f"{JOBS}/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for_state(self, job_id: str, state: str, timeout_s: float = 10.0) -> dict[str, object]:
        """Wait until a job is in a state, and return the job."""
        wait_until(lambda: self.job(job_id)["state"] == state, timeout_s)
        return self.job(job_id)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Look every 20 ms until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def add_running_job(store: Store, paths: BackendPaths, job_id: str) -> None:
    """A job as an earlier control plane would have left it: recorded as running."""
    spec = {"base_model": "/nowhere", "max_context_length": 512, "inactivity_timeout_s": 900.0}
    now = time.time()
    request = {"trainingConfig": {"baseModel": "/nowhere"}}
    assert store.add_job(Job(job_id, JobState.RUNNING, "", now, now, None, request, spec))


def start_echo_worker(paths: BackendPaths, job_id: str) -> subprocess.Popen[bytes]:
    """A worker for a job, alive when this returns."""
    job_dir = paths.job_dir(job_id)
    process = subprocess.Popen(
        [sys.executable, str(ECHO_WORKER), str(job_dir)],
        cwd=Path(embedded.__file__).parents[1],
        start_new_session=True,
    )
    wait_until((job_dir / "worker.json").exists)
    return process


@pytest.fixture(scope="module")
def echo_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A backend whose jobs `echo`, `held`, `polled`, `broken`, `killed`, `cancelled`, `deleted` have an echo worker."""
    job_ids = ("echo", "held", "polled", "broken", "killed", "cancelled", "deleted")
    paths = BackendPaths(tmp_path_factory.mktemp("home"), embedded.code_version())
    paths.create()
    store = Store(paths.store)
    workers = []
    for job_id in job_ids:
        add_running_job(store, paths, job_id)
        workers.append(start_echo_worker(paths, job_id))
    store.close()
    with run_backend(paths) as backend:
        for job_id in job_ids:
            backend.wait_for_state(job_id, "JOB_STATE_RUNNING")
        yield backend
    for worker in workers:
        worker.kill()
        worker.wait()


class run_backend:
    """Start a backend on a home, and stop it at the end of a with block."""

    def __init__(self, paths: BackendPaths, **options: float) -> None:
        self._paths = paths
        self._options = options

    def __enter__(self) -> Backend:
        endpoint = embedded.ensure_running(self._paths.home, **self._options)  # type: ignore[arg-type]
        headers = {"X-Api-Key": endpoint.api_key.get_secret_value()}
        # A connection for each request: one that a killed control plane leaves behind is not what is tested.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(
            base_url=endpoint.base_url, headers=headers, timeout=60, trust_env=False, limits=limits
        )
        return Backend(self._paths, endpoint, self._client)

    def __exit__(self, *_: object) -> None:
        self._client.close()
        embedded.stop(self._paths.home)


def pid_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
