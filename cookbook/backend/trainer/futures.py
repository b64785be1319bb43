"""Futures: what a worker answered or will answer to each accepted request, for as long as its model or session lives.

Large answers wait on disk, so that a long run does not fill the memory. Who owns what and in which order things are
computed is in engine.py.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path

__all__ = ["Answer", "FutureStore", "content"]

Answer = bytes | Path
"""A JSON object, or the file that holds it."""

_MAX_BYTES_IN_MEMORY = 16 * 1024


class FutureStore:
    """Answers by request id, each as the bytes of a JSON object. Not thread-safe: callers hold the engine's lock."""

    def __init__(self, folder: Path) -> None:
        """`folder` is emptied: answers of an earlier process speak of weights that are gone."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._futures: dict[str, Future[Answer | None]] = {}
        self._owned: dict[str, list[str]] = {}

    def create(self, request_id: str, owner: str) -> None:
        """Promise an answer; it lives until `drop(owner)`."""
        self._futures[request_id] = Future()
        self._owned.setdefault(owner, []).append(request_id)

    def get(self, request_id: str) -> Future[Answer | None] | None:
        """The future of an answer (read it with `content`), or None when there is none (any more)."""
        return self._futures.get(request_id)

    def resolve(self, request_id: str, answer: bytes) -> None:
        """Fill in an answer. Nothing happens when the future is gone."""
        future = self._futures.get(request_id)
        if future is not None:
            future.set_result(self._stored(request_id, answer))

    def drop(self, owner: str) -> None:
        """Forget all answers of a model or session. Whoever waits for one gets None."""
        for request_id in self._owned.pop(owner, []):
            future = self._futures.pop(request_id)
            if not future.done():
                future.set_result(None)
            elif isinstance(answer := future.result(), Path):
                answer.unlink(missing_ok=True)

    def _stored(self, request_id: str, answer: bytes) -> Answer:
        if len(answer) <= _MAX_BYTES_IN_MEMORY:
            return answer
        path = self._folder / f"{request_id}.json"
        try:
            path.write_bytes(answer)
        except OSError:  # no room on the disk: memory still does
            path.unlink(missing_ok=True)
            return answer
        return path


def content(answer: Answer) -> bytes:
    """The bytes of an answer. FileNotFoundError when its owner went away meanwhile."""
    return answer.read_bytes() if isinstance(answer, Path) else answer
