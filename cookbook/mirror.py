"""The mirror of a run directory: a copy at an fsspec URL that is whole at every moment, and can be resumed from.

Objects first, the pointer last, and what it replaces is deleted after it was read back; so a kill at any moment leaves
the older state or the newer one. Not mirrored: locks, temporary files, what may be secret, W&B's own folder, and the
checkpoints themselves, which lie on the backend. Bringing a mirror back: cookbook/mirror_pull.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from cookbook.errors import CheckpointError, CookbookError
from cookbook.files import file_lock
from cookbook.mirror_store import CHUNK_BYTES, MirroredFile, MirrorStore, Pointer
from cookbook.run import CHECKPOINTS_FILE, RunDirectory
from cookbook.upkeep_record import UPKEEP_FILE, UpkeepRecord, read_upkeep

__all__ = [
    "KNOWN_POINTERS",
    "MIRROR",
    "MIRRORED_COMMIT",
    "CopyCancelled",
    "Mirror",
    "is_mirrored",
    "mirrored_commits",
]

MIRROR = "mirror"
"""Its part of upkeep.json."""
KNOWN_POINTERS = "pointers"
"""There: digests of the pointers that this run directory has written, or was made of."""
MIRRORED_COMMIT = "commit"
"""There: the checkpoint that the mirror goes on from."""

LOCK_FILE = ".mirror.lock"
_LOCK_WAIT_S = 30.0
_NOT_MIRRORED = (".*", UPKEEP_FILE, "wandb", "*.tmp", "*.key", "*.pem", "token", "*credentials*", "*.netrc")
_MAX_ATTEMPTS = 3

logger = logging.getLogger(__name__)


class CopyCancelled(CookbookError):
    """The copy was given up: the run ends."""


class _Changed(CookbookError):
    """A file is not what was hashed a moment ago."""


@dataclass(frozen=True)
class _Seen:
    """A file as it was hashed: it need not be hashed again while nothing of that changes."""

    stamp: tuple[int, int, int]
    entry: MirroredFile


class Mirror:
    """Copies one open run directory to one URL, again and again. For use from one thread at a time; `cancel` apart.

    Fence: nothing is written once another process owns the run, or where a mirror was continued from another copy of
    the run directory. A pointer is never overwritten: a process that was suspended while it wrote one comes too late,
    as the newer owner's has a higher lease epoch.
    """

    def __init__(self, url: str, directory: RunDirectory, record: UpkeepRecord) -> None:
        """Nothing is contacted yet."""
        self.url = url
        self.relied_on: frozenset[str] = frozenset()
        """Checkpoints that the mirror, or the copy under way, goes on from; they must not be deleted."""
        self.active_at = time.monotonic()
        """When the copy under way last got on, on the monotonic clock."""
        self._directory = directory
        self._record = record
        self._store: MirrorStore | None = None
        self._seen: dict[str, _Seen] = {}
        self._uploaded: set[str] = set()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Have the copy under way stop at its next piece, and no further one begin."""
        self._cancelled.set()

    def conflict(self) -> str | None:
        """Why this run may not write there, as far as the mirror says now; None when it may.

        Raises:
            CheckpointError: the mirror cannot be asked.
        """
        newest, _ = self._opened().newest()
        return None if newest is None else self._conflict(newest)

    def push(self, capture: threading.Lock) -> bool:
        """Copy what has changed. False when nothing has.

        Args:
            capture: held while it is settled which checkpoint the copy goes on from.

        Raises:
            CopyCancelled: `cancel` was called; whether the copy counts is open.
            LeaseLost: another process owns the run.
            CheckpointError: the mirror belongs to another run or another copy of this one, cannot be reached, or is
                being written by another process. The whole state that was there is still there.
        """
        with file_lock(self._directory.path / LOCK_FILE, _LOCK_WAIT_S):
            return self._push(capture)

    def _push(self, capture: threading.Lock) -> bool:
        with self._directory.guard():
            pass
        self._got_on()
        store = self._opened()
        newest, torn = store.newest()
        for name in torn:
            logger.info("%s of the mirror is half-written; the one before it counts", name)
        if newest is not None and (conflict := self._conflict(newest)) is not None:
            raise CheckpointError(conflict)
        sizes = store.object_sizes()
        entries = newest.files.values() if newest is not None else ()
        there = {entry.sha256 for entry in entries if sizes.get(entry.sha256) == entry.size}
        with capture:
            commit, commits = self._last_commit()
            on_mirror = newest.commit if newest is not None else None
            self.relied_on = frozenset(name for name in (commit.get("name"), on_mirror) if name)
        files = self._copied(there, commits)
        if newest is not None and (newest.epoch, newest.files) == (self._directory.epoch, files):
            return False
        pointer = Pointer(
            run_id=self._directory.run_id,
            recipe=self._directory.recipe,
            epoch=self._directory.epoch,
            sequence=store.next_sequence(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            path=str(self._directory.path),
            commit=commit.get("name"),
            step=commit.get("step"),
            files=files,
        )
        known = [newest.digest] if newest is not None else []
        self._record.note(MIRROR, {KNOWN_POINTERS: [*known, pointer.digest]})
        store.write_pointer(pointer)
        self._record.note(MIRROR, {KNOWN_POINTERS: [pointer.digest], MIRRORED_COMMIT: pointer.commit})
        self.relied_on = frozenset(name for name in (pointer.commit,) if name)
        self._got_on()
        store.drop_all_but(pointer, sizes)
        self._uploaded.clear()
        return True

    def _conflict(self, newest: Pointer) -> str | None:
        directory = self._directory
        origin = f"written {newest.time} by {newest.path} on {newest.host}, lease epoch {newest.epoch}"
        if newest.run_id != directory.run_id:
            return (
                f"{self.url} is the mirror of run {newest.run_id} ({origin}), not of {directory.run_id}. "
                "Nothing there was touched. Use another folder."
            )
        known = self._record.facts(MIRROR).get(KNOWN_POINTERS) or []
        is_own = (newest.host, newest.path) == (socket.gethostname(), str(directory.path))
        if newest.epoch > directory.epoch or not (is_own or newest.digest in known):
            return (
                f"{self.url} was continued from another copy of run {directory.run_id} ({origin}); this one, "
                f"{directory.path}, has lease epoch {directory.epoch}. Nothing there was touched. Go on with that "
                "copy (`cookbook runs pull` brings it back), or use another folder for this one."
            )
        return None

    def _last_commit(self) -> tuple[dict[str, Any], bytes | None]:
        """The checkpoint that the copy goes on from ({} when there is none), and checkpoints.jsonl as it says that.

        It is read first: what the other files have is as new as the commit, or newer.
        """
        try:
            content = (self._directory.path / CHECKPOINTS_FILE).read_bytes()
        except FileNotFoundError:
            return {}, None
        content = content[: content.rfind(b"\n") + 1]
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        return next((row for row in reversed(rows) if row.get("state_path")), {}), content

    def _copied(self, there: set[str], commits: bytes | None) -> dict[str, MirroredFile]:
        """Every file as it was copied; what the mirror has of it already is not sent again."""
        copied = {}
        if commits is not None:
            entry = copied[CHECKPOINTS_FILE] = MirroredFile(hashlib.sha256(commits).hexdigest(), len(commits))
            self._upload(entry, [commits], there)
        for path in sorted(_paths_below(self._directory.path)):
            if path != CHECKPOINTS_FILE and (found := self._copy(path, there)) is not None:
                copied[path] = found
        self._seen = {path: seen for path, seen in self._seen.items() if path in copied}
        return copied

    def _copy(self, path: str, there: set[str]) -> MirroredFile | None:
        """None for a file that has gone meanwhile: a step's rollouts that no commit needs any more."""
        for _ in range(_MAX_ATTEMPTS):
            entry = self._entry(path)
            if entry is None:
                return None
            with suppress(_Changed):
                self._upload(entry, self._chunks(path, entry), there)
                return entry
        raise CheckpointError(
            f"{self._directory.path / path} changed while it was copied, {_MAX_ATTEMPTS} times. It is tried again."
        )

    def _upload(self, entry: MirroredFile, chunks: Iterable[bytes], there: set[str]) -> None:
        if entry.sha256 not in there and entry.sha256 not in self._uploaded:
            self._opened().write_object(entry, chunks)
            self._uploaded.add(entry.sha256)

    def _entry(self, path: str) -> MirroredFile | None:
        """Size and hash of a file as it is now; hashed only when it has changed since. None when there is none."""
        digest = hashlib.sha256()
        try:
            with (self._directory.path / path).open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
                seen = self._seen.get(path)
                if seen is not None and seen.stamp == stamp:
                    return seen.entry
                size = 0
                for chunk in self._pieces(file, status.st_size):
                    digest.update(chunk)
                    size += len(chunk)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self._directory.path / path} cannot be read: {error.strerror}.") from error
        entry = MirroredFile(digest.hexdigest(), size)
        self._seen[path] = _Seen(stamp, entry)
        return entry

    def _chunks(self, path: str, entry: MirroredFile) -> Iterator[bytes]:
        """The content that was hashed: what was appended to the file since is left to the next copy.

        Raises:
            _Changed: at its end, when it was something else: the file was cut, replaced or removed meanwhile.
        """
        digest, size = hashlib.sha256(), 0
        with suppress(FileNotFoundError), (self._directory.path / path).open("rb") as file:
            for chunk in self._pieces(file, entry.size):
                digest.update(chunk)
                size += len(chunk)
                yield chunk
        if (digest.hexdigest(), size) != (entry.sha256, entry.size):
            self._seen.pop(path, None)
            raise _Changed(path)

    def _pieces(self, file: BinaryIO, size: int) -> Iterator[bytes]:
        left = size
        while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
            self._got_on()
            left -= len(chunk)
            yield chunk

    def _got_on(self) -> None:
        self.active_at = time.monotonic()
        if self._cancelled.is_set():
            raise CopyCancelled

    def _opened(self) -> MirrorStore:
        if self._store is None:
            self._store = MirrorStore(self.url)
        return self._store


def mirrored_commits(log_path: Path) -> set[str]:
    """Checkpoints that the mirror of a run goes on from: if its machine is lost, they are all there is."""
    commit = read_upkeep(log_path).get(MIRROR, {}).get(MIRRORED_COMMIT)
    return {commit} if commit else set()


def is_mirrored(parts: Sequence[str]) -> bool:
    """Whether a file of the run directory, by the parts of its path, belongs into a mirror."""
    return not any(fnmatch(part, pattern) for part in parts for pattern in _NOT_MIRRORED)


def _paths_below(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        above = Path(parent).relative_to(folder).parts
        folders[:] = [name for name in folders if is_mirrored([name])]
        for name in names:
            path = Path(parent, name)
            if is_mirrored([name]) and path.is_file() and not path.is_symlink():
                yield "/".join([*above, name])
