"""Upkeep of a live run: what a commit makes needless goes, what is needed stays, and failures cost the run nothing.

Snapshots are real files in the home of the real backend.
"""

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from cookbook.backend.snapshots import SnapshotHold, snapshot_dir
from cookbook.config import StorageConfig
from cookbook.control_plane import ControlPlane
from cookbook.files import append_jsonl
from cookbook.ledger import ResourceLedger
from cookbook.run import RunDirectory
from cookbook.snapshots import StoredRun
from cookbook.upkeep import MIRROR, RETENTION, Background, Upkeep
from cookbook.upkeep_record import read_upkeep, upkeep_text
from tests.stopped_run import StoppedRun


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


class LiveRun(StoppedRun):
    """A run that this process owns, with its upkeep."""

    def __init__(self, path, running, storage=None, **config):
        super().__init__(path, running, **config)
        self.start(storage or {})

    def start(self, storage):
        stored = StoredRun.read(self.path)
        self.directory = RunDirectory.open(self.path, recipe=stored.recipe, config=stored.config, home=self.home)
        self.upkeep = Upkeep(self.directory, StorageConfig(**storage), self.home)

    def upkept(self, control, step, sync=None, *, kind="state"):
        self.commit(step, kind)
        self.upkeep.after_commit(control, f"step-{step}", self.job, sync)

    def problem(self, part=RETENTION):
        return read_upkeep(self.path).get(part, {}).get("problem")


@pytest.fixture
def make_run(backend, tmp_path):
    made = []

    def make(name="run", **options):
        made.append(LiveRun(tmp_path / name, backend, **options))
        return made[-1]

    yield make
    for run in made:
        run.directory.close()


def states(*steps):
    return [f"state/step-{step}" for step in steps]


def record_rollouts(run, steps):
    folder = run.path / "rollouts"
    folder.mkdir(exist_ok=True)
    for step in steps:
        (folder / f"step-{step:06d}.jsonl").write_text("{}\n")


def recorded(run):
    return sorted(int(path.stem[5:]) for path in (run.path / "rollouts").glob("step-*"))


def test_each_commit_leaves_the_last_and_every_kth_with_what_they_need(make_run, control):
    run = make_run(storage={"keep_last": 2, "keep_every": 4})
    record_rollouts(run, range(12))
    run.write("state", "step-3-r2")  # its answer was lost: no row names it
    seen = []
    for step in (2, 4, 6, 8, 10):
        run.upkept(control, step)
        seen.append((run.rows(), recorded(run)[0]))
    names = [[name.removeprefix("step-") for name in rows] for rows, _ in seen]
    assert names == [["2"], ["2", "4"], ["4", "6"], ["4", "6", "8"], ["4", "8", "10"]]
    assert [oldest for _, oldest in seen] == [2, 2, 4, 4, 4]
    assert recorded(run) == list(range(4, 12))
    assert run.there() == sorted(states(10, 4, 8))
    assert run.problem() is None
    ((part, text),) = upkeep_text(read_upkeep(run.path))
    assert (part, text.startswith("last done 20")) == (RETENTION, True)


def test_nothing_goes_when_all_is_kept(make_run, control):
    run = make_run(storage={"keep_last": None})
    record_rollouts(run, range(3))
    for step in (1, 2, 3, 4, 5):
        run.upkept(control, step)
    assert run.there() == states(1, 2, 3, 4, 5)
    assert recorded(run) == [0, 1, 2]
    assert not (run.path / "upkeep.json").exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_the_previous_checkpoint_goes_only_when_the_new_one_is_whole(make_run, control, caplog, damage):
    run = make_run(storage={"keep_last": 1})
    run.upkept(control, 1)
    run.commit(2)
    folder = snapshot_dir(run.home / "checkpoints", run.job, "state", "step-2")
    if damage == "gone":
        folder.rename(folder.with_name(".lost"))
    else:
        os.truncate(folder / "weights", 10)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            run.upkeep.after_commit(control, "step-2", run.job, None)
    assert (run.rows(), "state/step-1" in run.there()) == (["step-1", "step-2"], True)
    assert "step-2 is not whole on the backend" in run.problem()
    assert [r.levelname for r in caplog.records if "not whole" in r.message] == ["WARNING"]  # once
    with caplog.at_level(logging.INFO):
        run.upkept(control, 3)
    assert (run.rows(), run.problem()) == (["step-3"], None)
    assert "retention works again" in caplog.text


