"""The janitor on the real backend: what it frees, what it must never touch, and that it may be killed anywhere."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from fireworks.training.sdk import DeploymentConfig, TrainerJobConfig
from typer.testing import CliRunner

from cookbook import embedded
from cookbook.cli import app
from cookbook.control_plane import ControlPlane
from cookbook.errors import LeaseLost
from cookbook.files import write_json
from cookbook.janitor import survey, sweep
from cookbook.ledger import ResourceLedger, read_resources
from cookbook.run import JANITOR, RunDirectory, list_runs
from cookbook.sessions import open_session
from tests.running_backend import MODEL

QUICK = ["--compute-dtype=float32", "--threads=1"]
STOPPED, DELETED = "JOB_STATE_CANCELLED", "JOB_STATE_DELETED"
LIVE = ("JOB_STATE_CREATING", "JOB_STATE_RUNNING")


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


class Home:
    """A COOKBOOK_HOME of its own, whose runs own trainers and deployments of the session's backend."""

    def __init__(self, folder, control):
        self.path, self.control = folder, control
        self.made = []

    def run(self, name, **config):
        config = {"backend": "embedded", "base_model": "tiny", **config}
        return RunDirectory.open(self.path / name, recipe="sft", config=config, home=self.path)

    def trainer(self, run, *, live=True):
        """A trainer in the run's ledger, that is starting, or was stopped while it did: a start takes seconds."""
        ledger = ResourceLedger(run)
        job_id = ledger.intend("trainer", "policy", 1).resource_id
        self.made.append(("trainer", job_id))
        config = TrainerJobConfig(base_model=MODEL, requested_job_id=job_id, extra_args=QUICK)
        create = threading.Thread(target=lambda: self.control.jobs.create(config))
        create.start()  # answered once it has started
        while self.control.job(job_id) is None:
            time.sleep(0.01)
        ledger.confirm(ledger.current("policy"))
        if not live:
            self.control.cancel(job_id)
            create.join()
        return job_id

    def deployment(self, run, role="sampler"):
        ledger = ResourceLedger(run)
        record = ledger.intend("deployment", role, 1, resource_id=f"tiny-{run.run_id}-{role}")
        self.create_deployment(record.resource_id)
        ledger.confirm(record)
        return record.resource_id

    def create_deployment(self, name):
        """Scaled to zero: there, without a process that serves."""
        self.made.append(("deployment", name))
        config = DeploymentConfig(
            deployment_id=name, base_model=MODEL, accelerator_type="CPU", accept_shapeless_risk=True,
            min_replica_count=0, max_replica_count=0,
        )  # fmt: skip
        self.control.deployments.create_or_get(config)

    def state(self, job_id):
        return self.control.job(job_id)["state"]

    def findings(self, **options):
        """Of this home: id -> (action, reason)."""
        found = survey(self.path, self.control, **{"grace_s": 0, **options})
        return {finding.resource_id: (finding.action, finding.reason) for finding in found if finding.run_id}

    def sweep(self, **options):
        return sweep(self.path, self.control, **{"grace_s": 0, **options})

    def age(self, run_path, seconds):
        """As if everything in a ledger had been written so long ago."""
        path = run_path / "resources.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        past = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")
        path.write_text("".join(json.dumps({**row, "time": past}) + "\n" for row in rows))


@pytest.fixture
def home(tmp_path, control):
    home = Home(tmp_path, control)
    yield home
    for kind, name in home.made:
        (control.delete_deployment if kind == "deployment" else control.delete)(name)


def test_what_a_stopped_run_holds_is_freed_and_a_finished_one_leaves_nothing(home, control):
    with home.run("stopped") as run:
        trainer, deployment = home.trainer(run), home.deployment(run)
    with home.run("finished") as run:
        old = home.trainer(run, live=False)
        write_json(run.path / "summary.json", {})
    with home.run("live") as live:
        working, sampling = home.trainer(live, live=False), home.deployment(live)
        home.create_deployment("foreign-deployment")
        before = home.findings()
        assert before == {
            trainer: ("cancel", "its run has stopped"),
            deployment: ("delete", "its run has stopped"),
            old: ("delete", "its run has finished"),
            working: ("keep", "its run is live"),
            sampling: ("keep", "its run is live"),
        }
        assert home.sweep(dry_run=True).freed == ()
        assert home.state(trainer) in LIVE

        report = home.sweep()
        assert {finding.resource_id for finding in report.freed} == {trainer, deployment, old}
        assert report.left == report.problems == ()
        assert (home.state(trainer), home.state(old), home.state(working)) == (STOPPED, DELETED, STOPPED)
        assert control.deployment(deployment) is None
        assert control.deployment(sampling) is not None
        assert control.deployment("foreign-deployment") is not None
        assert {r.resource_id: r.state for r in read_resources(home.path / "stopped")} == {
            trainer: "confirmed",  # the run resumes it
            deployment: "freed",
        }
        assert read_resources(home.path / "finished")[0].state == "freed"
        assert home.sweep().freed == ()
        assert home.findings()[trainer] == ("keep", "its run has stopped, and can resume it")


