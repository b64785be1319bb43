"""Futures: what a worker answered or will answer to each accepted request, for as long as its model or session lives.

Answers wait on disk, so that the memory of a run of a million steps is that of a run of ten. Who owns what and in which
order things are computed is in engine.py.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["FutureStore"]

_log = logging.getLogger(__name__)

_TABLE = "create table answers (name text primary key, digest blob not null, answer blob not null)"


@dataclass(frozen=True)
class _Promise:
    """A future that is in memory: not answered yet, or there was no room for its answer on the disk."""

    owner: str
    name: str
    digest: bytes
    future: Future[bytes | None] = field(default_factory=Future)


class FutureStore:
    """Answers by request id, each the bytes of a JSON object. Not thread-safe: callers hold the engine's lock.

    A request id is `{owner}-{name}`. The answers of one owner are one SQLite file: 20 us to write a small one, and as
    good as no memory. Nothing is synced to the disk, as no answer outlives its process.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is emptied: answers of an earlier process speak of weights that are gone."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._promises: dict[str, _Promise] = {}
        self._files: dict[str, sqlite3.Connection] = {}

    def create(self, owner: str, name: str, digest: bytes) -> str:
        """Promise an answer, which lives until `drop(owner)`; returns its request id. `digest` is of the request."""
        request_id = f"{owner}-{name}"
        self._promises[request_id] = _Promise(owner, name, digest)
        return request_id

    def digest(self, owner: str, name: str) -> bytes | None:
        """The digest of the request that was promised an answer under this name; None when there was none."""
        promise = self._promises.get(f"{owner}-{name}")
        if promise is not None:
            return promise.digest
        return self._read(owner, name, "digest")

    def get(self, request_id: str) -> Future[bytes | None] | None:
        """The future of an answer, or None when there is none (any more)."""
        promise = self._promises.get(request_id)
        if promise is not None:
            return promise.future
        for owner in self._files:
            if request_id.startswith(f"{owner}-"):
                answer = self._read(owner, request_id.removeprefix(f"{owner}-"), "answer")
                if answer is not None:
                    done: Future[bytes | None] = Future()
                    done.set_result(answer)
                    return done
        return None

    def resolve(self, request_id: str, answer: bytes) -> None:
        """Fill in an answer. Nothing happens when the future is gone."""
        promise = self._promises.get(request_id)
        if promise is None:
            return
        try:
            self._file(promise.owner).execute(
                "insert into answers values (?, ?, ?)", (promise.name, promise.digest, answer)
            )
            del self._promises[request_id]
        except (OSError, sqlite3.Error) as error:
            _log.warning("the answer to %s stays in memory, its file cannot be written: %s", request_id, error)
        promise.future.set_result(answer)

    def drop(self, owner: str) -> None:
        """Forget all answers of a model or session. Whoever waits for one gets None."""
        for request_id in [key for key, promise in self._promises.items() if promise.owner == owner]:
            future = self._promises.pop(request_id).future
            if not future.done():
                future.set_result(None)
        if (file := self._files.pop(owner, None)) is not None:
            file.close()
        self._path(owner).unlink(missing_ok=True)

    def _read(self, owner: str, name: str, column: str) -> bytes | None:
        file = self._files.get(owner)
        row = file and file.execute(f"select {column} from answers where name = ?", (name,)).fetchone()
        return bytes(row[0]) if row else None

    def _file(self, owner: str) -> sqlite3.Connection:
        """The file of an owner, made when there is none."""
        if owner not in self._files:
            self._path(owner).unlink(missing_ok=True)  # a first attempt may have found no room for the table
            file = sqlite3.connect(self._path(owner), isolation_level=None, check_same_thread=False)
            try:
                file.execute("pragma journal_mode=memory")
                file.execute("pragma synchronous=off")
                file.execute(_TABLE)
            except sqlite3.Error:
                file.close()
                raise
            self._files[owner] = file
        return self._files[owner]

    def _path(self, owner: str) -> Path:
        return self._folder / f"{owner}.sqlite"
