"""Being told to stop: work that a signal does not tear in two, the signals that end a process, and holding them off.

A signal interrupts the main thread by raising there (Prefect: TerminationSignal; Ctrl-C: KeyboardInterrupt), wherever
that thread is. What must not be torn runs in another thread, and is waited for. What is saved then is decided in
tasks/termination.py.
"""

from __future__ import annotations

import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from cookbook.deadlines import Deadline, begin_call

__all__ = ["Unbroken", "ending_on_signals", "is_interrupt", "undisturbed"]

T = TypeVar("T")

_BEGINS_WITHIN_S = 1.0


def is_interrupt(error: BaseException) -> bool:
    """Whether the process was told to stop: a signal, and nothing that the program itself ran into."""
    return not isinstance(error, Exception | GeneratorExit)


class Unbroken:
    """Work that goes on to its end when the thread that waits for it is interrupted. One piece at a time.

    >>> work = Unbroken()
    >>> work.call(lambda: 1 + 1)
    2
    >>> work.settle(1.0)
    True
    """

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._outcome: Future[Any] | None = None

    def call(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread of its own, with this thread's context variables, and wait for it.

        Interrupted, this raises at once; `settle` then waits for the work.

        Raises:
            whatever the work raises.
        """
        context = contextvars.copy_context()
        outcome: Future[T] = Future()

        def begun() -> T:
            self._begun.set()
            return context.run(work)

        self._begun.clear()
        self._outcome = outcome  # noted before it begins: wherever an interrupt lands, `settle` knows of the work
        begin_call(begun, outcome)
        return outcome.result()

    def settle(self, timeout_s: float) -> bool:
        """Wait for the work under way, if any; whether there is none any more. What it raises is dropped."""
        deadline = Deadline(timeout_s)
        if self._outcome is None or not self._begun.wait(min(timeout_s, _BEGINS_WITHIN_S)):
            return True  # none was begun, or an interrupt came before its thread was made
        try:
            self._outcome.exception(deadline.remaining())
        except TimeoutError:
            return False
        return True


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block with SystemExit (128 + number), so that everything it holds is freed.

    A signal that is ignored, as under nohup, or that somebody else handles, stays as it is. Outside the main thread
    nothing can be done about signals, and nothing is.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold off the signals that would break off a clean-up. They are lost, not put off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
