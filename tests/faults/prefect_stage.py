"""A Prefect server, a work pool with all deployments, and workers, each in a process of its own that may be killed.

The server keeps its database and its port over restarts. How a flow run is submitted, watched and brought on again is
here, each way by the calls that a person's click or command makes; what is killed when: test_prefect_kills.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

__all__ = ["CHECKOUT", "DEAD", "Stage", "flow_process", "until"]

CHECKOUT = Path(__file__).parents[2]
POOL = "cookbook"
BUSY_S = 240.0
"""Seconds within which a server that was killed, or has too much to do, answers again."""

DEAD = ("FAILED", "CRASHED", "CANCELLED")

T = Any


def until(condition: Callable[[], T], timeout_s: float, what: str, poll_s: float = 0.1) -> T:
    """Poll until the condition is true, and give its value; AssertionError after the time-out."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(poll_s)
    return value


def flow_process(log_path: Path) -> int | None:
    """The process that owns a run directory, None when none that lives does."""
    try:
        pid = int(json.loads((log_path / "run.json").read_bytes())["lease"]["pid"])
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return None if _is_zombie(pid) else pid


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return True


class Stage:
    """One Prefect server with its workers, below one folder. A context manager: everything is ended at the end."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """`environment` is added to this process's. COOKBOOK_HOME must be in it; with PREFECT_API_URL in it, the stage
        uses that server and has none of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = _free_port()
        own = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api"}
        self.environment = {
            **os.environ,
            **own,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            **environment,
        }
        self.api = self.environment["PREFECT_API_URL"]
        self.home = Path(self.environment["COOKBOOK_HOME"])
        self.workers: list[subprocess.Popen[bytes]] = []
        self._server: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(base_url=self.api, timeout=30, trust_env=False)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            _ended(worker)
        if self._server is not None:
            self._server.terminate()
            _ended(self._server)
        self._client.close()

    # -- server and workers --------------------------------------------------------------------------------------------

    def start_server(self) -> None:
        """Start the server on the stage's port and database, and wait until it answers."""
        environment = {k: v for k, v in self.environment.items() if k != "PREFECT_API_URL"}
        command = ["server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self._server = self._spawn(command, "server.log", environment)
        until(self._answers, BUSY_S, f"the Prefect server answers; see {self.folder / 'server.log'}")

    def kill_server(self) -> None:
        """SIGKILL for the server and all that belongs to it."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._server = None

    def make_pool(self) -> None:
        """Make the work pool as the README says."""
        self.prefect("work-pool", "create", POOL, "--type", "process")

    def deploy(self) -> None:
        """Deploy all of prefect.yaml as the README says. The janitor is paused: it runs only when it is told to."""
        self.prefect("--no-prompt", "deploy", "--all")
        self.call("PATCH", f"/deployments/{self.deployment('janitor')['id']}", {"paused": True})

    def start_worker(self) -> subprocess.Popen[bytes]:
        """One more worker on the pool."""
        worker = self._spawn(["worker", "start", "--pool", POOL], f"worker-{len(self.workers)}.log", self.environment)
        self.workers.append(worker)
        return worker

    def live_workers(self) -> list[subprocess.Popen[bytes]]:
        """Workers that have not ended, nor been killed."""
        return [worker for worker in self.workers if worker.poll() is None]

    def worker_of(self, flow_pid: int) -> subprocess.Popen[bytes] | None:
        """The live worker below which a flow process runs; None when its worker is gone."""
        workers = {worker.pid: worker for worker in self.live_workers()}
        pid = flow_pid
        while pid > 1 and pid not in workers:
            try:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return None
        return workers.get(pid)

    def flow_processes(self) -> list[str]:
        """Processes of flow runs of this server, the dead that nobody has waited for included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "prefect.engine" in command and self.api in (folder / "environ").read_bytes().decode():
                    found.append(f"process {folder.name}: {command}")
                elif _is_zombie(int(folder.name)) and parent in [worker.pid for worker in self.live_workers()]:
                    found.append(f"process {folder.name}: a zombie of worker {parent}")
        return found

    def prefect(self, *arguments: str, timeout_s: float = BUSY_S) -> str:
        """A `prefect` command, which must succeed; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=CHECKOUT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"prefect {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """A call of the server's API; its answer. Waits for a server that is being restarted, or whose database is
        locked; a lost answer is asked for again."""
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                answer = self._client.request(method, path, json=body)
                if answer.status_code != 503:
                    return answer.raise_for_status().json() if answer.content else None
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, f"the server answers {method} {path} with 503"
            time.sleep(0.5)

    # -- flow runs -----------------------------------------------------------------------------------------------------

    def submit(self, recipe: str, config: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> str:
        """Create a flow run of a recipe's deployment through the API; its id.

        Args:
            variables: environment variables of this flow run alone.
        """
        deployment = self.deployment(recipe)["id"]
        body: dict[str, Any] = {"parameters": {"config": dict(config)}, "state": {"type": "SCHEDULED"}}
        if variables:
            body["job_variables"] = {"env": dict(variables)}
        return str(self.call("POST", f"/deployments/{deployment}/create_flow_run", body)["id"])

    def deployment(self, recipe: str) -> dict[str, Any]:
        """A deployment as the server has it."""
        return dict(self.call("GET", f"/deployments/name/{recipe}/{recipe}"))

    def flow_run(self, run_id: str) -> dict[str, Any]:
        """The flow run as the server has it."""
        return dict(self.call("GET", f"/flow_runs/{run_id}"))

    def state(self, run_id: str) -> str:
        """Type of the flow run's state, `COMPLETED` and the like."""
        return str(self.flow_run(run_id)["state_type"])

    def history(self, run_id: str) -> list[str]:
        """Names of all states the flow run went through."""
        states = self.call("GET", f"/flow_run_states/?flow_run_id={run_id}")
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def logs(self, run_id: str) -> list[str]:
        """The newest lines of the flow run's page, the newest first."""
        body = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_DESC", "limit": 100}
        return [log["message"] for log in self.call("POST", "/logs/filter", body)]

    # -- ways to bring a flow run on -----------------------------------------------------------------------------------

    def retry_command(self, run_id: str) -> None:
        """`prefect flow-run retry`; refused unless the run's state is final."""
        self.prefect("flow-run", "retry", run_id)

    def retry_button(self, run_id: str, *, force: bool = False) -> dict[str, Any]:
        """What the UI's Retry button sends: without force in the UI of Prefect 2 and 3, with force in its new UI."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        return dict(self.call("POST", f"/flow_runs/{run_id}/set_state", {"state": state, "force": force}))

    def take_over(self, run_id: str) -> None:
        """A retry of a run that Prefect believes to run. Called dead first: the next start of a flow run that has
        retried itself is kept for its process else, and no worker takes it up."""
        self.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CRASHED"}, "force": True})
        self.retry_button(run_id)

    def retried(self, run_id: str, retry: Callable[[str], object], *, settle_s: float = 4.0) -> int:
        """Wait until all reports of a death are in, look again, retry; again where a later one undid it. How often."""
        for attempt in range(1, 5):
            time.sleep(settle_s)
            if self.state(run_id) not in DEAD:
                return attempt - 1
            retry(run_id)
            time.sleep(settle_s)
            if self.state(run_id) not in DEAD:
                return attempt
        raise AssertionError(f"flow run {run_id} was retried 4 times: {self.history(run_id)}")

    # -- below ---------------------------------------------------------------------------------------------------------

    def _answers(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, f"the server ended; see {self.folder / 'server.log'}"
        with suppress(httpx.HTTPError):
            return self._client.get("/health").status_code == 200
        return False

    def _spawn(self, arguments: list[str], log: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=CHECKOUT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _ended(process: subprocess.Popen[bytes], timeout_s: float = 15) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
