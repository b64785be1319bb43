"""`cookbook runs`: the list, and what `show` tells of a run from its directory and from a backend that runs."""

import json
import os
import shutil
import socket
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cookbook import inspection
from cookbook.cli import app
from cookbook.files import append_jsonl, write_json
from cookbook.ledger import ResourceLedger
from cookbook.rollouts.ledger import CollectedStep, RowLedger
from cookbook.rollouts.records import RejectedRow
from cookbook.rollouts.store import RolloutStore
from cookbook.run import Progress, RunDirectory, numbers_fingerprint
from tests.rollouts.groups import make_group
from tests.stopped_run import StoppedRun

CONFIG = {"backend": "embedded", "base_model": "tiny", "learning_rate": 1e-3, "seed": 0}
PROGRESS = Progress(40, 1, 320, 1320, permutation_seed=0, total_steps=100)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def cookbook(*arguments):
    """Run the command in this process: (exit status, stdout, stderr)."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def shown(run, *arguments):
    status, out, err = cookbook("runs", "show", str(run), "--json", *arguments)
    assert status == 0, err
    return json.loads(out)


def start(path, home, recipe="sft", **config):
    config = {**CONFIG, "log_path": str(path), "dataset": "rows.jsonl", **config}
    return RunDirectory.open(path, recipe=recipe, config=config, home=home)


def commit(run, progress=PROGRESS, job="job"):
    row = {"name": f"step-{progress.step}", "state_path": f"cross_job://{job}/step-{progress.step}"}
    append_jsonl(run.path / "checkpoints.jsonl", row | progress.to_loop_state())


def train_to(run, step):
    with (run.path / "metrics.jsonl").open("a") as file:
        for done in range(1, step + 1):
            file.write(json.dumps({"step": done, "time": 1e9, "train/loss": 1.0}) + "\n")


def everything(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_runs_are_listed_and_found_by_the_beginning_of_their_id_or_by_their_directory(home, tmp_path):
    assert cookbook("runs", "list")[2] == "no runs yet\n"
    with start(tmp_path / "run", home) as run:
        commit(run)
    _, out, _ = cookbook("runs", "list")
    assert run.run_id in out
    assert "stopped" in out
    assert json.loads(cookbook("runs", "list", "--json")[1])[0]["path"] == str(tmp_path / "run")
    assert shown(run.run_id[:7]) == shown("run")
    assert shown("run")["run_id"] == run.run_id
    status, _, err = cookbook("runs", "show", "rl-1")
    assert status == 2
    assert f"there is no run or run directory 'rl-1'. Choose one of: {run.run_id}." in err
    shutil.rmtree(home)
    assert shown("run")["run_id"] == run.run_id
    shutil.rmtree(tmp_path / "run")


def test_a_live_run_is_shown_with_its_owner_and_nothing_is_touched_or_started(home, tmp_path):
    with start(tmp_path / "run", home) as run:
        ResourceLedger(run).intend("trainer", "policy", 1)
        commit(run)
        train_to(run, 47)
        before = everything(tmp_path)
        status, out, _ = cookbook("runs", "show", "run")
        assert status == 0
        assert everything(tmp_path) == before
    lines = out.splitlines()
    assert lines[0] == f"Run {run.run_id}: running"
    assert any(line.startswith(f"  owner          process {os.getpid()} on ") for line in lines)
    assert "  last commit    step-40: step 40 of 100, row 320 of epoch 2, 1,320 rows taken" in lines
    assert "  backend        embedded, not asked: none of this version of the code runs" in lines
    assert "If its process died now and it were started again" in lines
    assert "  Steps 41 to 47, which ran after it, would run again, with the same numbers." in lines
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80


def test_a_run_is_never_started_then_stopped_then_finished(home, tmp_path):
    with start(tmp_path / "run", home) as run:
        pass
    assert (shown("run")["state"], shown("run")["restore"]["action"]) == ("never started", "start")
    train_to(run, 3)
    assert shown("run")["state"] == "stopped"
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')  # torn: the writer died here
    assert shown("run")["last_step"] == 3
    write_json(run.path / "summary.json", {"run_id": run.run_id})
    assert (shown("run")["state"], shown("run")["restore"]["action"]) == ("finished", "nothing")


def test_damage_is_named_with_its_line_and_what_to_do(home, tmp_path):
    with start(tmp_path / "run", home) as run:
        commit(run)
    path = run.path / "checkpoints.jsonl"
    path.write_text("oops\n" + path.read_text())
    plan = shown("run")["restore"]
    assert plan["action"] == "fail"
    assert "checkpoints.jsonl, line 1 is not a JSON object" in plan["problems"][0]
    (run.path / "run.json").write_text("{")
    status, _, err = cookbook("runs", "show", "run")
    assert (status, "run.json is damaged" in err) == (1, True)


def test_recorded_groups_count_where_they_follow_upon_the_commit_and_fit_the_config(home, tmp_path):
    with start(tmp_path / "run", home, recipe="rl", reward="numeric", kl_beta=0.0) as run:
        run.pin_data("data-1")
        commit(run, Progress(1, 0, 4, 4, permutation_seed=0, total_steps=5))
        config = json.loads((run.path / "run.json").read_text())["config"]
        store = RolloutStore(run.path / "rollouts", numbers_fingerprint(config, "data-1"))
        ledger = RowLedger(20, next_row=4, trained=4)
        for step in (1, 2):
            rows, rejected = [4 * step, 4 * step + 1], [4 * step + 2, 4 * step + 3]
            ledger = ledger.book(next_row=4 * step + 4, trained=rows, rejected=rejected)
            given_up = tuple(RejectedRow(row, row, "equal") for row in rejected)
            store.write_step(step, CollectedStep(tuple(map(make_group, rows)), given_up, ledger, "step-1"))
        train_to(run, 2)
    plan = shown("run")["restore"]
    assert (plan["recorded_steps"], plan["recorded_groups"], plan["repeated_steps"]) == (2, 4, 1)
    assert [resource["role"] for resource in plan["resources"]] == ["policy", "sampler"]
    with start(tmp_path / "run", home, recipe="rl", reward="numeric", kl_beta=0.0) as run:
        append_jsonl(
            run.path / "checkpoints.jsonl",
            {"name": "step-2", "state_path": "x/y"}
            | replace(PROGRESS, step=2, position=9, data_consumed=9).to_loop_state(),
        )
    assert shown("run")["restore"]["recorded_steps"] == 0


@pytest.mark.timeout(60)
def test_a_backend_that_runs_says_what_it_has(backend, home, tmp_path):
    run = StoppedRun(tmp_path / "run", backend)
    for step in (20, 40):
        run.write("state", f"step-{step}")
        commit(run, replace(PROGRESS, step=step), job=run.job)
    told = shown("run", "--home", str(backend.home))
    assert told["backend"] == {"name": "embedded", "problem": None}
    assert [row["on_backend"] for row in told["checkpoints"]] == ["yes", "yes"]
    assert told["resources"][0]["backend_state"] == "not there"
    assert told["restore"]["resources"][0]["text"].endswith("was asked for and is not there, it would be made")
    weights = backend.home / "checkpoints" / run.job / "state" / "step-40" / "weights"
    weights.write_bytes(weights.read_bytes()[:-1])
    told = shown("run", "--home", str(backend.home))
    assert [row["on_backend"] for row in told["checkpoints"]] == ["yes", "damaged"]
    assert (told["restore"]["checkpoint"], told["restore"]["passed_over"]) == ("step-20", ["step-40"])


def test_fireworks_is_asked_only_with_a_key_and_not_for_long(home, tmp_path, monkeypatch):
    with start(tmp_path / "run", home, backend="fireworks") as run:
        ResourceLedger(run).confirm(ResourceLedger(run).intend("trainer", "policy", 1))
    assert shown("run")["backend"]["problem"] == "FIREWORKS_API_KEY is not set"
    monkeypatch.setattr(inspection, "_ASK_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("FIREWORKS_API_KEY", "sentinel-key")
        monkeypatch.setenv("FIREWORKS_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        told = shown("run")
    assert "0 s" in told["backend"]["problem"]
    assert "sentinel-key" not in json.dumps(told)
    assert told["restore"]["resources"][0]["action"] == "find"
