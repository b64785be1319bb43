"""Metrics as JSON lines: `{"step": 12, "time": <unix seconds>, "train/loss": 0.43, ...}`, one line a call.

A resumed run goes on where its commit was: lines of later steps, which will run again, are cut off. Lines are written
through to the operating system but not synced to the disk: metrics are no commit record. Where a step has a metric
twice, the later line counts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from cookbook.errors import CheckpointError
from cookbook.files import append_whole, cut_torn_line
from cookbook.tracking.sink import Metrics, Sink, Start

__all__ = ["MetricsFile"]


class MetricsFile(Sink):
    """Appends to `path`; nothing is touched before `start`."""

    def __init__(self, path: Path, guard: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """`guard` is held for each write: `RunDirectory.guard`."""
        self.path = path
        self._guard = guard
        self._started = False

    def start(self, start: Start) -> None:
        """Cut the file to the restored step; make it when there is none.

        Raises:
            CheckpointError: the file cannot be written, or a line in it is damaged.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._guard():
                cut_torn_line(self.path)
                if self.path.exists():
                    os.truncate(self.path, _end_of_step(self.path, start.step))
            self.path.touch()
        except OSError as error:
            raise self._unwritable(error) from error
        self._started = True

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Append one line. A number that is not finite becomes null, which JSON has.

        Raises:
            CheckpointError: the disk is full or the like.
            LeaseLost: another process has taken the run over.
        """
        if not self._started:
            return
        values = {name: _finite(value) for name, value in metrics.items() if value is not None}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        try:
            with self._guard():
                append_whole(self.path, line.encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written: {error.strerror}. Free space or fix the permissions, then start the run "
            "again; it goes on from its last commit."
        )


def _end_of_step(path: Path, step: int) -> int:
    """Bytes up to and including the last line of `step`. Step 0 means that nothing was committed: keep nothing."""
    end = 0
    if step == 0:
        return end
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row_step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path}, line {number} is not a line of metrics: {line[:80]!r}. Remove the line or the file."
                ) from error
            if row_step > step:
                break
            end += len(line)
    return end


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
