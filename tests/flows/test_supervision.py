"""Which flow runs the janitor retries, on a real Prefect server; their states are made here, their processes not."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from cookbook.files import append_jsonl, write_json
from cookbook.janitor_config import JanitorConfig
from cookbook.run import RunDirectory
from tasks import supervision
from tasks.cancelling import end_cancelled_runs
from tasks.supervision import end_stale_janitors, find_dead_runs, retry_dead_runs

SETTLE_S = 0.4


class Server:
    """Flow runs of a server, made in whatever state."""

    def __init__(self, url, folder):
        self.http = httpx.Client(base_url=url, timeout=30)
        self.folder = folder
        self.flow = self.post("/flows/", name="sft")["id"]
        self.deployment = self.post("/deployments/", name=folder.name[-40:], flow_id=self.flow, paused=True)["id"]

    def post(self, path, **body):
        """As Prefect's own client does, it asks again where the server's database is locked."""
        for _ in range(50):
            answer = self.http.post(path, json=body)
            if answer.status_code != 503:
                break
            time.sleep(0.2)
        return answer.raise_for_status().json()

    def run(self, name, *states, deployed=True):
        """A flow run with a run directory of this name, that went through these states; its id."""
        body = {"parameters": {"config": {"log_path": str(self.folder / name)}}, "state": {"type": "PENDING"}}
        if deployed:
            run_id = self.post(f"/deployments/{self.deployment}/create_flow_run", **body)["id"]
        else:
            run_id = self.post("/flow_runs/", flow_id=self.flow, **body)["id"]
        for state in states:
            self.set(run_id, state)
        return run_id

    def set(self, run_id, state):
        self.post(f"/flow_runs/{run_id}/set_state", state={"type": state}, force=True)

    def state(self, run_id):
        return self.http.get(f"/flow_runs/{run_id}").json()["state"]["name"]


@pytest.fixture
def server(prefect_environment, tmp_path, monkeypatch):
    url = prefect_environment["PREFECT_API_URL"]
    monkeypatch.setattr(supervision, "RECHECK_S", 0.2)
    with temporary_settings({PREFECT_API_URL: url}):
        server = Server(url, tmp_path)
        yield server
        for run in server.post("/flow_runs/filter", deployments={"id": {"any_": [server.deployment]}}):
            server.set(run["id"], "CANCELLED")
        server.http.close()


def own(folder, name):
    return RunDirectory.open(folder / name, recipe="sft", config={}, home=folder / "home")


def stopped(folder, *names):
    for name in names:
        own(folder, name).close()


def commit(folder, name, step):
    row = {"name": f"step-{step}", "step": step, "data_consumed": 0, "state_path": f"cross_job://j/step-{step}"}
    append_jsonl(folder / name / "checkpoints.jsonl", row)


def supervise(folder, **options):
    """One turn of the supervisor: run directory -> (what is done, why), for those below this folder."""
    config = JanitorConfig(**{"settle_s": SETTLE_S, **options})
    found = [suspect for suspect in find_dead_runs.fn(config) if str(folder) in suspect.log_path]
    done = retry_dead_runs.fn(config, found)
    return {suspect.log_path.rpartition("/")[2]: (suspect.done, suspect.why) for suspect in done}


def test_only_flow_runs_whose_process_has_died_are_retried(server, tmp_path):
    stopped(tmp_path, "killed", "crashed", "finished", "terminal", "pending", "a", "b", "c", "d", "e")
    write_json(tmp_path / "finished" / "summary.json", {})
    killed = server.run("killed", "RUNNING")
    crashed = server.run("crashed", "RUNNING", "CRASHED")
    never_began = server.run("never-began", "CRASHED")
    server.run("terminal", "RUNNING", deployed=False)
    server.run("elsewhere", "RUNNING")
    untouched = [server.run("finished", "RUNNING", "CRASHED"), server.run("pending")]
    states = ("COMPLETED", "FAILED", "CANCELLED", "CANCELLING", "PAUSED")
    untouched += [server.run(name, "RUNNING", state) for name, state in zip("abcde", states, strict=True)]
    before = [server.state(run_id) for run_id in untouched]
    with own(tmp_path, "live"):
        live = server.run("live", "RUNNING")
        assert supervise(tmp_path, dry_run=True)["killed"][0] == "to be retried"
        assert server.state(killed) == "Running"
        done = supervise(tmp_path)
        assert {name: what for name, (what, _) in done.items()} == {
            "killed": "retried",
            "crashed": "retried",
            "never-began": "retried",
            "terminal": "ended",
            "elsewhere": "left",
        }
        assert "start it again" in done["terminal"][1]
        assert "on this machine" in done["elsewhere"][1]
        assert [server.state(run_id) for run_id in untouched] == before
        assert [server.state(run_id) for run_id in (killed, crashed, never_began, live)] == [
            *["AwaitingRetry"] * 3,
            "Running",
        ]
    assert set(supervise(tmp_path, retry_dead_runs=False)) == {"live", "terminal", "elsewhere"}
    assert supervise(tmp_path, pending_s=0)["pending"][0] == "retried"


def test_of_several_flow_runs_with_one_log_path_only_the_newest_counts(server, tmp_path):
    stopped(tmp_path, "run")
    first, second = server.run("run", "RUNNING", "CRASHED"), server.run("run", "RUNNING", "CRASHED")
    assert supervise(tmp_path)["run"][0] == "retried"
    assert (server.state(first), server.state(second)) == ("Crashed", "AwaitingRetry")
    server.set(second, "CANCELLED")  # somebody has decided; the first must not come back in its place
    assert supervise(tmp_path) == {}
    server.set(first, "RUNNING")
    assert supervise(tmp_path)["run"] == ("ended", "its process has died; a later flow run has the same log_path")
    assert server.state(first) == "Crashed"


def test_retries_without_a_new_commit_come_to_an_end(server, tmp_path):
    stopped(tmp_path, "run")
    run_id = server.run("run", "RUNNING", "CRASHED")
    for number in (1, 2):
        assert supervise(tmp_path, max_retries=2)["run"][1].endswith(f"it goes on from the start ({number} of 2)")
        server.set(run_id, "CRASHED")
    done, why = supervise(tmp_path, max_retries=2)["run"]
    assert done == "left"
    assert "retried 2 times without a further commit" in why
    commit(tmp_path, "run", 5)
    assert supervise(tmp_path, max_retries=2)["run"][1].endswith("from checkpoint step-5 (1 of 2)")
    noted = json.loads((tmp_path / "run" / "supervisor.json").read_text())
    assert noted == {"flow_run_id": run_id, "commit": "step-5", "retries": 1}


def test_a_janitor_that_died_with_its_worker_does_not_keep_the_next_ones_out(server, monkeypatch):
    flow = server.post("/flows/", name="janitor")["id"]
    dead, young = (server.post("/flow_runs/", flow_id=flow, state={"type": "PENDING"})["id"] for _ in range(2))
    server.set(dead, "RUNNING")
    time.sleep(1.1)
    monkeypatch.setattr(supervision, "STALE_S", 1.0)
    server.set(young, "RUNNING")
    assert end_stale_janitors.fn() == 1
    assert (server.state(dead), server.state(young)) == ("Crashed", "Running")
    server.set(young, "CANCELLED")


OWNER = """
import os, signal, sys
from pathlib import Path
from cookbook.run import RunDirectory
home, path, flow_run = sys.argv[1:]
RunDirectory.open(path, recipe="sft", config={}, home=Path(home), started_by=flow_run)
print("owned", flush=True)
signal.pause()
"""


def owned_by(folder, name, flow_run):
    """A process that owns a run for a flow run."""
    command = [sys.executable, "-c", OWNER, str(folder / "home"), str(folder / name), flow_run]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with process.stdout as output:
        assert output.readline() == b"owned\n"
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def test_a_cancellation_that_nobody_has_heard_of_is_carried_out(server, tmp_path):
    stopped(tmp_path, "dead")
    deaf, dead = server.run("deaf", "RUNNING"), server.run("dead", "RUNNING")
    replaced, young = server.run("replaced", "RUNNING"), server.run("young", "RUNNING")
    processes = [
        owned_by(tmp_path, "deaf", deaf),
        owned_by(tmp_path, "replaced", "another"),
        owned_by(tmp_path, "young", young),
    ]
    for run_id in (deaf, dead, replaced):
        server.set(run_id, "CANCELLING")
    time.sleep(1.1)
    server.set(young, "CANCELLING")

    def end(**options):
        done = end_cancelled_runs.fn(JanitorConfig(cancel_s=1, **options))
        return {Path(s.log_path).name: s.done for s in done if str(tmp_path) in s.log_path}

    assert end(dry_run=True) == dict.fromkeys(("deaf", "dead", "replaced"), "to be ended")
    assert server.state(deaf) == "Cancelling"
    assert end() == dict.fromkeys(("deaf", "dead", "replaced"), "ended")
    assert [server.state(run_id) for run_id in (deaf, dead, replaced, young)] == [*["Cancelled"] * 3, "Cancelling"]
    assert [process.poll() for process in processes] == [-signal.SIGTERM, None, None]
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def meanwhile(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    yield
    timer.join()


def test_what_changes_while_it_waits_is_left_alone(server, tmp_path):
    stopped(tmp_path, "changed", "taken")
    changed, taken = server.run("changed", "RUNNING"), server.run("taken", "RUNNING")
    owners = []

    def change():
        server.set(changed, "CANCELLING")
        owners.append(own(tmp_path, "taken"))

    with meanwhile(0.5, change):
        done = supervise(tmp_path, settle_s=1.5)
    owners[0].close()
    assert {name: what for name, (what, _) in done.items()} == {"changed": "left", "taken": "left"}
    assert (server.state(changed), server.state(taken)) == ("Cancelling", "Running")


def test_a_retry_that_a_late_report_of_the_crash_undoes_is_issued_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "RECHECK_S", 2.0)
    stopped(tmp_path, "run")
    run_id = server.run("run", "RUNNING", "CRASHED")

    def report_late():
        while server.state(run_id) != "AwaitingRetry":
            time.sleep(0.05)
        server.set(run_id, "CRASHED")

    with meanwhile(0, report_late):
        done, why = supervise(tmp_path)["run"]
    assert done == "retried"
    assert why.endswith("a late report of the crash had undone it")
    assert server.state(run_id) == "AwaitingRetry"
    assert json.loads((tmp_path / "run" / "supervisor.json").read_text())["retries"] == 1
