"""The mirror of a run directory, on real file systems: whole at every moment, nothing sent twice, fenced, and checked
when it is brought back."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from cookbook.cli import app
from cookbook.config import SFTConfig, StorageConfig, environment
from cookbook.errors import CheckpointError, ConfigError, CredentialsError, DataError, LeaseLost
from cookbook.files import append_jsonl
from cookbook.mirror import CopyCancelled, Mirror
from cookbook.mirror_pull import pull
from cookbook.mirror_store import MirroredFile, MirrorStore, Pointer
from cookbook.mirror_url import url_problem, without_credentials
from cookbook.run import RunDirectory, list_runs
from cookbook.upkeep_record import UpkeepRecord
from cookbook.validation import check_inputs

CONFIG = {"backend": "embedded", "log_path": "x"}


class MirroredRun:
    """A run directory of this process, with files as a run has them, and a mirror."""

    def __init__(self, path, home, url):
        self.path, self.home, self.url = path, home, url
        self.open()

    def open(self):
        self.directory = RunDirectory.open(self.path, recipe="sft", config=CONFIG, home=self.home)
        self.mirror = Mirror(self.url, self.directory, UpkeepRecord(self.directory))

    def reopen(self):
        self.directory.close()
        self.open()

    def commit(self, step):
        row = {"name": f"step-{step}", "step": step, "data_consumed": 4 * step, "state_path": f"cross_job://job/{step}"}
        append_jsonl(self.path / "checkpoints.jsonl", row)
        append_jsonl(self.path / "metrics.jsonl", {"step": step, "train/loss": 1 / step})
        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        (folder / f"step-{step:06d}.jsonl").write_text(json.dumps({"step": step}) + "\n")

    def push(self):
        return self.mirror.push(threading.Lock())

    def files(self, path=None):
        """Path -> content of what belongs into the mirror."""
        path = path or self.path
        names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return {
            name: (path / name).read_bytes()
            for name in sorted(names)
            if not name.startswith(".") and name != "upkeep.json"
        }


@pytest.fixture
def make_run(tmp_path):
    made = []

    def make(url=None, name="run"):
        made.append(MirroredRun(tmp_path / name, tmp_path / "home", url or f"file://{tmp_path}/mirror"))
        return made[-1]

    yield make
    for run in made:
        run.directory.close()


@pytest.fixture
def run(make_run):
    made = make_run()
    made.commit(1)
    return made


def objects(tmp_path):
    """Object -> when it was last written."""
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "mirror" / "objects").iterdir()}


def pointers(tmp_path):
    return sorted(path.name for path in (tmp_path / "mirror" / "pointers").iterdir())


# -- pushed and pulled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["file", "memory", "local path"])
def test_a_pulled_run_has_every_file_of_the_mirrored_one_and_can_be_resumed(make_run, tmp_path, protocol):
    urls = {"file": f"file://{tmp_path}/mirror", "memory": f"memory://{tmp_path}/m", "local path": f"{tmp_path}/mirror"}
    run = make_run(urls[protocol])
    for step in (1, 2, 3):
        run.commit(step)
        assert run.push()
    run.directory.close()
    content, run_id = run.files(), run.directory.run_id
    run.path.rename(tmp_path / "lost")
    pulled = pull(run.url, tmp_path / "back", home=run.home)
    assert run.files(tmp_path / "back") == content
    assert (pulled.run_id, pulled.commit, pulled.step, pulled.original) == (run_id, "step-3", 3, None)
    assert (pulled.num_files, pulled.size_bytes) == (len(content), sum(map(len, content.values())))
    assert [(entry.run_id, entry.path, entry.state) for entry in list_runs(run.home)] == [
        (run_id, tmp_path / "back", "stopped")
    ]
    back = make_run(run.url, "back")
    assert (back.directory.run_id, back.directory.epoch) == (run_id, 2)
    back.commit(4)
    assert back.push()
    newest, torn = MirrorStore(run.url).newest()
    assert (newest.commit, newest.epoch, torn) == ("step-4", 2, [])


def test_what_has_not_changed_is_not_sent_again_and_what_is_not_named_goes(run, tmp_path):
    run.push()
    before = objects(tmp_path)
    assert not run.push()
    assert objects(tmp_path) == before
    assert len(pointers(tmp_path)) == 1
    run.commit(2)
    assert run.push()
    after = objects(tmp_path)
    kept = before.keys() & after.keys()
    assert len(kept) == 2  # run.json and the rollouts of step 1: rewritten neither
    assert all(before[name] == after[name] for name in kept)
    assert len(after) == len(run.files())
    assert len(pointers(tmp_path)) == 1


def test_an_object_that_was_lost_on_the_mirror_is_sent_again(run, tmp_path):
    run.push()
    before = objects(tmp_path)
    victim = next(iter(before))
    (tmp_path / "mirror" / "objects" / victim).unlink()
    run.push()
    assert objects(tmp_path).keys() == before.keys()


def test_locks_temporary_files_and_secrets_stay_here(run, tmp_path):
    names = [".lock.x", ".run.json.abc", "x.tmp", "token", "id.pem", "my-credentials.json", "wandb/run/a.wandb"]
    for name in names:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("secret")
    (tmp_path / "elsewhere").write_text("secret")
    (run.path / "link").symlink_to(tmp_path / "elsewhere")
    run.push()
    newest, _ = MirrorStore(run.url).newest()
    assert sorted(newest.files) == [
        *("checkpoints.jsonl", "metrics.jsonl", "rollouts/step-000001.jsonl", "run.json"),
    ]
    assert all("secret" not in path.read_text() for path in (tmp_path / "mirror").rglob("*") if path.is_file())


def test_a_file_that_is_appended_to_or_cut_meanwhile_comes_out_as_it_was_at_some_moment(run, tmp_path, monkeypatch):
    metrics = run.path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {n}}}\n' for n in range(9)))
    really, cut = MirrorStore.write_object, []

    def write(store, entry, chunks):
        if entry.size == metrics.stat().st_size and not cut:
            cut.append(metrics)
            os.truncate(metrics, 20)
            append_jsonl(metrics, {"step": 77})
        really(store, entry, chunks)

    monkeypatch.setattr(MirrorStore, "write_object", write)
    run.push()
    assert cut
    run.directory.close()
    shutil.move(run.path, tmp_path / "lost")
    pull(run.url, tmp_path / "back", home=run.home)
    assert (tmp_path / "back" / "metrics.jsonl").read_bytes() == (tmp_path / "lost" / "metrics.jsonl").read_bytes()


def test_the_commits_are_never_newer_than_what_belongs_to_them(run, monkeypatch):
    """Committed while the copy runs: the pointer speaks of the commit whose files it has for certain."""
    really, calls = Mirror._copy, []

    def copy(mirror, path, there):
        if not calls:
            run.commit(2)
        calls.append(path)
        return really(mirror, path, there)

    monkeypatch.setattr(Mirror, "_copy", copy)
    run.push()
    store = MirrorStore(run.url)
    newest, _ = store.newest()
    content = []
    store.read_object(newest.files["checkpoints.jsonl"].sha256, content.append)
    assert [json.loads(line)["name"] for line in b"".join(content).splitlines()] == ["step-1"]
    assert (newest.commit, newest.step) == ("step-1", 1)
    assert newest.files["metrics.jsonl"].size == (run.path / "metrics.jsonl").stat().st_size


# -- killed, damaged, fenced -------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from cookbook.mirror import Mirror
from cookbook.mirror_store import MirrorStore
from cookbook.run import RunDirectory
from cookbook.upkeep_record import UpkeepRecord

path, home, url, moment = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "objects":
    really, calls = MirrorStore.write_object, []
    def write(store, entry, chunks):
        calls.append(entry)
        if len(calls) == 2:  # half of it is there
            chunks = (part for half in ([b"half"], map(die, [0])) for part in half)
        really(store, entry, chunks)
    MirrorStore.write_object = write
elif moment == "before pointer":
    MirrorStore.write_pointer = die
elif moment == "in pointer":
    MirrorStore.write_pointer = lambda store, pointer: die(
        store._write(f"pointers/{pointer.name}", [pointer.to_bytes()[:200]]))
elif moment == "after pointer":
    MirrorStore.drop_all_but = die
else:
    really_remove, calls = MirrorStore._remove, []
    def remove(store, path):
        calls.append(path)
        return die() if len(calls) == 3 else really_remove(store, path)
    MirrorStore._remove = remove
run = RunDirectory.open(path, recipe="sft", config={"backend": "embedded", "log_path": "x"}, home=Path(home))
Mirror(url, run, UpkeepRecord(run)).push(threading.Lock())
"""


