"""Pruning: which checkpoints stay, what is deleted with the others, and that a kill in between costs nothing.

Snapshots are real files in the home of the real backend; where their content matters, a real trainer wrote them.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from fireworks.training.sdk import AdamParams

from cookbook.backend.snapshots import SnapshotHold, snapshot_dir
from cookbook.checkpoints import CheckpointKind, resolve_resume, save_checkpoint
from cookbook.client import ReconnectableClient
from cookbook.control_plane import ControlPlane
from cookbook.data.datums import datum_from_row
from cookbook.errors import CheckpointError, DataError, LeaseLost, ProvisioningError
from cookbook.files import append_jsonl
from cookbook.retention import RetentionPolicy, check_prunable, own_run, plan_prune, prune
from cookbook.run import RunDirectory
from cookbook.snapshots import SnapshotRef, StoredRun
from tests.running_backend import MODEL
from tests.stopped_run import SIZE, StoppedRun


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


class PrunedRun(StoppedRun):
    """A stopped run, to be pruned."""

    def plan(self, control, last, every=None, keep=()):
        return plan_prune(control, self.path, RetentionPolicy(last, every), home=self.home, keep=keep)

    def prune(self, control, last, every=None):
        with own_run(StoredRun.read(self.path), self.home) as directory:
            return prune(control, directory, self.plan(control, last, every))


@pytest.fixture
def make_run(backend, tmp_path):
    """Makes runs; gone at the end, as what a run names is kept in all runs of the home."""
    yield lambda name="run", **config: PrunedRun(tmp_path / name, backend, **config)
    shutil.rmtree(tmp_path)


@pytest.fixture
def run(make_run):
    made = make_run()
    for step in range(1, 7):
        made.commit(step)
    return made


def states(*steps):
    return [f"state/step-{step}" for step in steps]


def test_the_last_n_and_every_kth_stay_and_the_rest_is_freed(run, control):
    lines = (run.path / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    result = run.prune(control, 2, 3)
    assert (run.path / "checkpoints.jsonl").read_bytes() == b"".join([lines[2], *lines[4:]])  # as they were written
    assert run.there() == states(3, 5, 6)
    assert result.rows == ("step-1", "step-2", "step-4")
    assert (result.freed_bytes, result.left) == (3 * SIZE, ())
    assert run.prune(control, 2, 3).rows == ()
    assert not (run.path / "pruning.json").exists()


def test_a_plan_says_why_and_touches_nothing(run, control):
    run.write("sampler", "step-6-1-aaaabbbb")
    plan = run.plan(control, 2, 3)
    assert plan.kept == {
        "step-3": "step 3 is a multiple of 3",
        "step-5": "one of the last 2",
        "step-6": "the last commit",
    }
    assert [row.name for row in plan.rows] == ["step-1", "step-2", "step-4"]
    assert (len(plan.snapshots), plan.size_bytes) == (4, 4 * SIZE)
    assert run.there() == ["sampler/step-6-1-aaaabbbb", *states(*range(1, 7))]
    assert sorted(path.name for path in run.path.iterdir() if not path.name.startswith(".")) == [
        *("checkpoints.jsonl", "resources.jsonl", "run.json")
    ]


def test_the_last_commit_and_the_last_promotable_row_always_stay(make_run, control):
    run = make_run()
    for step, kind in ((1, "both"), (2, "both"), (3, "state"), (4, "state"), (5, "sampler"), (6, "sampler")):
        run.commit(step, kind)
    assert run.prune(control, 1).rows == ("step-1", "step-2", "step-3", "step-5")
    assert run.rows() == ["step-4", "step-6"]
    assert run.there() == ["sampler/step-6-0a1b2c3d", *states(4)]


def test_the_newest_commit_that_the_backend_has_stays_when_the_last_one_is_lost(run, control):
    folder = snapshot_dir(run.home / "checkpoints", run.job, "state", "step-6")
    folder.rename(folder.with_name(".lost"))
    assert run.plan(control, 1).kept == {"step-5": "the last commit that the backend has", "step-6": "the last commit"}


def test_the_newest_whole_commit_stays_when_the_last_one_is_damaged(run, control):
    os.truncate(snapshot_dir(run.home / "checkpoints", run.job, "state", "step-6") / "weights", 10)
    assert run.prune(control, 1).rows == ("step-1", "step-2", "step-3", "step-4")
    assert run.there() == states(5, 6)


def test_snapshots_of_weight_syncs_go_and_those_of_kept_rows_do_not(make_run, control):
    run = make_run()
    run.commit(1, "both")
    for name in ("step-1-1-aaaabbbb", "step-2-1-aaaabbbb"):
        run.write("sampler", name, checkpoint_type="delta")
    assert run.plan(control, 1, keep=["step-2-1-aaaabbbb"]).size_bytes == SIZE
    assert run.prune(control, 1).freed_bytes == 2 * SIZE
    assert run.there() == ["sampler/step-1-0a1b2c3d", *states(1)]


def test_in_an_adopted_trainer_only_what_the_rows_named_goes(make_run, control):
    run = make_run(policy_job_id="adopted-1")
    run.job = "adopted-1"  # not in the ledger: others use it too
    run.commit(1)
    run.commit(2)
    run.write("sampler", "of-somebody-else")
    assert run.prune(control, 1).rows == ("step-1",)
    assert run.there() == ["sampler/of-somebody-else", *states(2)]


def test_what_a_row_may_mean_stays_when_it_does_not_say_where(make_run, control):
    run, other = make_run(), make_run("other")
    for step in (1, 2, 3, 4):
        run.commit(step, "both")
    path = run.path / "checkpoints.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["state_path"] = "step-2"
    rows[2] |= {"state_path": f"/somewhere/{run.job}/step-3", "source_job_id": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    append_jsonl(other.path / "checkpoints.jsonl", {"name": "x", "step": 1, "state_path": "bare"})
    run.write("state", "bare")
    run.write("state", "nobodys")
    assert run.prune(control, 1).rows == ("step-1",)
    both = [f"{kind}/step-{step}{end}" for kind, end in (("sampler", "-0a1b2c3d"), ("state", "")) for step in (2, 3, 4)]
    assert run.there() == sorted([*both, "state/bare"])


@pytest.mark.parametrize("field", ["policy_job_id", "reference_job_id"])
def test_in_a_trainer_that_another_run_has_adopted_only_what_the_rows_named_goes(run, make_run, control, field):
    """What the other saves has no row of its own until it is committed, and weight syncs never have one."""
    make_run("adopting", **{field: run.job})
    run.write("state", "about-to-be-committed")
    run.write("sampler", "step-9-1-aaaabbbb")
    assert run.prune(control, 1).freed_bytes == 5 * SIZE
    assert run.there() == ["sampler/step-9-1-aaaabbbb", "state/about-to-be-committed", "state/step-6"]


def test_what_another_run_begins_from_or_names_stays(run, make_run, control, tmp_path):
    begun = make_run("begun", init_from_checkpoint=f"{run.job}:step-2")
    adopting = make_run("adopting", init_from_checkpoint="step-3", policy_job_id=run.job)
    naming = make_run("naming")
    for line in (run.path / "checkpoints.jsonl").read_text().splitlines()[3:4]:
        append_jsonl(naming.path / "checkpoints.jsonl", json.loads(line))
    run.write("state", "without-a-row")
    make_run("unnamed", init_from_checkpoint=f"{run.job}:without-a-row")
    plan = run.plan(control, 1)
    needed = {"step-2": begun, "step-3": adopting, "step-4": naming}
    ids = {name: StoredRun.read(other.path).run_id for name, other in needed.items()}
    assert plan.kept == {
        **{name: f"run {run_id} needs it" for name, run_id in ids.items()},
        "step-6": "the last commit",
    }
    run.prune(control, 1)
    assert run.there() == [*states(2, 3, 4, 6), "state/without-a-row"]


def test_a_live_run_is_refused_and_its_owner_may_prune(run, control):
    stored = StoredRun.read(run.path)
    with RunDirectory.open(run.path, recipe=stored.recipe, config=stored.config, home=run.home) as owner:
        with pytest.raises(LeaseLost, match=r"is running\. Wait for it or stop it, then prune"):
            check_prunable(stored, run.home)
        assert len(run.there()) == 6
        assert prune(control, owner, run.plan(control, 1)).freed_bytes == 5 * SIZE
    run.write("sampler", "late")
    with pytest.raises(LeaseLost):
        prune(control, owner, run.plan(control, 1))
    assert "sampler/late" in run.there()


def test_a_run_of_another_home_is_refused(run, tmp_path):
    with pytest.raises(DataError, match=r"was not started under .*other-home"):
        check_prunable(StoredRun.read(run.path), tmp_path / "other-home")


def test_a_backend_without_the_call_is_refused_in_plain_words(make_run):
    run = make_run(backend="fireworks")
    with pytest.raises(
        CheckpointError, match=r"on backend 'fireworks', whose API has no call to delete .* was touched"
    ):
        own_run(StoredRun.read(run.path), run.home)


def test_what_is_in_use_is_left_and_goes_with_the_next_prune(run, control):
    folder = snapshot_dir(run.home / "checkpoints", run.job, "state", "step-2")
    with SnapshotHold(folder):
        result = run.prune(control, 1)
    assert [(snapshot.ref.name, "is in use" in reason) for snapshot, reason in result.left] == [("step-2", True)]
    assert (run.rows(), run.there(), result.freed_bytes) == (["step-6"], states(2, 6), 4 * SIZE)
    assert run.prune(control, 1).freed_bytes == SIZE
    assert run.there() == states(6)


def test_an_unfinished_one_that_is_refused_does_not_keep_the_others(run, control):
    ref = SnapshotRef(run.job, CheckpointKind.STATE, "step-2")
    planned = run.plan(control, 1)
    listed = tuple(snapshot for snapshot in planned.snapshots if snapshot.ref != ref)
    plan = dataclasses.replace(planned, snapshots=listed, unfinished=(ref,))
    with (
        SnapshotHold(snapshot_dir(run.home / "checkpoints", run.job, "state", "step-2")),
        own_run(StoredRun.read(run.path), run.home) as directory,
    ):
        result = prune(control, directory, plan)
    assert [snapshot.ref for snapshot, _ in result.left] == [ref]
    assert (result.freed_bytes, run.there()) == (4 * SIZE, states(2, 6))
    assert run.prune(control, 1).freed_bytes == SIZE  # it was written down again


def test_a_key_that_is_refused_is_an_error_and_not_a_snapshot_in_use(run, control, backend):
    other = ControlPlane("embedded", backend.base_url, "wrong", run.home / "models")
    other.account_id = lambda *_: "local"
    other.list_checkpoints = control.list_checkpoints
    with other, pytest.raises(ProvisioningError, match="HTTP 401"):
        run.prune(other, 1)
    assert len(run.there()) == 6


KILLED = """
import os, signal, sys
from pathlib import Path
from cookbook import retention
from cookbook.control_plane import ControlPlane
from cookbook.snapshots import StoredRun

