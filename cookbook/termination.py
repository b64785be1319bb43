"""Being told to stop: work that a signal does not tear in two, the signals that end a process, and holding them off.

A signal interrupts the main thread by raising there (Prefect: TerminationSignal; Ctrl-C: KeyboardInterrupt), wherever
that thread is. What must not be torn runs in another thread, and is waited for. What is saved then is decided in
tasks/termination.py.
"""

from __future__ import annotations

import contextvars
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar, cast

__all__ = ["Unbroken", "ending_on_signals", "is_interrupt", "undisturbed"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


def is_interrupt(error: BaseException) -> bool:
    """Whether the process was told to stop: a signal, and nothing that the program itself ran into."""
    return not isinstance(error, Exception | GeneratorExit)


class _Outcome(Generic[T]):
    """What a call in another thread gives, or raises.

    Unlike a Future it is safe for a thread that signals interrupt: no lock is held by Python code, so an interrupt
    leaves none locked, and comes through as what it is.
    """

    def __init__(self) -> None:
        self._given: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._answer: tuple[T | None, BaseException | None] | None = None

    @property
    def is_there(self) -> bool:
        """Whether the call has ended."""
        return self._answer is not None

    def settle(self, function: Callable[[], T]) -> None:
        """Call `function`, and keep what comes of it. Once."""
        try:
            self._answer = (function(), None)
        except BaseException as error:
            self._answer = (None, error)
        self._given.put(self._answer)

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for it, in one thread.

        Raises:
            TimeoutError: it is not there within `timeout_s`; also whatever the call raised.
        """
        if self._answer is None:
            try:
                self._given.get(timeout=timeout_s)
            except Empty:
                raise TimeoutError from None
        assert self._answer is not None, "kept before it is given"
        value, error = self._answer
        if error is not None:
            raise error
        return cast("T", value)


class _Piece(Generic[T]):
    """Work that is done once, or never."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._claim = threading.Lock()
        self.outcome: _Outcome[T] = _Outcome()

    def claim(self) -> bool:
        """Have it to oneself, to do it or to see that nobody does; whether nobody else has."""
        return self._claim.acquire(blocking=False)

    def do(self) -> None:
        """Do it, unless it was claimed."""
        if self.claim():
            self.outcome.settle(self._work)


class Unbroken:
    """Work that goes on to its end when the thread that waits for it is interrupted. One piece at a time.

    >>> work = Unbroken()
    >>> work.call(lambda: 1 + 1)
    2
    >>> work.settle(1.0)
    True
    """

    def __init__(self) -> None:
        # One thread for all pieces: an interrupt that lands where Python forgets a dead thread is lost, not raised.
        self._thread: threading.Thread | None = None
        self._given: SimpleQueue[_Piece[Any] | None] = SimpleQueue()
        self._piece: _Piece[Any] | None = None

    def call(self, work: Callable[[], T]) -> T:
        """Do `work` in another thread, with this thread's context variables, and wait for it.

        Interrupted, this raises at once; `settle` then waits for the work.

        Raises:
            whatever the work raises.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._do_all, name="cookbook-unbroken", daemon=True)
            self._thread.start()
        context = contextvars.copy_context()
        piece = _Piece(lambda: context.run(work))
        self._piece = piece
        self._given.put(piece)
        return piece.outcome.result()

    def settle(self, timeout_s: float) -> bool:
        """Wait for the work under way, if any; whether there is none any more. What it raises is dropped.

        Work that was not begun when its wait was interrupted is never done.
        """
        piece = self._piece
        if piece is not None and not piece.claim():
            try:
                piece.outcome.result(timeout_s)
            except TimeoutError:
                if not piece.outcome.is_there:  # it may have raised one itself
                    return False
            except Exception:
                logger.debug("what went on after an interrupt has failed", exc_info=True)
        self._piece = None
        return True

    def close(self) -> None:
        """Let the thread end, after the work under way."""
        self._given.put(None)
        self._thread = None

    def _do_all(self) -> None:
        while (piece := self._given.get()) is not None:
            piece.do()


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
