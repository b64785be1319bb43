"""Which flow runs the janitor retries, on a real Prefect server; their states are made here, their processes not."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
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


def test_a_flow_run_that_had_retried_itself_is_retried_by_any_worker(server, tmp_path):
    """Prefect keeps its next start for the process of before, unless it has been called dead."""
    stopped(tmp_path, "running", "waiting", "patient")
    runs = {name: server.run(name, "RUNNING") for name in ("running", "waiting", "patient")}
    for name in ("waiting", "patient"):
        later = {"scheduled_time": "2031-01-01T00:00:00Z"} if name == "patient" else {}
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": later}
        server.post(f"/flow_runs/{runs[name]}/set_state", state=state, force=True)
    policy = {"empirical_policy": {"retry_type": "in_process"}}
    for run in runs.values():
        server.http.patch(f"/flow_runs/{run}", json=policy).raise_for_status()
    time.sleep(1.1)
    done = supervise(tmp_path, pending_s=1)
    assert {name: what for name, (what, _) in done.items()} == dict.fromkeys(("running", "waiting"), "retried")
    found = {name: server.http.get(f"/flow_runs/{run}").json() for name, run in runs.items()}
    kept_for = {name: run["empirical_policy"]["retry_type"] for name, run in found.items()}
    assert kept_for == {"running": "reschedule", "waiting": "reschedule", "patient": "in_process"}


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
import signal, sys, time
from pathlib import Path
from cookbook.run import RunDirectory
home, path, flow_run, ends = sys.argv[1:]
def told(*_):
    with open(path + ".told", "a") as file:
        file.write("told\\n")
signal.signal(signal.SIGTERM, signal.SIG_DFL if ends == "ends" else told)
RunDirectory.open(path, recipe="sft", config={}, home=Path(home), started_by=flow_run)
print("owned", flush=True)
while True:
    time.sleep(60)
"""


