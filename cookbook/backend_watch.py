"""Has the embedded backend started again when it was killed while a run needs it. Its workers outlive it.

A control plane that dies is started again by its supervisor; nobody but its users notices that the supervisor died.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from cookbook import embedded
from cookbook.errors import BackendError

__all__ = ["BackendWatch"]

_EVERY_S = 1.0

logger = logging.getLogger(__name__)


class BackendWatch:
    """Looks every second whether the backend of a home still runs, from its making until `close`.

    A backend that was stopped on purpose has no workers any more, and stays stopped.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._version = embedded.code_version()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cookbook-backend-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more. Does not wait for a start that is under way."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_EVERY_S):
            if embedded.is_up(self._home, self._version) or not embedded.has_workers(self._home):
                continue
            try:
                endpoint = embedded.ensure_running(self._home)
            except BackendError as error:
                logger.warning("the embedded backend was killed and does not start again: %s", error)
            else:
                logger.warning("the embedded backend was killed; it runs again at %s", endpoint.base_url)