def test_foreign_things_are_named_and_left_alone(home, trainer):
    found = {finding.resource_id: finding for finding in survey(home.path, home.control, grace_s=0)}
    assert (found[trainer].action, found[trainer].run_id) == ("keep", None)
    home.sweep()
    assert home.state(trainer) in LIVE


def test_what_another_run_has_adopted_or_needs_is_not_deleted(home, control):
    with home.run("first") as run:
        adopted, served = home.trainer(run), home.deployment(run)
        write_json(run.path / "summary.json", {})
    with home.run("base") as run:
        needed = home.trainer(run, live=False)
        write_json(run.path / "summary.json", {})
    config = {"policy_job_id": adopted, "deployment": {"deployment_id": served}, "init_from_checkpoint": f"{needed}:a"}
    with home.run("second", **config) as second:
        found = home.findings()
        assert {found[name] for name in (adopted, served, needed)} == {("keep", f"run {second.run_id} uses it")}
        assert home.sweep().freed == ()
    found = home.findings()
    assert {found[name] for name in (served, needed)} == {("keep", f"run {second.run_id} uses it")}
    assert [(finding.resource_id, finding.action) for finding in home.sweep().freed] == [(adopted, "cancel")]
    write_json(home.path / "second" / "summary.json", {})
    assert {home.findings()[name][0] for name in (adopted, served, needed)} == {"delete"}


def test_a_fresh_intent_is_left_alone_for_a_while(home, control):
    with home.run("run") as run:
        record = ResourceLedger(run).intend("deployment", "sampler", 1, resource_id=f"tiny-{run.run_id}")
    assert home.findings(grace_s=60) == {record.resource_id: ("keep", "just asked for: it may come yet")}
    home.create_deployment(record.resource_id)  # the request was on its way when its sender was killed
    assert home.findings(grace_s=60) == {record.resource_id: ("keep", "just asked for")}
    home.age(run.path, 61)
    assert home.findings(grace_s=60)[record.resource_id][0] == "delete"
    assert [finding.resource_id for finding in home.sweep(grace_s=60).freed] == [record.resource_id]
    assert read_resources(run.path)[0].state == "freed"


def test_of_a_run_whose_directory_is_gone_only_what_has_its_id_is_freed(home, control):
    with home.run("run") as run:
        trainer, deployment = home.trainer(run), home.deployment(run)
        longer = f"{trainer[: -len('-policy-g1')]}0-policy-g1"  # of another run, whose id only begins alike
    for name in ("run.json", "resources.jsonl"):
        (run.path / name).unlink()
    home.create_deployment(f"tiny-{longer}")
    report = home.sweep()
    assert {(finding.resource_id, finding.action) for finding in report.freed} == {
        (trainer, "cancel"),  # the directory may come back
        (deployment, "delete"),
    }
    assert control.deployment(f"tiny-{longer}") is not None


def test_a_damaged_record_is_reported_and_stops_nothing_else(home, control):
    with home.run("damaged") as run:
        kept = home.deployment(run)
    with (run.path / "resources.jsonl").open("a") as file:
        file.write("not json\n{}\n")
    (home.path / "runs" / "sft-00000000.json").write_text("{")
    with home.run("stopped") as other:
        freed = home.deployment(other)
    report = home.sweep()
    assert [finding.resource_id for finding in report.freed] == [freed]
    assert len(report.problems) == 2
    assert any("resources.jsonl, line 3" in problem for problem in report.problems)
    assert home.findings()[kept] == ("keep", "the record of its run is damaged")
    assert json.loads(json.dumps(report.to_dict()))["problems"] == list(report.problems)


