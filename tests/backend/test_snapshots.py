"""Snapshots are complete or not there, are never overwritten, and damage is found and named."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from safetensors import SafetensorError

from cookbook.backend.snapshots import (
    FileEntry,
    Manifest,
    SnapshotHold,
    SnapshotInUse,
    delete_snapshot,
    list_manifests,
    load_manifest,
    remove_deleted,
    remove_leftovers,
    snapshot_dir,
    verify,
    write_file,
    write_snapshot,
)
from cookbook.errors import CheckpointError


def manifest(name: str = "step-1", **changes: object) -> Manifest:
    fields = {
        "kind": "state",
        "name": name,
        "job_id": "job-a",
        "base_model": "accounts/local/models/tiny",
        "lora_rank": 0,
        "checkpoint_type": None,
        "promotable": False,
        "created": 100.0,
        "step": 1,
    }
    return Manifest(**(fields | changes))


def write_two_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"abc" * 1000)
    (folder / "nested").mkdir()
    (folder / "nested" / "config.json").write_text("{}")


def save(checkpoints: Path, of: Manifest, write: Callable[[Path], None] = write_two_files) -> Path:
    folder = snapshot_dir(checkpoints, of.job_id, of.kind, of.name)
    write_snapshot(folder, of, write)
    return folder


def test_written_snapshot_is_listed_and_verifies(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest(metadata={"lora_alpha": 16, "dtype": "float32"}))
    loaded = load_manifest(folder)
    assert list_manifests(tmp_path, "job-a") == [loaded]
    assert loaded.files["weights.bin"].size == 3000
    assert sorted(loaded.files) == ["nested/config.json", "weights.bin"]
    assert dataclasses.replace(loaded, files={}) == manifest(metadata={"lora_alpha": 16, "dtype": "float32"})
    verify(folder, loaded)


def test_manifests_of_both_kinds_are_listed_oldest_first(tmp_path: Path) -> None:
    save(tmp_path, manifest("c", created=3.0))
    save(tmp_path, manifest("a", created=2.0, kind="sampler", checkpoint_type="base", promotable=True))
    save(tmp_path, manifest("b", created=1.0))
    assert [found.name for found in list_manifests(tmp_path, "job-a")] == ["b", "a", "c"]


def test_unknown_job_has_no_manifests(tmp_path: Path) -> None:
    assert list_manifests(tmp_path, "no-such-job") == []


def test_existing_name_is_never_overwritten(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest())
    before = (folder / "weights.bin").read_bytes()
    with pytest.raises(CheckpointError, match="'step-1' exists already"):
        save(tmp_path, manifest(), lambda path: (path / "weights.bin").write_bytes(b"other") and None)
    assert (folder / "weights.bin").read_bytes() == before


def test_name_taken_while_writing_is_not_overwritten(tmp_path: Path) -> None:
    def write_slowly(folder: Path) -> None:
        save(tmp_path, manifest(step=7))  # another writer was faster
        write_two_files(folder)

    with pytest.raises(CheckpointError, match="'step-1' exists already"):
        save(tmp_path, manifest(), write_slowly)
    assert [found.step for found in list_manifests(tmp_path, "job-a")] == [7]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(5, "Input/output error"), OSError, "Input/output error"),
        (
            OSError(28, "No space left on device"),
            CheckpointError,
            r"'step-1' was not saved, there is no room .*MiB free",
        ),
        (OSError(122, "Disk quota exceeded"), CheckpointError, "no room for it: Disk quota exceeded"),
        (SafetensorError("Error while serializing: I/O error: x (os error 28)"), CheckpointError, "No space left on"),
    ],
)
def test_failed_write_leaves_nothing(tmp_path: Path, error: Exception, raised: type[Exception], message: str) -> None:
    def fail(folder: Path) -> None:
        write_two_files(folder)
        raise error

    with pytest.raises(raised, match=message):
        save(tmp_path, manifest(), fail)
    assert list((tmp_path / "job-a" / "state").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    def write(folder: Path) -> dict[str, FileEntry]:
        (folder / "weights").symlink_to("/dev/full")
        return {"weights": write_file(folder / "weights", [memoryview(b"abc")])}

    folder = snapshot_dir(tmp_path, "job-a", "state", "step-1")
    with pytest.raises(CheckpointError, match="there is no room for it: No space left on device"):
        write_snapshot(folder, manifest(), write)
    assert list(folder.parent.iterdir()) == []


def test_a_file_hashed_while_it_is_written_verifies_and_is_flushed_once(tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000

    def write(folder: Path) -> dict[str, FileEntry]:
        write_two_files(folder)
        return {"big": write_file(folder / "big", [memoryview(content[:100]), memoryview(content[100:])])}

    folder = snapshot_dir(tmp_path, "job-a", "state", "step-1")
    written = write_snapshot(folder, manifest(), write)
    assert (folder / "big").read_bytes() == content
    assert written.files["big"] == FileEntry(len(content), hashlib.sha256(content).hexdigest())
    verify(folder, load_manifest(folder))


def test_writing_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    answers = iter([False, True])

    def write(folder: Path) -> dict[str, FileEntry]:
        return {"big": write_file(folder / "big", [memoryview(bytes(10_000_000))], stop=lambda: next(answers))}

    folder = snapshot_dir(tmp_path, "job-a", "state", "step-1")
    with pytest.raises(InterruptedError, match="big is not written to its end"):
        write_snapshot(folder, manifest(), write)
    assert list(folder.parent.iterdir()) == []


def test_writer_killed_midway_leaves_nothing_visible(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.backend.test_snapshots import manifest, save, write_two_files\n"
        "def die(folder):\n    write_two_files(folder); os.kill(os.getpid(), signal.SIGKILL)\n"
        "save(Path(sys.argv[1]), manifest(), die)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "job-a" / "state").iterdir())) == 1
    assert list_manifests(tmp_path, "job-a") == []
    remove_leftovers(tmp_path, "job-a")
    assert list((tmp_path / "job-a" / "state").iterdir()) == []
    save(tmp_path, manifest())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"weights\.bin is missing"),
        (lambda path: path.write_bytes(b"abc"), r"weights\.bin has 3 bytes instead of 3000"),
        (lambda path: path.write_bytes(b"abd" + b"abc" * 999), r"weights\.bin is damaged: sha256"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = save(tmp_path, manifest())
    damage(folder / "weights.bin")
    with pytest.raises(CheckpointError, match=message):
        verify(folder, load_manifest(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "files": 3}'])
def test_damaged_manifest_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    folder = save(tmp_path, manifest())
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load_manifest(folder)


def test_manifest_of_another_format_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest())
    fields = orjson.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(orjson.dumps(fields | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="format_version 2, this program reads 1"):
        load_manifest(folder)


def test_missing_snapshot_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 'step-9'"):
        load_manifest(snapshot_dir(tmp_path, "job-a", "state", "step-9"))


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a\0b", "x" * 201])
def test_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be used"):
        snapshot_dir(tmp_path, "job-a", "state", name)
    with pytest.raises(CheckpointError, match="cannot be used"):
        snapshot_dir(tmp_path, name, "state", "step-1")


def test_a_deleted_snapshot_is_gone_and_its_name_is_free(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest())
    assert load_manifest(folder).size_bytes == 3002
    delete_snapshot(folder)
    assert (list_manifests(tmp_path, "job-a"), list(folder.parent.iterdir())) == ([], [])
    with pytest.raises(CheckpointError, match="no checkpoint 'step-1' at"):
        delete_snapshot(folder)
    save(tmp_path, manifest())


def test_a_held_snapshot_is_not_deleted_until_the_last_one_lets_go(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest())
    with SnapshotHold(folder):
        with SnapshotHold(folder), pytest.raises(SnapshotInUse, match="'step-1' is in use"):
            delete_snapshot(folder)
        with pytest.raises(SnapshotInUse):
            delete_snapshot(folder)
        verify(folder, load_manifest(folder))
    delete_snapshot(folder)
    with pytest.raises(CheckpointError, match="no checkpoint 'step-1' at"):
        SnapshotHold(folder)


def test_a_holder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest())
    code = (
        "import os, signal, sys; from pathlib import Path; from cookbook.backend.snapshots import SnapshotHold\n"
        "hold = SnapshotHold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SnapshotInUse):
            delete_snapshot(folder)
        holder.kill()
    delete_snapshot(folder)


def test_a_deletion_killed_midway_shows_nothing_and_is_finished_later(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest())
    other = save(tmp_path, manifest("step-2"))
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; from cookbook.backend import snapshots\n"
        "shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "snapshots.delete_snapshot(Path(sys.argv[1]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [found.name for found in list_manifests(tmp_path, "job-a")] == ["step-2"]
    assert len(list(folder.parent.iterdir())) == 2
    remove_deleted(tmp_path, "job-a")
    assert list(folder.parent.iterdir()) == [other]
