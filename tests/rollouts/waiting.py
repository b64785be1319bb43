"""Waiting for a server to be in a certain state, and acting then."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

__all__ = ["interrupt", "wait_until", "when"]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def when(condition: Callable[[], bool], act: Callable[[], None]) -> None:
    """Act in a thread of its own as soon as the condition holds, or after 20 s."""

    def run() -> None:
        try:
            wait_until(condition)
        finally:
            act()

    threading.Thread(target=run, daemon=True).start()


def interrupt() -> None:
    """Ctrl-C for the main thread."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