def test_a_session_that_was_killed_is_removed_and_a_live_one_stays(home, control):
    with open_session("chat", control, home.path) as live:
        kept = home.deployment(live.run, role="deployment")
        folder = home.path / "sessions" / "serve-1"
        with RunDirectory.open(folder, recipe="serve", config={"backend": "embedded"}, home=home.path) as killed:
            freed = home.deployment(killed, role="model-1")
        with RunDirectory.open(
            folder.with_name("chat-2"), recipe="chat", config={"backend": "embedded"}, home=home.path
        ):
            pass  # killed before it had anything
        report = home.sweep()
        assert [finding.resource_id for finding in report.freed] == [freed]
        assert len(report.sessions) == 2
        assert [run.run_id for run in list_runs(home.path)] == [live.run.run_id]
        assert not folder.exists()
        assert home.findings() == {kept: ("keep", "its session is live")}


def test_a_run_directory_called_sessions_is_not_removed(home):
    path, config = home.path / "x" / "sessions" / "a", {"backend": "embedded"}
    with RunDirectory.open(path, recipe="chat", config=config, home=home.path) as run:
        pass
    home.sweep()
    assert run.path.exists()


KILLED = """
import os, sys
from pathlib import Path
from cookbook.config import environment
from cookbook.control_plane import ControlPlane
from cookbook.janitor import sweep

class Killed(ControlPlane):
    def delete_deployment(self, *arguments):
        super().delete_deployment(*arguments)
        os.kill(os.getpid(), 9)

url, key, home = sys.argv[1:]
sweep(Path(home), Killed("embedded", url, key, Path(home)), grace_s=0)
"""