@pytest.mark.parametrize("moment", ["objects", "before pointer", "in pointer", "after pointer", "while deleting"])
def test_a_copy_that_is_killed_leaves_the_older_state_or_the_newer_one(run, tmp_path, moment):
    run.commit(2)
    run.push()
    run.directory.close()
    run.commit(3)
    arguments = [str(run.path), str(run.home), run.url, moment]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pulled = pull(run.url, tmp_path / "back", home=tmp_path / "other-home")
    is_new = moment in ("after pointer", "while deleting")
    assert pulled.step == (3 if is_new else 2)
    assert len(pulled.torn) == (1 if moment == "in pointer" else 0)
    assert (run.files(tmp_path / "back")["checkpoints.jsonl"].count(b"\n")) == pulled.step
    run.reopen()
    run.push()
    assert pull(run.url, tmp_path / "again", home=tmp_path / "other-home").step == 3
    assert len(pointers(tmp_path)) == 1
    assert len(objects(tmp_path)) == len(run.files())


def test_a_damaged_mirror_is_an_error_that_names_the_file(run, tmp_path):
    run.push()
    newest, _ = MirrorStore(run.url).newest()
    victim = tmp_path / "mirror" / "objects" / newest.files["metrics.jsonl"].sha256
    content = victim.read_bytes()
    for damage in (content[:-1], content[:-1] + b"!"):
        victim.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl \(objects/.* is damaged: \d+ bytes"):
            pull(run.url, tmp_path / "back", home=run.home)
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl \(objects/.* is missing"):
        pull(run.url, tmp_path / "back", home=run.home)
    (pointer,) = (tmp_path / "mirror" / "pointers").iterdir()
    pointer.write_bytes(pointer.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=rf"half-written: pointers/{pointer.name} is not whole"):
        pull(run.url, tmp_path / "back", home=run.home)
    assert not (tmp_path / "back").exists()
    assert list(tmp_path.glob(".back*")) == []


def test_a_pull_goes_on_with_the_newer_copy_when_the_one_it_reads_is_replaced(run, tmp_path, monkeypatch):
    run.push()
    really = MirrorStore.read_object

    def read(store, sha256, write):
        monkeypatch.setattr(MirrorStore, "read_object", really)
        run.commit(2)
        run.push()
        really(store, sha256, write)

    monkeypatch.setattr(MirrorStore, "read_object", read)
    assert pull(run.url, tmp_path / "back", home=tmp_path / "other-home").step == 2
    assert run.files(tmp_path / "back") == run.files()


def test_a_mirror_of_another_run_is_left_alone(run, make_run, tmp_path):
    run.push()
    before = objects(tmp_path)
    other = make_run(name="other")
    with pytest.raises(CheckpointError, match=rf"is the mirror of run {run.directory.run_id} .*Use another folder"):
        other.push()
    assert objects(tmp_path) == before


def test_a_process_that_lost_the_run_writes_nothing(run, tmp_path):
    run.push()
    before, stale = objects(tmp_path), run.mirror
    run.reopen()
    run.commit(2)
    with pytest.raises(LeaseLost):
        stale.push(threading.Lock())
    assert objects(tmp_path) == before
    run.push()
    newest, _ = MirrorStore(run.url).newest()
    assert (newest.epoch, newest.step) == (2, 2)


def test_a_pointer_that_comes_too_late_never_beats_the_newer_owners(run):
    """The older owner was suspended between its check and its write."""
    run.push()
    store = MirrorStore(run.url)
    late, _ = store.newest()
    run.reopen()
    run.commit(2)
    run.push()
    values = {**vars(late), "sequence": late.sequence + 100}
    store.write_pointer(Pointer(**values))
    newest, _ = store.newest()
    assert (newest.epoch, newest.step) == (2, 2)
    run.commit(3)
    run.push()
    assert store.newest()[0].step == 3


def test_a_process_that_was_overtaken_deletes_nothing_of_the_newer_owner(run, tmp_path, monkeypatch):
    """Its network stalls in the middle of a copy; the run is brought back elsewhere, and goes on there to its end."""
    run.push()
    run.commit(2)
    really, back = MirrorStore.write_pointer, None

    def write(store, pointer):
        nonlocal back
        monkeypatch.setattr(MirrorStore, "write_pointer", really)
        pull(run.url, tmp_path / "back", home=tmp_path / "other-home")
        back = MirroredRun(tmp_path / "back", tmp_path / "other-home", run.url)
        back.commit(3)
        back.push()
        really(store, pointer)

    monkeypatch.setattr(MirrorStore, "write_pointer", write)
    run.push()
    assert pull(run.url, tmp_path / "again", home=tmp_path / "third-home").step == 3
    assert back.files(tmp_path / "again") == back.files()
    back.commit(4)
    back.push()
    assert (len(pointers(tmp_path)), len(objects(tmp_path))) == (1, len(back.files()))
    back.directory.close()


def test_only_objects_that_were_there_before_the_copy_are_deleted(run, tmp_path, monkeypatch):
    """Those that came meanwhile may be a newer owner's, whose pointer is still to come."""
    run.push()
    run.commit(2)
    content, really = b"of a newer owner", MirrorStore.write_pointer
    entry = MirroredFile(hashlib.sha256(content).hexdigest(), len(content))

    def write(store, pointer):
        store.write_object(entry, [content])
        really(store, pointer)

    with monkeypatch.context() as patch:
        patch.setattr(MirrorStore, "write_pointer", write)
        run.push()
    assert entry.sha256 in objects(tmp_path)
    run.commit(3)
    run.push()
    assert entry.sha256 not in objects(tmp_path)


def test_nothing_is_deleted_while_a_newer_owner_writes_its_pointer(run, tmp_path):
    run.push()
    before = objects(tmp_path).keys()
    newest, _ = MirrorStore(run.url).newest()
    (tmp_path / "mirror" / "pointers" / f"{newest.epoch + 1:08d}-{newest.sequence + 1:08d}.json").write_text("{")
    run.commit(2)
    run.push()
    assert (len(pointers(tmp_path)), before <= objects(tmp_path).keys()) == (3, True)


def test_of_two_copies_of_a_run_only_the_one_that_went_on_is_mirrored(run, make_run, tmp_path):
    """The run was brought back elsewhere and went on; then the old machine comes back, and is started more often."""
    run.push()
    pull(run.url, tmp_path / "back", home=tmp_path / "other-home")
    back = MirroredRun(tmp_path / "back", tmp_path / "other-home", run.url)
    back.commit(2)
    back.push()
    run.reopen()
    run.reopen()
    run.reopen()
    with pytest.raises(CheckpointError, match=rf"was continued from another copy .* by {back.path} on .*lease epoch 2"):
        run.push()
    back.commit(3)
    assert back.push()
    back.directory.close()
    assert MirrorStore(run.url).newest()[0].step == 3


def test_where_what_was_written_is_forgotten_the_same_directory_goes_on(run):
    run.push()
    (run.path / "upkeep.json").unlink()
    run.reopen()
    run.commit(2)
    assert run.push()
    assert MirrorStore(run.url).newest()[0].host == socket.gethostname()


def test_a_copy_that_was_cancelled_writes_no_pointer(run, tmp_path):
    run.mirror.cancel()
    with pytest.raises(CopyCancelled):
        run.push()
    assert list(tmp_path.glob("mirror/pointers/*")) == []


# -- pull's other checks -----------------------------------------------------------------------------------------------


def test_pull_wants_an_empty_folder_and_a_mirror(run, tmp_path):
    run.push()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(DataError, match=r"full is not an empty folder"):
        pull(run.url, tmp_path / "full", home=run.home)
    with pytest.raises(CheckpointError, match=r"there is no mirror of a run at .*nothing"):
        pull(f"file://{tmp_path}/nothing", tmp_path / "back", home=run.home)
    (tmp_path / "empty").mkdir()
    assert pull(run.url, tmp_path / "empty", home=tmp_path / "other-home").num_files == 4


def test_a_pull_beside_the_original_says_so_and_the_original_stays_the_run(run, tmp_path):
    run.push()
    result = CliRunner().invoke(app, ["runs", "pull", run.url, str(tmp_path / "back"), "--home", str(run.home)])
    assert result.exit_code == 0, result.output
    assert f"run {run.directory.run_id} as of" in result.stdout
    assert "checkpoint step-1, step 1" in result.stdout
    assert f"the run is still in {run.path}, and goes on there" in result.stderr
    assert [entry.path for entry in list_runs(run.home)] == [run.path]
    with pytest.raises(ConfigError, match=f"is a copy of {run.path}"):
        RunDirectory.open(tmp_path / "back", recipe="sft", config=CONFIG, home=run.home)
    wrong = CliRunner().invoke(app, ["runs", "pull", "s3://key:pass-word@bucket/x", str(tmp_path / "y")])
    assert (wrong.exit_code, "pass-word" in wrong.output) == (2, False)


@pytest.mark.parametrize("path", ["../outside", "/etc/x", "a/../../x", "", "a//b", "a\\b", "./a"])
def test_a_pointer_that_leads_out_of_the_folder_is_none(run, path):
    run.push()
    newest, _ = MirrorStore(run.url).newest()
    forged = Pointer(**{**vars(newest), "files": {path: MirroredFile("0" * 64, 1)}})
    with pytest.raises(ValueError, match="cannot be in a run directory"):
        Pointer.from_bytes(forged.to_bytes())


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA123:s3cret@bucket/runs",
        "s3://AKIA123@bucket/runs",
        "ftp://me:s3cret@host/runs",
        "abfs://box:s3cret@account/runs",
        "s3://bucket/runs?X-Amz-Signature=s3cret",
        "s3://AKIA123:abc/s3cret@bucket/runs",
        "s3://AKIA123:/s3cret@bucket/runs",
        "sftp://me:abc/s3cret@host/runs",
        "s3://AKIA123:abc#s3cret@bucket/runs",
        "s3://bucket/runs#s3cret",
    ],
)
def test_a_url_with_credentials_is_refused_and_never_repeated(url):
    with pytest.raises(CredentialsError, match="taken from the environment") as refused:
        SFTConfig(log_path="x", base_model="m", dataset="d", storage={"mirror_url": url})
    assert not any(secret in str(refused.value) for secret in ("s3cret", "AKIA123"))


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/a", "s3://bucket/a@b", "sftp://me@host/a", "sftp://me@host:22/a@b", "sftp://[::1]/a@b"),
        *("abfss://box@account.dfs.core.windows.net/a", "hdfs://host:8020/a@b", "/data/a:b@c/#1", "file:///a#b"),
    ],
)
def test_a_url_without_credentials_is_taken(url):
    assert StorageConfig(mirror_url=url).mirror_url == url


