"""Deadlines for calls that have none: the SDK blocks for minutes in constructors and control-plane calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

__all__ = ["MIN_CALL_S", "Deadline", "begin_call", "call_with_deadline"]

MIN_CALL_S = 1.0
"""Least seconds of a control-plane call: a late one is then reported as what was waited for."""

T = TypeVar("T")


class Deadline:
    """A moment on the monotonic clock, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self._end - time.monotonic())

    def for_call(self, least: float = 0.001) -> float:
        """Seconds for the next call: what is left, but never 0, which a client takes for its own default.

        Args:
            least: at least so many, also when less is left.
        """
        return max(self.remaining(), least)

    @property
    def expired(self) -> bool:
        """Whether the moment has passed."""
        return self.remaining() == 0.0


def call_with_deadline(function: Callable[[], T], seconds: float) -> T:
    """Call `function` in a thread of its own, and wait for it no longer than `seconds`.

    A call that is late is abandoned, not ended: its thread is a daemon and its result is dropped. Ctrl-C works while
    waiting.

    Raises:
        TimeoutError: the call is late; also whatever it raises.
    """
    outcome: Future[T] = Future()
    begin_call(function, outcome)
    return outcome.result(seconds)


def begin_call(function: Callable[[], T], outcome: Future[T]) -> None:
    """Call `function` in a daemon thread of its own; what it gives or raises goes to `outcome`, unless that was
    cancelled."""

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            with suppress(InvalidStateError):
                outcome.set_exception(error)
        else:
            with suppress(InvalidStateError):
                outcome.set_result(result)

    threading.Thread(target=run, name="cookbook-deadline", daemon=True).start()
