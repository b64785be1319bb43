"""Snapshots on disk: a folder of files and a manifest with their sizes and hashes, complete or not there at all.

A snapshot is written beside its final place, flushed, described by its manifest and renamed; nothing is overwritten.
It is deleted the other way round, and only when no live process holds it. What the files hold (training state, sampler
weights) is not known here.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import orjson

from cookbook.errors import CheckpointError

__all__ = [
    "MANIFEST_NAME",
    "FileEntry",
    "Manifest",
    "SnapshotHold",
    "SnapshotInUse",
    "SnapshotKind",
    "delete_snapshot",
    "list_manifests",
    "load_manifest",
    "refuse_taken",
    "remove_deleted",
    "remove_leftovers",
    "snapshot_dir",
    "verify",
    "write_file",
    "write_snapshot",
]

_log = logging.getLogger(__name__)

SnapshotKind = Literal["state", "sampler"]
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_KINDS: tuple[SnapshotKind, ...] = ("state", "sampler")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TEMPORARY_PREFIX = ".writing-"
_DELETED_PREFIX = ".deleting-"
_CHUNK_BYTES = 4 * 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors reports one


@dataclass(frozen=True)
class FileEntry:
    """One file of a snapshot: size in bytes and sha256 as lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a snapshot is and which files it consists of.

    `kind` is "state" (weights and optimizer, for resuming) or "sampler" (weights for serving). `checkpoint_type` is
    "base", "delta" or "merged_base" for a sampler snapshot and None for state. `created` is unix time in seconds;
    `step` counts the optimizer steps applied. `files` maps a path relative to the folder, with forward slashes.
    """

    kind: SnapshotKind
    name: str
    job_id: str
    base_model: str
    lora_rank: int
    checkpoint_type: str | None
    promotable: bool
    created: float
    step: int
    metadata: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    files: dict[str, FileEntry] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def size_bytes(self) -> int:
        """Of all files, the manifest apart."""
        return sum(entry.size for entry in self.files.values())


class SnapshotInUse(CheckpointError):
    """A snapshot that a live process holds, and that is therefore not deleted."""


class SnapshotHold:
    """Keeps a snapshot from being deleted until `close`, or until this process ends, however it dies.

    Whoever reads or serves a snapshot holds it. Any number of processes may. A context manager.
    """

    def __init__(self, folder: Path) -> None:
        """Hold it; waits while it is just being deleted, and then it is missing.

        Raises:
            CheckpointError: there is no such snapshot.
        """
        try:
            self._descriptor: int | None = os.open(folder / MANIFEST_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise _missing(folder) from None
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def snapshot_dir(checkpoints_dir: Path, job_id: str, kind: SnapshotKind, name: str) -> Path:
    """The folder of one snapshot, which need not exist. CheckpointError when a part cannot be a folder name."""
    for label, part in (("job id", job_id), ("checkpoint name", name)):
        if not _NAME.fullmatch(part):
            raise CheckpointError(
                f"{label} {part!r} cannot be used: it must begin with a letter or digit and have at most 200 letters, "
                "digits, dots, hyphens and underscores. Rename it."
            )
    return checkpoints_dir / job_id / kind / name


def list_manifests(checkpoints_dir: Path, job_id: str) -> list[Manifest]:
    """Manifests of all complete snapshots of a job, of both kinds, oldest first. Half-written and damaged ones do not
    count."""
    manifests = []
    for kind in _KINDS:
        parent = snapshot_dir(checkpoints_dir, job_id, kind, "any").parent
        folders = sorted(parent.iterdir()) if parent.is_dir() else []
        manifests += [manifest for folder in folders if (manifest := _manifest_if_complete(folder)) is not None]
    return sorted(manifests, key=lambda manifest: (manifest.created, manifest.name))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a snapshot. CheckpointError when it is missing, damaged or of an unknown format version."""
    path = folder / MANIFEST_NAME
    try:
        fields = orjson.loads(path.read_bytes())
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {version!r}, this program reads {FORMAT_VERSION}: "
                "use the version of the program that wrote it."
            )
        return _manifest_from_json(fields)
    except FileNotFoundError:
        raise _missing(folder) from None
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): use an older checkpoint.") from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare sizes, then hashes, of all files with the manifest. CheckpointError names the first file that differs."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing: use an older checkpoint.")
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(
                f"checkpoint file {path} has {size} bytes instead of {entry.size}: use an older checkpoint."
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for (name, entry), digest in zip(
            manifest.files.items(), threads.map(_sha256, [folder / name for name in manifest.files]), strict=True
        ):
            if digest != entry.sha256:
                raise CheckpointError(
                    f"checkpoint file {folder / name} is damaged: sha256 {digest}, expected {entry.sha256}. "
                    "Use an older checkpoint."
                )


def write_file(path: Path, pieces: Iterable[memoryview], *, stop: Callable[[], bool] = lambda: False) -> FileEntry:
    """Write one file of a snapshot and flush it, hashing on the way: what is written is not read again.

    Args:
        pieces: of its content, as bytes.
        stop: asked every few megabytes.

    Raises:
        InterruptedError: `stop` said so.
        OSError: for example when the disk is full.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK_BYTES):
                if stop():
                    raise InterruptedError(f"{path} is not written to its end: this process ends")
                chunk = piece[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
            size += len(piece)
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def write_snapshot(
    folder: Path, manifest_without_files: Manifest, write: Callable[[Path], Mapping[str, FileEntry] | None]
) -> Manifest:
    """Make a snapshot at `folder`, whole or not at all, and return its manifest with the files filled in.

    `write` puts the files into the empty folder that it is given, and may say of some what `write_file` said of them.
    The others are flushed and hashed then, the manifest is added, and the folder is renamed into place. After an
    exception nothing is left behind.

    Raises:
        CheckpointError: the name is taken (a snapshot is never overwritten; save under another name), or there is no
            room on the disk.
        OSError, and whatever `write` raises.
    """
    refuse_taken(folder)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=folder.parent))
        temporary.chmod(0o755)
        known = write(temporary) or {}
        manifest = dataclasses.replace(manifest_without_files, files=_flush_and_describe(temporary, known))
        _write_flushed(temporary / MANIFEST_NAME, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        _fsync_folder(temporary)
        refuse_taken(folder)
        temporary.rename(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if (why := _no_room(error)) is not None:
            raise CheckpointError(
                f"checkpoint {folder.name!r} was not saved, there is no room for it: {why}, on the disk of "
                f"{folder.parent} ({_free(folder)} free now). Nothing of it is left. Free space, for example with "
                "`cookbook checkpoints prune`, and save again."
            ) from error
        raise
    _fsync_folder(folder.parent)
    return manifest


def delete_snapshot(folder: Path) -> None:
    """Delete a snapshot that nobody holds. It is renamed first: others see it whole, or not at all.

    Raises:
        SnapshotInUse: a live process loads, serves or copies it.
        CheckpointError: there is no such snapshot.
        OSError: it cannot be renamed or not be deleted whole (`remove_deleted` tries the rest again).
    """
    try:
        descriptor = os.open(folder / MANIFEST_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _missing(folder) from None
    unnamed = folder.with_name(f"{_DELETED_PREFIX}{folder.name}-{secrets.token_hex(4)}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.rename(unnamed)
    except BlockingIOError:
        raise SnapshotInUse(f"checkpoint {folder.name!r} is in use by a live process and was not deleted.") from None
    except FileNotFoundError:
        raise _missing(folder) from None
    finally:
        os.close(descriptor)
    _fsync_folder(folder.parent)
    _remove(unnamed)


def remove_deleted(checkpoints_dir: Path, job_id: str) -> None:
    """Delete what `delete_snapshot` renamed and, killed, did not delete. Any process may do that at any time.

    Raises:
        OSError: some of it cannot be deleted.
    """
    for unnamed in _leftovers(checkpoints_dir, job_id, _DELETED_PREFIX):
        _remove(unnamed)


def remove_leftovers(checkpoints_dir: Path, job_id: str) -> None:
    """Delete what a killed writer of this job left half-written. Only for the process that alone writes for the job."""
    for temporary in _leftovers(checkpoints_dir, job_id, _TEMPORARY_PREFIX):
        shutil.rmtree(temporary, ignore_errors=True)


def _leftovers(checkpoints_dir: Path, job_id: str, prefix: str) -> list[Path]:
    parents = [snapshot_dir(checkpoints_dir, job_id, kind, "any").parent for kind in _KINDS]
    return [folder for parent in parents for folder in parent.glob(f"{prefix}*")]


def _remove(folder: Path) -> None:
    """Delete a folder that another process may be deleting too."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)  # for its error


def _manifest_if_complete(folder: Path) -> Manifest | None:
    """None for what is being written or deleted, which begins with a dot, for what was deleted this very moment, and
    for a damaged one, which is logged: the others can be used all the same."""
    if folder.name.startswith(".") or not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        return load_manifest(folder)
    except CheckpointError as error:
        if folder.exists():
            _log.warning("left out: %s", error)
        return None


def _missing(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint {folder.name!r} at {folder}: {MANIFEST_NAME} is missing. Check the name and the job id."
    )


def refuse_taken(folder: Path) -> None:
    """CheckpointError when there is a snapshot of that name."""
    if folder.exists():
        raise CheckpointError(
            f"checkpoint {folder.name!r} exists already at {folder} and is never overwritten: save under another name."
        )


def _manifest_from_json(fields: dict[str, Any]) -> Manifest:
    files = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
    return Manifest(**{**fields, "files": files})


def _flush_and_describe(folder: Path, known: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """The entries of all files; those that are not known are flushed and hashed."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            _fsync_folder(path)
        elif name in known:
            entries[name] = known[name]
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[name] = FileEntry(path.stat().st_size, _sha256(path))
    return entries


def _no_room(error: BaseException) -> str | None:
    """What the system says of a disk, quota or file-size limit that is reached; None for every other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))) is not None:
        number = int(found[1])
    return os.strerror(number) if number in _FULL else None


def _free(folder: Path) -> str:
    existing = next(parent for parent in folder.parents if parent.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB"


def _write_all(descriptor: int, content: memoryview) -> None:
    """A disk that is nearly full takes a part, and says why only when the rest is tried."""
    while content:
        content = content[os.write(descriptor, content) :]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
