"""Commits in the background: training goes on while a checkpoint is saved, confirmed and written down.

What is saved and when is decided in tasks/checkpoints.py; what a commit is, in cookbook/checkpoints.py.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from cookbook.checkpoints import PendingCheckpoint
from cookbook.config import RetryConfig
from cookbook.deadlines import Deadline
from cookbook.recovery import is_retried

__all__ = ["Saver"]

CLOSE_TIMEOUT_S = 10.0
"""Seconds that a save under way has to be committed when the run ends before its time."""

logger = logging.getLogger(__name__)


class Saver:
    """At most one commit under way. What goes wrong with it is raised once, by the next call here.

    For use from one thread.
    """

    def __init__(self, retry: RetryConfig, after_commit: Callable[[str], None]) -> None:
        """
        Args:
            retry: how a row that cannot be written is tried again.
            after_commit: called with the name of each commit, in the background; it raises nothing.
        """
        self._retry = retry
        self._after_commit = after_commit
        self._commit: Future[None] | None = None
        self._thread: threading.Thread | None = None

    def begin(self, checkpoint: PendingCheckpoint) -> None:
        """Commit a checkpoint in the background, as soon as the trainer has confirmed it.

        Only after `settle`: with another one under way its rows could change places.
        """
        assert self._commit is None, "the checkpoint before this one is settled first"
        self._commit = Future()
        context = contextvars.copy_context()
        work = (context.run, self._work, checkpoint, self._commit, self._thread)
        self._thread = threading.Thread(target=work[0], args=work[1:], name="cookbook-commit", daemon=True)
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

    def close(self) -> None:
        """For a run that ends before its time: a commit under way has some seconds to come to its end. Raises nothing."""
        deadline = Deadline(CLOSE_TIMEOUT_S)
        try:
            if not self.settle(deadline.remaining()):
                logger.warning("a checkpoint was not confirmed within %g s of the run's end", CLOSE_TIMEOUT_S)
        except Exception as error:
            logger.warning("the last checkpoint is no commit: %s", error)
        if self._thread is not None:
            self._thread.join(deadline.remaining())

    def _work(self, checkpoint: PendingCheckpoint, done: Future[None], before: threading.Thread | None) -> None:
        try:
            paths = checkpoint.confirm()
            self._append(checkpoint, paths)
        except BaseException as error:
            done.set_exception(error)
            return
        done.set_result(None)
        if before is not None:
            before.join()  # its upkeep is older
        self._after_commit(checkpoint.name)

    def _append(self, checkpoint: PendingCheckpoint, paths: dict[str, str]) -> None:
        for pause in self._retry.delays():
            try:
                return checkpoint.append(paths)
            except Exception as error:
                if not is_retried(error):
                    raise
                logger.warning("checkpoint %s is saved, but %s; trying again in %.1f s", checkpoint.name, error, pause)
                time.sleep(pause)
        return checkpoint.append(paths)
