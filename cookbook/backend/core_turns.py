"""Turns at the cores of one machine: workers that each use all of them compute one after the other.

Two workers with a thread a core do not share a machine well: whenever the system has one thread of a worker wait, its
other threads wait for it at the end of each small product. A policy and a reference trainer, side by side on two cores,
each took three times the CPU time that they need alone. Only speed depends on it, never a result.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CoreTurns"]

_POLL_S = 0.005
_LONGEST_WAIT_S = 30.0
"""Then a worker computes beside the others: whoever holds the turn may be stopped, or have a very long operation."""

_log = logging.getLogger(__name__)


class CoreTurns:
    """The turns of one worker, kept by two file locks that end with their process.

    Who waits for the turn holds the place in the queue; who had the turn has to get that place first. So workers
    alternate, and none can take turn after turn while another waits.
    """

    def __init__(self, folder: Path, *, threads: int) -> None:
        """
        Args:
            folder: the same for all workers that share the cores.
            threads: of this worker. One that leaves half of the cores to others takes no turns.
        """
        self._is_needed = 2 * threads > _num_cores() > 1
        self._folder = folder
        self._wait_s = _LONGEST_WAIT_S

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the turn, or go on without it after 30 s; after that, do not wait until it was free once."""
        turn = self._take() if self._is_needed else None
        try:
            yield
        finally:
            if turn is not None:
                os.close(turn)

    def _take(self) -> int | None:
        """A descriptor that holds the turn; None = go on without it."""
        end = time.monotonic() + self._wait_s
        try:
            queue = _lock(self._folder / "queue.lock", end)
            try:
                turn = _lock(self._folder / "turn.lock", end)
            finally:
                os.close(queue)
        except BlockingIOError:
            if self._wait_s:
                _log.warning("another worker has held the cores for %g s, computing beside it", self._wait_s)
            self._wait_s = 0.0
            return None
        except OSError as error:  # there are no file locks here
            _log.warning("workers on this machine take no turns at its cores: %s", error)
            self._is_needed = False
            return None
        self._wait_s = _LONGEST_WAIT_S
        return turn


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lock(path: Path, end: float) -> int:
    """A descriptor that holds the lock. BlockingIOError when it was not free before `end`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_POLL_S)
    except BaseException:
        os.close(descriptor)
        raise