def test_what_could_not_be_loaded_takes_no_place_from_what_can(make_run, control):
    run = make_run(storage={"keep_last": 2})
    for step in (1, 2, 3):
        run.commit(step)
    run.upkeep.unusable = {"step-3"}  # damaged; the run went on from step 2
    run.upkept(control, 4)
    assert run.rows() == ["step-2", "step-3", "step-4"]
    assert run.there() == states(2, 3, 4)


class Syncs:
    """The weight syncs of this start, as far as retention asks."""

    version = "step-1-1-aaaaaaaa"

    @staticmethod
    def owns(name):
        return name.startswith("step-4-1-")


def test_what_is_being_saved_or_served_stays(make_run, control):
    """No row names a save under way. It is of the newest commit's step, or of a later one."""
    run = make_run(storage={"keep_last": 1})
    for name in ("step-5-r2", "step-7", "step-2"):
        run.write("state", name)
    for name in (Syncs.version, "step-2-1-aaaaaaaa", "step-4-1-bbbbbbbb", "step-7-0a0a0a0a"):
        run.write("sampler", name)
    run.write("state", "step-9", job=f"{run.job}-old")  # a trainer of before saves nothing any more
    ResourceLedger(run.directory).intend("trainer", "policy", 2, resource_id=f"{run.job}-old")
    run.upkept(control, 5, Syncs)
    samplers = ["step-1-1-aaaaaaaa", "step-4-1-bbbbbbbb", "step-7-0a0a0a0a"]
    assert run.there() == [*(f"sampler/{name}" for name in samplers), *states("5", "5-r2", "7")]
    assert run.there(f"{run.job}-old") == []


def test_a_backend_that_is_gone_is_a_problem_that_is_said_once_and_bounded(make_run, control, caplog, monkeypatch):
    monkeypatch.setattr("cookbook.upkeep.RETENTION_TIMEOUT_S", 0.2)
    run = make_run(storage={"keep_last": 1})
    run.upkept(control, 1)
    gone = ControlPlane("embedded", "http://127.0.0.1:9", "key", run.home / "models")
    gone.account_id = lambda *_: "local"
    started = time.monotonic()
    with gone:
        run.upkept(gone, 2)
        run.upkept(gone, 3)
    assert time.monotonic() - started < 10
    assert run.rows() == ["step-1", "step-2", "step-3"]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert "FAILING since" in dict(upkeep_text(read_upkeep(run.path)))[RETENTION]
    run.upkept(control, 4)
    assert run.rows() == ["step-4"]


