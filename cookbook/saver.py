"""Commits in the background: training goes on while a checkpoint is saved, confirmed and written down.

What is saved and when is decided in tasks/checkpoints.py; what a commit is, in cookbook/checkpoints.py.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from cookbook.checkpoints import PendingCheckpoint
from cookbook.config import RetryConfig
from cookbook.deadlines import Deadline
from cookbook.recovery import retrying

__all__ = ["Saver"]

CLOSE_TIMEOUT_S = 5.0
"""Seconds that a save under way has to be committed when the run ends before its time."""

logger = logging.getLogger(__name__)


class Saver:
    """At most one commit under way. What goes wrong with it is raised once, by the next call here.

    For use from one thread.
    """

    def __init__(self, retry: RetryConfig) -> None:
        """
        Args:
            retry: how a row that cannot be written is tried again.
        """
        self._retry = retry
        self._commit: Future[None] | None = None
        self._thread: threading.Thread | None = None

    def begin(self, checkpoint: PendingCheckpoint, after_commit: Callable[[], None] = lambda: None) -> None:
        """Commit a checkpoint in the background, as soon as the trainer has confirmed it.

        Only after `settle`: with another one under way their rows could change places.

        Args:
            after_commit: called in the background once it is a commit, and after the one of the commit before; it
                raises nothing.
        """
        assert self._commit is None, "the checkpoint before this one is settled first"
        outcome: Future[None] = Future()
        before = self._thread

        def work() -> None:
            try:
                self._append(checkpoint, checkpoint.confirm())
            except BaseException as error:
                outcome.set_exception(error)
                is_commit = False
            else:
                outcome.set_result(None)
                is_commit = True
            if before is not None:
                before.join()
            if is_commit:
                after_commit()

        self._commit = outcome
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(work,), name="cookbook-commit", daemon=True)
        self._thread.start()

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until no commit is under way; whether that is so.

        Args:
            timeout_s: None = for as long as the checkpoint's own deadline lets it take.

        Raises:
            CookbookError: why the last one failed; then it is no commit, and the next one may be begun.
        """
        if self._commit is None:
            return True
        try:
            self._commit.exception(timeout_s)
        except TimeoutError:
            return False
        done, self._commit = self._commit, None
        done.result()
        return True

    def finish(self, timeout_s: float) -> None:
        """`settle`, and wait at most so long for what is done after the commit.

        Raises:
            CookbookError: as `settle`.
        """
        self.settle()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def give_up(self) -> None:
        """No longer wait for what is under way; it may become a commit still."""
        self._commit = self._thread = None

    def close(self) -> None:
        """At a run's untimely end: a commit under way has some seconds to come to its own. Raises nothing."""
        deadline = Deadline(CLOSE_TIMEOUT_S)
        try:
            if not self.settle(deadline.remaining()):
                logger.warning("a checkpoint was not confirmed within %g s of the run's end", CLOSE_TIMEOUT_S)
        except Exception as error:
            logger.warning("the last checkpoint is no commit: %s", error)
        if self._thread is not None:
            self._thread.join(deadline.remaining())

    def _append(self, checkpoint: PendingCheckpoint, paths: dict[str, str]) -> None:
        def warn(error: Exception, pause: float) -> None:
            logger.warning("checkpoint %s is saved, but %s; trying again in %.1f s", checkpoint.name, error, pause)

        retrying(self._retry, lambda: checkpoint.append(paths), warn)
