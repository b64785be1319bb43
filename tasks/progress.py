"""The progress artifact of a run: one, updated in place, at most every 10 seconds (an update costs about 11 ms)."""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.page import has_page, post

__all__ = ["ProgressArtifact"]

MIN_INTERVAL_S = 10.0


class ProgressArtifact:
    """Share of the optimizer steps done, as a Prefect artifact with the key `progress-<run id>`."""

    def __init__(self, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = f"progress-{run_id}"
        self._clock = clock
        self._id: UUID | None = None
        self._last = float("-inf")

    def show(self, step: int, total_steps: int, note: str = "") -> str | None:
        """Show `step` of `total_steps`, at most every 10 s and at the last step; what is shown, else None."""
        if self._clock() - self._last < MIN_INTERVAL_S and step < total_steps:
            return None
        self._last = self._clock()
        percent = 100.0 * step / max(1, total_steps)
        description = f"step {step} of {total_steps}" + (f", {note}" if note else "")
        if not has_page():
            return description
        post(self._key, lambda: self._send(percent, description))
        return description

    def _send(self, percent: float, description: str) -> None:
        if self._id is None:
            self._id = create_progress_artifact(percent, key=self._key, description=description)  # type: ignore[assignment]
        else:
            update_progress_artifact(self._id, percent, description=description)