def test_words_of_a_file_system_lose_what_may_be_secret():
    text = "PUT https://k:v@host/a?X-Amz-Security-Token=abc&x=1 failed, aws_secret_access_key=hush"
    assert without_credentials(text) == (
        "PUT https://[hidden]@host/a?X-Amz-Security-Token=[hidden]&x=1 failed, aws_secret_access_key=[hidden]"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:abc/def@bucket/x failed", "s3://[hidden]@bucket/x failed"),
        ("s3://AKIA:12/d/ef@bucket/x failed", "s3://AKIA:12/d/ef@bucket/x failed"),  # a port, as far as can be told
        ("s3://AKIA:/def@bucket", "s3://[hidden]@bucket"),
        ("http://host:80/a@b of http://k:v@host", "http://host:80/a@b of http://[hidden]@host"),
        ("s3://bucket/x: no key, ask me@host", "s3://bucket/x: no key, ask me@host"),
    ],
)
def test_a_secret_with_a_slash_is_hidden_and_a_port_is_none(text, shown):
    assert without_credentials(text) == shown


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://bucket/runs", "needs a package that is not installed: Install s3fs"),
        ("nonsense://bucket/runs", "has a protocol that fsspec does not know"),
        ("https://host/runs", "cannot be written"),
        ("simplecache::s3://bucket", "chains file systems"),
        ("{run}/mirror", "lie in each other"),
        ("file://{run}", "lie in each other"),
        ("{run}/..", "lie in each other"),
        ("{file}/x", "is a file"),
    ],
)
def test_a_url_that_cannot_work_says_why(tmp_path, url, problem):
    (tmp_path / "file").write_text("")
    found = url_problem(url.format(run=tmp_path / "run", file=tmp_path / "file"), tmp_path / "run")
    assert found is not None
    assert problem in found[0]


def test_a_missing_package_is_a_problem_of_the_config():
    config = SFTConfig(log_path="x", base_model="m", dataset="d", storage={"mirror_url": "s3://bucket/runs"})
    (found,) = (p for p in check_inputs(config, environment()) if p.where == "storage.mirror_url")
    assert "Install s3fs" in found.what


def test_the_installed_file_systems_are_no_problem(tmp_path):
    for url in (f"file://{tmp_path}/m", f"{tmp_path}/m", "memory://m", "m"):
        assert url_problem(url, tmp_path / "run") is None


def test_a_file_system_that_fails_is_an_error_that_names_the_mirror(run, tmp_path):
    (tmp_path / "mirror").write_text("in the way")
    with pytest.raises(CheckpointError, match=rf"the mirror {run.url} failed while listing pointers: NotADirectory"):
        run.push()
