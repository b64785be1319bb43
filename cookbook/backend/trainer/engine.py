"""The queue of a worker: requests in any order on one side, one compute thread in seq_id order on the other.

What need not hold up the compute thread (writing what a save has captured) is done on a second one. Each request is
acknowledged with the id of a future; everything that can be wrong with it fails that future, never the submission. What
the operations do is not known here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from cookbook.backend.trainer.futures import FutureStore
from cookbook.errors import ConfigError, CookbookError

__all__ = ["Deferred", "Engine", "Operation", "failure"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation:
    """One accepted request. `kind` is the last part of its path; `model_id` the model that it is about."""

    kind: str
    model_id: str
    body: bytes


@dataclass(frozen=True)
class Deferred:
    """The rest of an operation: it does not touch the model, and its result is the operation's."""

    finish: Callable[[], dict[str, Any]]


@dataclass
class _Lane:
    """One model's operations that have not run yet; `waiting` maps a seq_id to the id of its future."""

    next_seq: int = 1
    is_queued: bool = False
    waiting: dict[int, tuple[str, Operation]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What the compute thread takes: an operation, where its answer goes, and the model that ends with it."""

    operation: Operation
    request_id: str | None = None
    lane: _Lane | None = None
    ends_model: bool = False


class Engine:
    """Runs `execute` for one operation at a time. Its result is the future's JSON object; an exception fails it.

    The next operation begins when `execute` has returned, also when what it returned is Deferred.

    A CookbookError is the request's own fault (category user); everything else is the server's (category server).
    """

    def __init__(self, execute: Callable[[Operation], dict[str, Any] | Deferred], futures: FutureStore) -> None:
        self._execute = execute
        self._futures = futures
        self._changed = threading.Condition()
        self._ready: deque[_Job] = deque()
        self._lanes: dict[str, _Lane] = {}
        self._deferred: deque[tuple[_Job, Deferred]] = deque()
        self._stopped = False
        threading.Thread(target=self._work, name="compute", daemon=True).start()
        threading.Thread(target=self._finish_deferred, name="deferred", daemon=True).start()

    def submit(self, operation: Operation, seq_id: int) -> str:
        """Accept a model's operation number `seq_id` (from 1) and return the id of its future.

        It runs after all lower numbers have, however late they arrive. The same number with the same body is the same
        operation; with another body it is a new future that has failed already.
        """
        with self._changed:
            lane = self._lanes.setdefault(operation.model_id, _Lane())
            digest = _digest(operation)
            if known := self._futures.digest(operation.model_id, str(seq_id)):
                return self._duplicate(known, digest, operation.model_id, str(seq_id), f"seq_id {seq_id}")
            request_id = self._futures.create(operation.model_id, str(seq_id), digest)
            lane.waiting[seq_id] = (request_id, operation)
            self._advance(lane)
            return request_id

    def submit_once(self, operation: Operation, owner: str, key: str, *, ends_model: bool = False) -> str:
        """Accept an operation outside any sequence, to run after what is ready now; once for each (owner, key).

        With `ends_model` everything else of the operation's model is forgotten when it is done.
        """
        with self._changed:
            digest = _digest(operation)
            if known := self._futures.digest(owner, key):
                return self._duplicate(known, digest, owner, key, key)
            request_id = self._futures.create(owner, key, digest)
            self._ready.append(_Job(operation, request_id, ends_model=ends_model))
            self._changed.notify_all()
            return request_id

    def discard(self, owner: str) -> None:
        """Forget a session or model: its waiting operations and all of its answers. What runs now runs to its end."""
        with self._changed:
            self._discard(owner)

    def run_soon(self, operation: Operation) -> None:
        """Run an operation whose result nobody waits for, after what is ready now."""
        with self._changed:
            self._ready.append(_Job(operation))
            self._changed.notify_all()

    def future(self, request_id: str) -> Future[bytes | None] | None:
        """The future of an accepted request; it yields None when its owner goes. None when there is none (any more)."""
        with self._changed:
            return self._futures.get(request_id)

    @property
    def has_deferred(self) -> bool:
        """Whether the rest of an operation is still to be done."""
        with self._changed:
            return bool(self._deferred)

    def stop(self, timeout_s: float) -> bool:
        """Begin no further operation, and wait for the rests of those before; whether they were done in time."""
        with self._changed:
            self._stopped = True
            return self._changed.wait_for(lambda: not self._deferred, timeout_s)

    def _discard(self, owner: str) -> None:
        if lane := self._lanes.pop(owner, None):
            lane.waiting.clear()
        self._ready = deque(job for job in self._ready if job.operation.model_id != owner)
        self._futures.drop(owner)

    def _duplicate(self, known: bytes, digest: bytes, owner: str, name: str, what: str) -> str:
        """The id for a request whose name was used before: the first one's, or that of a future that has failed."""
        if digest == known:
            return f"{owner}-{name}"
        conflict = f"{name}-{digest.hex()[:16]}"
        if self._futures.digest(owner, conflict) is None:
            message = f"{what} was used before for another request: every operation needs its own."
            self._futures.resolve(self._futures.create(owner, conflict, digest), failure(message, "user"))
        return f"{owner}-{conflict}"

    def _advance(self, lane: _Lane) -> None:
        if not lane.is_queued and lane.next_seq in lane.waiting:
            request_id, operation = lane.waiting.pop(lane.next_seq)
            lane.is_queued = True
            self._ready.append(_Job(operation, request_id, lane))
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._ready) and not self._stopped)
                job = self._ready.popleft()
            answer = self._attempt(job.operation, functools.partial(self._execute, job.operation))
            with self._changed:
                if isinstance(answer, Deferred):
                    self._deferred.append((job, answer))
                    self._changed.notify_all()
                else:
                    self._resolve(job, answer)
                if job.lane is not None:
                    job.lane.is_queued = False
                    job.lane.next_seq += 1
                    self._advance(job.lane)
                if job.ends_model:
                    self._discard(job.operation.model_id)

    def _finish_deferred(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._deferred))
                job, rest = self._deferred[0]
            answer = self._attempt(job.operation, rest.finish)
            assert not isinstance(answer, Deferred), "a rest has no rest"
            with self._changed:
                self._resolve(job, answer)
                self._deferred.popleft()
                self._changed.notify_all()

    def _resolve(self, job: _Job, answer: bytes) -> None:
        if job.request_id is not None:
            self._futures.resolve(job.request_id, answer)

    def _attempt(self, operation: Operation, work: Callable[[], dict[str, Any] | Deferred]) -> bytes | Deferred:
        try:
            result = work()
            if isinstance(result, Deferred):
                return result
            return orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
        except CookbookError as error:
            _log.warning("%s of %s was refused: %s", operation.kind, operation.model_id, error)
            return failure(_message(error), "user")
        except BaseException as error:  # torch's CheckpointException is not an Exception; the thread must go on
            _log.exception("%s of %s failed", operation.kind, operation.model_id)
            return failure(f"{operation.kind} failed in the trainer: {_server_message(error)}", "server")


def _digest(operation: Operation) -> bytes:
    """Of a request: whether another one under the same number is the same one, sent again."""
    return hashlib.sha256(operation.kind.encode() + operation.body).digest()


def failure(message: str, category: Literal["user", "server"]) -> bytes:
    """The answer of a failed future, as the training API's wire protocol has it."""
    return orjson.dumps({"error": message, "category": category})


def _message(error: CookbookError) -> str:
    return " ".join(map(str, error.problems)) if isinstance(error, ConfigError) else str(error)


def _server_message(error: BaseException) -> str:
    text = (str(error) or repr(error)).splitlines()[0]
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory ({text}). Nothing was changed. Send shorter datums, or free memory and try again."
    if isinstance(error, OSError):
        return f"{text}. Nothing was changed. Free disk space or repair the disk, and try again."
    return f"{type(error).__name__}: {text}. The trainer's log has the traceback."