def test_a_sweep_that_is_killed_is_finished_by_the_next(home, backend, control):
    with home.run("run") as run:
        deployments = [home.deployment(run, role) for role in ("sampler", "other")]
    command = [sys.executable, "-c", KILLED, backend.base_url, backend.api_key, str(home.path)]
    done = subprocess.run(command, check=False, timeout=60, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert [control.deployment(name) is None for name in deployments] == [True, False]
    report = home.sweep()
    assert [finding.resource_id for finding in report.freed] == deployments[1:]
    assert home.findings() == {}


def test_a_run_that_starts_waits_for_the_janitor_and_not_for_another_run(home):
    with home.run("run"):
        pass
    path = home.path / "run"
    config = {"backend": "embedded", "base_model": "tiny"}
    janitor = RunDirectory.open(path, recipe="sft", config=config, home=home.path, owner=JANITOR)
    threading.Timer(1.5, janitor.close).start()
    started = time.monotonic()
    with home.run("run") as run:
        assert time.monotonic() - started > 1.2
        with pytest.raises(LeaseLost, match="is owned by process"):  # and never the other way round
            RunDirectory.open(path, recipe="sft", config=config, home=home.path, owner=JANITOR)
        with pytest.raises(LeaseLost, match="is owned by process"):
            home.run("run")
        assert run.epoch == 3


class Watched(ControlPlane):
    """Calls back after it has listed deployments, and before it deletes one."""

    listed = deleting = staticmethod(lambda: None)

    def list_deployments(self, timeout_s=60.0):
        found = super().list_deployments(timeout_s)
        self.listed()
        return found

    def delete_deployment(self, *arguments):
        self.deleting()
        return super().delete_deployment(*arguments)


@pytest.fixture
def watched(home, control):
    with Watched("embedded", control.base_url, control.jobs.api_key, home.path) as watched:
        yield watched


def test_what_a_run_begins_to_own_or_use_after_it_was_looked_at_is_kept(home, control, watched):
    with home.run("run") as run:
        own = home.deployment(run)
    with home.run("other") as other:
        adopted = home.deployment(other)
    starts = ExitStack()

    def start():
        starts.enter_context(home.run("run"))
        starts.enter_context(home.run("third", deployment={"deployment_id": adopted}))

    watched.listed = start
    with starts:
        report = sweep(home.path, watched, grace_s=0)
        assert report.freed == ()
        assert [(finding.resource_id, why) for finding, why in report.left] == [
            (own, "a process has taken the run over meanwhile")
        ]
        assert None not in (control.deployment(own), control.deployment(adopted))


def test_a_run_whose_directory_was_moved_and_that_is_started_there_is_kept(home, control, watched):
    with home.run("run") as run:
        names = [home.deployment(run, role) for role in ("sampler", "other")]
    (home.path / "run").rename(home.path / "away")
    starts = ExitStack()

    def start():
        (home.path / "away").rename(home.path / "moved")
        starts.enter_context(home.run("moved"))

    watched.deleting = start
    with starts:
        report = sweep(home.path, watched, grace_s=0)
        freed, left = report.freed, report.left
        assert [finding.resource_id for finding in freed] == names[:1], "the one that was being freed already"
        assert [(finding.resource_id, why) for finding, why in left] == [
            (names[1], "a process has taken the run over meanwhile")
        ]
        assert control.deployment(names[1]) is not None


def test_what_another_run_adopts_of_one_that_is_gone_is_kept(home, control, watched):
    with home.run("run") as run:
        adopted = home.deployment(run)
    (home.path / "run").rename(home.path / "away")
    starts = ExitStack()
    watched.listed = lambda: starts.enter_context(home.run("other", deployment={"deployment_id": adopted}))
    with starts:
        assert sweep(home.path, watched, grace_s=0).freed == ()
        assert control.deployment(adopted) is not None


def test_a_run_that_starts_while_it_is_being_freed_waits_for_that(home, control, watched):
    with home.run("run") as run:
        deployment = home.deployment(run)
    found = []

    def start():
        with home.run("run") as started:
            found.append([record.state for record in ResourceLedger(started).all()])

    starting = threading.Thread(target=start)

    def deleting():
        starting.start()
        time.sleep(1.3)  # longer than a run waits for another run

    watched.deleting = deleting
    report = sweep(home.path, watched, grace_s=0)
    starting.join()
    assert [finding.resource_id for finding in report.freed] == [deployment]
    assert found == [["freed"]]


def test_the_command_shows_what_it_finds_and_does(backend, control, trainer, tmp_path):
    def janitor(*arguments):
        done = CliRunner().invoke(app, ["janitor", "--home", str(backend.home), "--grace", "0", *arguments])
        return done.exit_code, done.stdout, done.stderr

    shared = Home(backend.home, control)
    config = {"backend": "embedded", "base_model": "tiny"}
    with RunDirectory.open(tmp_path / "run", recipe="sft", config=config, home=backend.home) as run:
        deployment = shared.deployment(run)
    status, shown, _ = janitor("--dry-run")
    line = next(line for line in shown.splitlines() if deployment in line)
    assert status == 0
    assert re.fullmatch(
        rf"embedded +deployment {deployment} +ready +{run.run_id} +to be deleted +its run has stopped", line
    )
    status, shown, notes = janitor()
    assert "to be deleted" not in shown
    assert re.search(rf"{deployment} .* deleted ", shown)
    assert "more that no run of this home has asked for; left alone" in notes  # the trainer that tests share
    (backend.home / "runs" / "sft-00000000.json").write_text("{")
    try:
        status, shown, _ = janitor("--json")
    finally:
        (backend.home / "runs" / "sft-00000000.json").unlink()
    assert (status, len(json.loads(shown)[0]["problems"])) == (1, 1)
    done = CliRunner().invoke(app, ["janitor", "--home", str(tmp_path / "other"), "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (0, [])
    assert embedded.status(tmp_path / "other") is None, "a backend was started to find that nothing is there"


def test_whether_workers_live_is_known_without_asking_the_backend(backend, trainer, tmp_path):
    assert embedded.has_workers(backend.home)
    assert not embedded.has_workers(tmp_path)
    record = tmp_path / "backend" / embedded.code_version() / "jobs" / "a" / "worker.json"
    record.parent.mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    record.write_text(json.dumps({"pid": ended.pid, "port": 1}))
    assert not embedded.has_workers(tmp_path)
    record.write_text(json.dumps({"pid": os.getpid(), "port": 1}))
    assert embedded.has_workers(tmp_path)


def test_the_flow_is_scheduled_in_a_queue_of_its_own():
    deployments = yaml.safe_load((Path(__file__).parents[1] / "prefect.yaml").read_text())["deployments"]
    janitor = next(deployment for deployment in deployments if deployment["name"] == "janitor")
    assert [schedule["interval"] for schedule in janitor["schedules"]] == [300]
    assert janitor["concurrency_limit"] == {"limit": 3, "collision_strategy": "CANCEL_NEW"}
    others = {deployment["work_pool"].get("work_queue_name") for deployment in deployments if deployment != janitor}
    assert janitor["work_pool"]["work_queue_name"] not in others