base_url, key, home, log_path, moment = sys.argv[1:]
if moment == "record":
    retention.drop_checkpoints = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    really, calls = ControlPlane.delete_checkpoint, []
    def delete(*arguments):
        calls.append(arguments)
        return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == int(moment) else really(*arguments)
    ControlPlane.delete_checkpoint = delete
control = ControlPlane("embedded", base_url, key, Path(home) / "models")
with retention.own_run(StoredRun.read(log_path), Path(home)) as run:
    plan = retention.plan_prune(control, run.path, retention.RetentionPolicy(2), home=Path(home))
    retention.prune(control, run, plan)
"""


@pytest.mark.parametrize(("moment", "rows_left", "data_left"), [("record", 5, 6), ("1", 3, 6), ("2", 3, 5)])
@pytest.mark.parametrize("is_adopted", [False, True], ids=["own", "adopted"])
def test_a_killed_prune_is_finished_by_the_next_one(
    make_run, backend, control, moment, rows_left, data_left, is_adopted
):
    run = make_run()
    job = f"borrowed-{moment}" if is_adopted else run.job
    for step in (1, 2, 3, 4, 5):
        run.commit(step, "state" if step > 1 else "both", job=job)
    arguments = [backend.base_url, backend.api_key, str(run.home), str(run.path), moment]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(run.rows()) == rows_left
    assert len(run.there(job)) == data_left
    run.prune(control, 2)
    assert run.rows() == ["step-1", "step-4", "step-5"]
    assert run.there(job) == ["sampler/step-1-0a1b2c3d", *states(1, 4, 5)]
    assert not (run.path / "pruning.json").exists()


def test_an_unfinished_prune_never_deletes_what_a_row_has_come_to_name(run, control):
    (run.path / "pruning.json").write_text(
        json.dumps({"snapshots": [{"job_id": run.job, "kind": "state", "name": "step-6"}]})
    )
    run.prune(control, 1)
    assert run.there() == states(6)


def test_a_backend_that_is_gone_is_an_error_and_the_next_prune_goes_on(run, control):
    gone = ControlPlane("embedded", "http://127.0.0.1:9", "key", run.home / "models")
    gone.account_id = lambda *_: "local"
    gone.list_checkpoints = control.list_checkpoints
    gone.delete_checkpoint = lambda *arguments: ControlPlane.delete_checkpoint(gone, *arguments[:3], 0.1)
    with gone, pytest.raises(ProvisioningError, match=r"127\.0\.0\.1:9"):
        run.prune(gone, 1)
    assert (run.rows(), len(run.there())) == (["step-6"], 6)
    run.prune(control, 1)
    assert run.there() == states(6)


@pytest.mark.parametrize("values", [(0, None), (1, 0)])
def test_a_policy_keeps_at_least_one(values):
    with pytest.raises(DataError, match="must be at least 1"):
        RetentionPolicy(*values)


def test_a_pruned_run_goes_on_bit_for_bit(make_run, control, manager, start_trainer):
    run = make_run()
    start_trainer(run.job)

    def losses(client, steps):
        rows = [datum_from_row([(client.step + 3 * t) % 250 for t in range(6)], [0, 0, 1, 1, 1, 1])]
        adam = AdamParams(learning_rate=1e-2)
        return [client.train_step(rows, "cross_entropy", adam).loss_sum for _ in range(steps)]

    def connected():
        return ReconnectableClient(manager, run.job, MODEL, 4, seed=1, default_timeout_s=60)

    with connected() as client:
        resolve_resume(client, run.path)
        for step in (1, 2, 3):
            losses(client, 1)
            save_checkpoint(client, f"step-{step}", run.path, {"step": step, "data_consumed": step})
        undisturbed = losses(client, 2)
    assert run.prune(control, 1).rows == ("step-1", "step-2")
    with connected() as client:
        assert resolve_resume(client, run.path).name == "step-3"
        assert losses(client, 2) == undisturbed
        save_checkpoint(client, "step-5", run.path, {"step": 5, "data_consumed": 5})
    assert run.rows() == ["step-3", "step-5"]
    control.cancel(run.job)
