"""Saves of training state: captured at once, written while training goes on, one after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cookbook.backend.snapshots import Manifest, refuse_taken, write_snapshot
from cookbook.backend.trainer.staging import Staging
from cookbook.backend.trainer.state import TrainingState, write_state

__all__ = ["StateSaves"]

_log = logging.getLogger(__name__)


class StateSaves:
    """At most one save is being written, by another thread than the one that captures."""

    def __init__(self) -> None:
        self._staging = Staging()
        self._changed = threading.Condition()
        self._writing: Path | None = None
        self._is_abandoned = False

    def begin(self, folder: Path, manifest: Manifest, state: TrainingState) -> Callable[[], None] | None:
        """Capture the state, after waiting for the save before this one. What is returned writes it: call it once.

        None where there is no memory for a copy: then the save is written already.

        Raises:
            CheckpointError, OSError: as `write_snapshot`; a taken name shows here, all else when it is written.
        """
        self.wait()
        refuse_taken(folder)
        started = time.monotonic()
        captured = self._staging.capture(state)
        if captured is None:
            self._write(folder, manifest, state)
            return None
        self._writing = folder
        _log.info("state %s: captured in %.2f s", folder.name, time.monotonic() - started)

        def finish() -> None:
            try:
                self._write(folder, manifest, captured)
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()

        return finish

    def wait(self, folder: Path | None = None) -> None:
        """Until the save to this folder (None = any) is no longer being written."""
        with self._changed:
            self._changed.wait_for(lambda: self._writing is None or folder not in (None, self._writing))

    def being_written(self) -> list[str]:
        """The names of checkpoints that are not complete yet."""
        writing = self._writing
        return [] if writing is None else [writing.name]

    def free_memory(self) -> None:
        """Give back what captured states take, once it is not needed any more. The next save allocates it again."""
        self._staging.drop()

    def abandon(self) -> None:
        """Leave off writing, and remove what was written; for the end of the process."""
        self._is_abandoned = True

    def _stop(self) -> bool:
        return self._is_abandoned

    def _write(self, folder: Path, manifest: Manifest, state: TrainingState) -> None:
        started = time.monotonic()
        written = write_snapshot(folder, manifest, lambda target: write_state(target, state, self._stop))
        seconds = time.monotonic() - started
        _log.info("state %s: %.1f MiB written in %.2f s", folder.name, written.size_bytes / 2**20, seconds)
