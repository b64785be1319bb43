"""Bringing a mirrored run directory back: every file is checked against its hash, and all of it appears at once.

What is checked when the run is started there is in cookbook/run.py: the same run is not resumed in two directories.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cookbook.errors import CheckpointError, DataError
from cookbook.files import read_json, write_json
from cookbook.mirror import KNOWN_POINTERS, MIRROR, MIRRORED_COMMIT
from cookbook.mirror_store import MirroredFile, MirrorStore, Pointer
from cookbook.run import RUN_FILE
from cookbook.upkeep_record import UPKEEP_FILE

__all__ = ["PulledRun", "pull"]

_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class PulledRun:
    """A run directory that was brought back."""

    run_id: str
    path: Path
    commit: str | None
    """The checkpoint that the run goes on from; None = from its start."""
    step: int | None
    time: str
    """When the mirror was written: UTC, ISO 8601."""
    num_files: int
    size_bytes: int
    torn: tuple[str, ...]
    """Pointers of the mirror that are half-written; the whole one before them was taken."""
    original: Path | None
    """The directory on this machine that the run is registered under, if it is still there: then it must be gone before
    the run can go on in the new one."""


def pull(url: str, target: str | Path, *, home: Path) -> PulledRun:
    """Restore the run directory of a mirror into a folder that is absent or empty.

    Args:
        home: COOKBOOK_HOME. The run is registered there, unless it is there already under a directory that exists.

    Raises:
        DataError: the folder is not empty.
        CredentialsError: there are credentials in the URL.
        CheckpointError: nothing whole is at the URL, or a file is missing or damaged there: names it. The folder is
            left as it was.
    """
    path = Path(target).expanduser().resolve()
    _check_empty(path)
    store = MirrorStore(url)
    newest, torn = store.newest()
    for _ in range(_MAX_ATTEMPTS):
        if newest is None:
            raise _nothing(url, torn)
        try:
            _restore(store, newest, path)
            break
        except _Missing as missing:  # a newer copy was made meanwhile, or it is damaged
            previous, (newest, torn) = newest, store.newest()
            if newest == previous:
                raise CheckpointError(f"{missing} Restore the mirror from a backup.") from None
    else:
        raise CheckpointError(f"the mirror {url} is renewed faster than it can be read. Pull again once it rests.")
    return PulledRun(
        run_id=newest.run_id,
        path=path,
        commit=newest.commit,
        step=newest.step,
        time=newest.time,
        num_files=len(newest.files),
        size_bytes=sum(entry.size for entry in newest.files.values()),
        torn=tuple(torn),
        original=_registered(newest, path, home),
    )


class _Missing(Exception):
    """An object that a pointer names is not there."""


def _restore(store: MirrorStore, pointer: Pointer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        for name, entry in pointer.files.items():
            _restore_file(store, name, entry, temporary / name)
        record = read_json(temporary / RUN_FILE)
        if record is None or record.get("run_id") != pointer.run_id:
            raise CheckpointError(f"the mirror {store.url} has no {RUN_FILE} of run {pointer.run_id}.")
        remembered = {KNOWN_POINTERS: [pointer.digest], MIRRORED_COMMIT: pointer.commit, "succeeded": pointer.time}
        write_json(temporary / UPKEEP_FILE, {MIRROR: remembered})
        _check_empty(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _restore_file(store: MirrorStore, name: str, entry: MirroredFile, path: Path) -> None:
    """Raises _Missing; CheckpointError when the content is not what was mirrored, or the disk is full."""
    digest = hashlib.sha256()
    which = f"{name} (objects/{entry.sha256}) of the mirror {store.url}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:

            def write(chunk: bytes) -> None:
                digest.update(chunk)
                file.write(chunk)

            try:
                store.read_object(entry.sha256, write)
            except FileNotFoundError:
                raise _Missing(f"{which} is missing.") from None
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error
    if (digest.hexdigest(), size) != (entry.sha256, entry.size):
        raise CheckpointError(
            f"{which} is damaged: {size} bytes with sha256 {digest.hexdigest()}, expected {entry.size} bytes. "
            "Nothing was restored. Restore the mirror from a backup."
        )


def _registered(pointer: Pointer, path: Path, home: Path) -> Path | None:
    """Register the run, or name the directory that it is registered under and that holds it still."""
    entry = home / "runs" / f"{pointer.run_id}.json"
    registered = read_json(entry)
    if registered is not None:
        original = Path(registered["path"])
        if (read_json(original / RUN_FILE) or {}).get("run_id") == pointer.run_id:
            return original
    record = read_json(path / RUN_FILE) or {}
    created = record.get("created", pointer.time)
    values = {"run_id": pointer.run_id, "recipe": pointer.recipe, "path": str(path), "created": created}
    write_json(entry, values)
    return None


def _check_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} is not an empty folder. Name one that is empty or does not exist.")


def _nothing(url: str, torn: list[str]) -> CheckpointError:
    if torn:
        return CheckpointError(
            f"the mirror {url} is half-written: {', '.join(torn)} is not whole, and no older pointer is there."
        )
    return CheckpointError(f"there is no mirror of a run at {url}: it has no pointer. Check the URL.")
