"""Calling code that a model's text can hang or crash: in worker processes that are killed when they are late.

A big power, a regular expression or a symbolic comparison may hold Python's lock for hours, so a thread with a limit
would freeze the run. The workers get no environment: what they run on a model's text finds no keys there.
"""

from __future__ import annotations

import atexit
import functools
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import orjson

from cookbook.deadlines import Deadline
from cookbook.errors import RewardError

__all__ = ["Late", "call_isolated"]

START_LIMIT_S = 120.0
_IMPORT_S = 5.0  # what a task imports, on top of the limit of the first text
_CODE = "import sys; sys.path[:] = {path!r}; from cookbook.rewards.worker import main; main()"


class Late(Exception):
    """The call took too long, too much memory, or crashed its worker. The worker is gone."""


def call_isolated(task: str, arguments: dict[str, Any], limit_s: float) -> Any:
    """Result of `task` (worker.py) with `arguments`, both of JSON's types, within `limit_s` seconds.

    Blocks; waits for a free worker first, which does not count.

    Raises:
        Late: no result in time. Nothing else is affected.
        RewardError: the worker cannot be started, or the task raised (a missing package, a wrong argument).
    """
    with _workers().taken() as worker:
        answer = worker.ask({"task": task, "arguments": arguments, "limit_s": limit_s}, limit_s)
    if "error" in answer:
        raise RewardError(str(answer["error"]))
    return answer["result"]


class _Worker:
    """One process, started when it is first asked and again after it was late."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if self._process is None:  # what the task imports counts against the first text
            limit_s += _IMPORT_S
            request = request | {"limit_s": limit_s}
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))
            process.stdin.flush()
            answer = _read_line(process, Deadline(limit_s))
        except BrokenPipeError:
            answer = None
        except BaseException:
            self.stop()  # its answer to come would be taken for the next one
            raise
        if answer is None:
            self.stop()
            raise Late
        parsed: dict[str, Any] = orjson.loads(answer)
        return parsed

    def _start(self) -> subprocess.Popen[bytes]:
        code = _CODE.format(path=[entry or os.getcwd() for entry in sys.path])
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},  # tasks that depend on the order of a set make the same rows each time
        )
        self._process = process
        if _read_line(process, Deadline(START_LIMIT_S)) != b"ready":
            self.stop()
            raise RewardError(
                f"a worker for rewards did not start within {START_LIMIT_S:g} s (exit status {process.returncode}). "
                "Free memory and start again."
            )
        return process

    def stop(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # what was not written any more
                    pipe.close()


def _read_line(process: subprocess.Popen[bytes], deadline: Deadline) -> bytes | None:
    """The next line, or None when it is not there in time or the process ended."""
    assert process.stdout is not None
    descriptor, line = process.stdout.fileno(), b""
    while not line.endswith(b"\n"):
        if not select.select([descriptor], [], [], deadline.remaining())[0]:
            return None
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return None
        line += chunk
    return line[:-1]


class _Pool:
    def __init__(self, size: int) -> None:
        self._idle = [_Worker() for _ in range(size)]
        self._all = tuple(self._idle)
        self._free = threading.Semaphore(size)

    @contextmanager
    def taken(self) -> Iterator[_Worker]:
        with self._free:
            worker = self._idle.pop()
            try:
                yield worker
            finally:
                self._idle.append(worker)

    def stop(self) -> None:
        for worker in self._all:
            worker.stop()


@functools.cache
def _workers() -> _Pool:
    pool = _Pool(max(1, min(4, (os.cpu_count() or 1) // 2)))
    atexit.register(pool.stop)
    return pool