def test_a_process_that_has_lost_the_run_deletes_nothing_and_says_nothing(make_run, control, caplog):
    run = make_run(storage={"keep_last": 1})
    run.upkept(control, 1)
    run.commit(2)
    run.directory.close()  # as if its lock had been forgotten: the next owner has the next epoch
    stored = StoredRun.read(run.path)
    with RunDirectory.open(run.path, recipe=stored.recipe, config=stored.config, home=run.home):
        before = (run.path / "upkeep.json").read_bytes()
        run.upkeep.after_commit(control, "step-2", run.job, None)
    assert run.there() == states(1, 2)
    assert (run.path / "upkeep.json").read_bytes() == before
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_fireworks_has_no_call_to_delete_which_is_said_once(make_run, caplog):
    run = make_run(backend="fireworks", storage={"keep_last": 1})
    record_rollouts(run, range(4))
    caplog.set_level(logging.INFO, logger="cookbook.upkeep")
    with ControlPlane("fireworks", "http://127.0.0.1:9", "key", run.home / "models") as control:
        for step in (2, 3):
            run.upkept(control, step)
    assert (run.rows(), recorded(run)) == (["step-2", "step-3"], [2, 3])
    said = [record for record in caplog.records if "no call to delete" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert dict(upkeep_text(read_upkeep(run.path)))[RETENTION].startswith("nothing is deleted")


def test_what_the_mirror_goes_on_from_stays_until_the_mirror_is_newer(make_run, control, tmp_path):
    url = f"file://{tmp_path}/mirror"
    run = make_run(storage={"keep_last": 1, "mirror_url": url})
    run.upkept(control, 1)
    assert run.upkeep._copying.wait(20)
    assert read_upkeep(run.path)[MIRROR]["commit"] == "step-1"
    (tmp_path / "mirror").rename(tmp_path / "away")
    (tmp_path / "mirror").write_text("in the way")
    for step in (2, 3):
        run.upkept(control, step)
        assert run.upkeep._copying.wait(20)
    assert run.rows() == ["step-1", "step-3"]
    assert "failed while" in run.problem(MIRROR)
    (tmp_path / "mirror").unlink()
    (tmp_path / "away").rename(tmp_path / "mirror")
    run.upkeep.finish(20)
    assert run.problem(MIRROR) is None
    run.upkept(control, 4)
    assert run.rows() == ["step-3", "step-4"]
    run.upkeep.finish(20)


def test_a_mirror_of_another_run_is_a_conflict_before_the_run_begins(make_run, tmp_path):
    url = f"file://{tmp_path}/mirror"
    first, second = make_run(storage={"mirror_url": url}), make_run("other", storage={"mirror_url": url})
    assert first.upkeep.mirror_conflict() is None
    first.upkeep.finish(20)
    assert first.upkeep.mirror_conflict() is None
    assert f"is the mirror of run {first.directory.run_id}" in second.upkeep.mirror_conflict()
    second.upkeep.finish(20)
    assert "is the mirror of run" in second.problem(MIRROR)
    assert make_run("none").upkeep.mirror_conflict() is None


def test_a_mirror_that_does_not_answer_is_given_up_at_the_end(make_run, tmp_path, monkeypatch):
    run = make_run(storage={"mirror_url": f"file://{tmp_path}/mirror"})
    answer = threading.Event()
    monkeypatch.setattr("cookbook.mirror.MirrorStore.newest", lambda _: answer.wait(30) and (None, []))
    started = time.monotonic()
    run.upkeep.finish(0.2)
    assert time.monotonic() - started < 5
    assert "given up after 0 s" in run.problem(MIRROR)
    answer.set()
    assert run.upkeep._copying.wait(10)
    assert list(tmp_path.glob("mirror/pointers/*")) == []  # it came too late
    assert "given up after 0 s" in run.problem(MIRROR)


def test_weight_sync_snapshots_go_in_the_background_and_those_in_use_later(make_run, control):
    run = make_run(storage={"keep_last": 3, "keep_every": 4})
    names = [f"step-{step}-1-aaaaaaaa" for step in range(1, 8)]
    for name in names:
        run.write("sampler", name)

    saved = list(names)

    class Syncs:
        job_id = run.job

        def needless(self):
            return [name for name in saved[:-2] if name != names[0]]  # the first one is served

        def forget(self, name):
            saved.remove(name)

    syncs = Syncs()
    with SnapshotHold(snapshot_dir(run.home / "checkpoints", run.job, "sampler", names[1])):
        run.upkeep.after_sync(control, syncs)
        assert run.upkeep._dropping.wait(20)
    left = [names[0], names[1], names[3], *names[5:]]
    assert run.there() == [f"sampler/{name}" for name in left]
    run.upkeep.after_sync(control, syncs)
    assert run.upkeep._dropping.wait(20)
    assert run.there() == [f"sampler/{name}" for name in left if name != names[1]]
    assert run.problem("weight syncs") is None


def test_background_work_is_done_once_more_when_it_was_asked_for_meanwhile():
    entered, go_on, done = threading.Semaphore(0), threading.Semaphore(0), []

    def work():
        entered.release()
        go_on.acquire(timeout=10)
        done.append(threading.current_thread().name)

    background = Background("test-work", work)
    background.start()
    assert entered.acquire(timeout=10)
    for _ in range(5):
        background.start()
    assert (background.is_busy, background.wait(0.01)) == (True, False)
    go_on.release(2)
    assert background.wait(10)
    assert (done, background.is_busy) == (["test-work"] * 2, False)


def test_a_damaged_record_of_another_run_stops_deletion_and_nothing_else(make_run, control):
    run, other = make_run(storage={"keep_last": 1}), make_run("other")
    append_jsonl(other.path / "checkpoints.jsonl", {"no": "name"})
    run.upkept(control, 1)
    run.upkept(control, 2)
    assert run.rows() == ["step-1", "step-2"]
    assert "has no name" in run.problem()
    Path(other.path / "checkpoints.jsonl").unlink()