def owned_by(folder, name, flow_run, *, ends=True):
    """A process that owns a run for a flow run; told to stop, it ends, or only notes that it was."""
    command = [sys.executable, "-c", OWNER, str(folder / "home"), str(folder / name), flow_run, "ends" if ends else ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with process.stdout as output:
        assert output.readline() == b"owned\n"
    threading.Thread(target=process.wait, daemon=True).start()
    return process


@contextmanager
def killed_at_end(*processes):
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def end(folder, **options):
    """What one janitor does about cancelled flow runs below this folder: run directory -> (what is done, why)."""
    done = end_cancelled_runs.fn(JanitorConfig(**{"cancel_s": 1, **options}))
    return {Path(s.log_path).name: (s.done, s.why) for s in done if str(folder) in s.log_path}


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

    due = dict.fromkeys(("deaf", "dead", "replaced"))
    with killed_at_end(*processes):
        assert {name: what for name, (what, _) in end(tmp_path, dry_run=True).items()} == dict.fromkeys(
            due, "to be ended"
        )
        assert server.state(deaf) == "Cancelling"
        assert {name: what for name, (what, _) in end(tmp_path).items()} == dict.fromkeys(due, "ended")
        assert [server.state(run_id) for run_id in (deaf, dead, replaced, young)] == [*["Cancelled"] * 3, "Cancelling"]
        assert [process.poll() for process in processes] == [-signal.SIGTERM, None, None]


def test_a_process_is_told_to_stop_once_by_however_many_janitors(server, tmp_path):
    """A second signal would break off the save that the first one began."""
    run_id = server.run("run", "RUNNING")
    process = owned_by(tmp_path, "run", run_id, ends=False)
    server.set(run_id, "CANCELLING")
    time.sleep(1.1)
    with killed_at_end(process):
        with ThreadPoolExecutor(3) as janitors:
            turns = [janitors.submit(copy_context().run, end, tmp_path) for _ in range(3)]
            done = [turn.result()["run"] for turn in turns]
        done.append(end(tmp_path)["run"])  # the next one, minutes later
        assert (tmp_path / "run.told").read_text() == "told\n"
    assert {what for what, _ in done} == {"left"}
    assert all(why.endswith("was told to stop, and has not ended yet") for _, why in done)
    assert server.state(run_id) == "Cancelling"
    assert end(tmp_path)["run"][0] == "ended"


@pytest.mark.parametrize("ending", [("CANCELLED", "SCHEDULED"), ("COMPLETED",), ("CANCELLED", "RUNNING", "CRASHED")])
def test_what_has_become_of_a_cancelled_run_meanwhile_stands(server, tmp_path, ending):
    """Its own end, or a retry by somebody: before its turn comes, and while its process is waited for."""
    first, run_id, busy = (server.run(name, "RUNNING") for name in ("first", "run", "busy"))
    processes = [owned_by(tmp_path, "first", first, ends=False), owned_by(tmp_path, "run", run_id)]
    processes.append(owned_by(tmp_path, "busy", busy, ends=False))
    for cancelled in (first, run_id, busy):
        server.set(cancelled, "CANCELLING")
    time.sleep(1.6)

    def go_on():
        for state in ending:
            server.set(run_id, state)

    def end_busy():
        for state in ending:
            server.set(busy, state)
        processes[2].kill()

    with killed_at_end(*processes), meanwhile(0.7, go_on), meanwhile(2.5, end_busy):
        done = end(tmp_path, cancel_s=1.5)
        assert processes[1].poll() is None, "a process was told to stop for what is no longer cancelled"
    assert {name: what for name, (what, _) in done.items()} == dict.fromkeys(("first", "run", "busy"), "left")
    assert [server.state(cancelled).upper() for cancelled in (run_id, busy)] == [ending[-1]] * 2


def test_a_process_that_reports_its_end_as_a_crash_was_cancelled(server, tmp_path):
    """So Prefect calls it, when SIGTERM does not come from the worker."""
    run_id = server.run("run", "RUNNING")
    process = owned_by(tmp_path, "run", run_id, ends=False)
    server.set(run_id, "CANCELLING")
    time.sleep(1.1)

    def crash():
        server.set(run_id, "CRASHED")
        process.kill()

    with killed_at_end(process), meanwhile(0.5, crash):
        assert end(tmp_path)["run"][0] == "ended"
    assert server.state(run_id) == "Cancelled"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="whose the lock is can be told on Linux only")
def test_only_the_process_that_holds_the_lock_is_told_to_stop(server, tmp_path):
    """The pid in the lock may be that of another process: in another container, or before a new owner has written."""
    run_id = server.run("run", "RUNNING")
    owner, innocent = owned_by(tmp_path, "run", run_id), owned_by(tmp_path, "other", "another")
    lock = tmp_path / "run" / ".lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "pid": innocent.pid}))
    server.set(run_id, "CANCELLING")
    time.sleep(1.1)
    with killed_at_end(owner, innocent):
        done, why = end(tmp_path)["run"]
        assert (owner.poll(), innocent.poll()) == (None, None)
    assert done == "left"
    assert f"process {innocent.pid}" in why
    assert server.state(run_id) == "Cancelling"


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


def test_a_retried_run_that_starts_and_crashes_at_once_is_left_for_the_next_turn_which_counts_it(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(supervision, "RECHECK_S", 2.0)
    stopped(tmp_path, "run")
    run_id = server.run("run", "RUNNING", "CRASHED")

    def start_and_crash():
        while server.state(run_id) != "AwaitingRetry":
            time.sleep(0.05)
        for state in ("PENDING", "RUNNING", "CRASHED"):
            server.set(run_id, state)

    with meanwhile(0, start_and_crash):
        done, why = supervise(tmp_path)["run"]
    assert done == "retried"
    assert why.endswith("it has crashed again since")
    assert server.state(run_id) == "Crashed"
    assert supervise(tmp_path)["run"][1].endswith("(2 of 3)")
