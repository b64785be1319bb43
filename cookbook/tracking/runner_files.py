"""Files for an outer orchestrator, in the formats of the public cookbook's runner contract. Each is optional.

status_file (replaced)    {"code": 0, "message": "training", "details": [{"@type": "...JobProgress", "percent": 5}]}
                          a google.rpc.Status: code 0 while all is well, else the gRPC code of what ended the run
metadata_file (replaced)  {"metadata": {"tokens": 120000, "accelerator_seconds": {"CPU": 3600}}}
metrics_file (appended)   {"step": 1, "train/loss": 2.3, ...}
output_model_path (once)  {"model_id": "accounts/.../models/my-model", "checkpoint": "step-100", "job_id": "job-abc"}

Tokens and accelerator-seconds add up over all starts of a run.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from cookbook.config import RunnerConfig
from cookbook.errors import CheckpointError, ConfigError, CookbookError, DataError, ModelError, TrainerLost
from cookbook.files import read_json, write_json
from cookbook.tracking.metrics_file import MetricsFile
from cookbook.tracking.sink import STEP_TOKENS, TOTAL_STEPS, GoesOn, Metrics, Outcome, Sink, Start

__all__ = ["RunnerFiles"]

MIN_INTERVAL_S = 1.0
"""Seconds between two replacements of a file while training; changes of state are written at once."""

JOB_PROGRESS = "type.googleapis.com/gateway.JobProgress"
OK, CANCELLED, INVALID_ARGUMENT, FAILED_PRECONDITION, INTERNAL, UNAVAILABLE = 0, 1, 3, 9, 13, 14
"""Codes of google.rpc.Code."""

CHECKPOINT_PATH = re.compile(r"cross_job://(?P<job_id>[^/]+)/.+")

logger = logging.getLogger(__name__)


class RunnerFiles(Sink):
    """Writes the files that are configured. Says "pending" from the start, so that an early end shows as well."""

    def __init__(
        self,
        config: RunnerConfig,
        fallback: Mapping[str, str],
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        first_start: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the folders and write the first status.

        Args:
            config: paths; None falls back to `fallback`, field name -> path, from the environment.
            guard: held for each write: `RunDirectory.guard`. The files are the run's, wherever they lie.
            first_start: whether the run starts for the first time. If not, what the metadata file says is added to.

        Raises:
            CheckpointError: a file cannot be written.
        """
        paths = {name: getattr(config, name) or fallback.get(name) for name in RunnerConfig.model_fields}
        self._paths = {name: Path(path) for name, path in paths.items() if path}
        self._metrics = MetricsFile(self._paths["metrics_file"], guard) if "metrics_file" in self._paths else Sink()
        self._guard = guard
        self._clock = clock
        self._step = self._total_steps = 0
        self._accelerators: Mapping[str, int] = {}
        self._started: float | None = None
        self._written = float("-inf")
        self._tokens, self._seconds = (0, {}) if first_start else self._earlier_metadata()
        if "status_file" in self._paths:
            with guard():
                write_json(self._paths["status_file"], self._status(OK, "pending"))

    def rows_read(self, done: int, total: int) -> None:
        self._replace("status_file", self._status(OK, f"reading rows ({100 * done // max(1, total)}%)"))

    def start(self, start: Start) -> None:
        self._metrics.start(start)
        self._step, self._total_steps, self._accelerators = start.step, start.total_steps, start.accelerators
        self._started = self._clock()
        self._write_progress()

    def log_step(self, step: int, metrics: Metrics) -> None:
        self._metrics.log_step(step, metrics)
        self._step, self._total_steps = step, int(metrics.get(TOTAL_STEPS) or self._total_steps)
        self._tokens += int(metrics.get(STEP_TOKENS) or 0)
        if self._clock() - self._written >= MIN_INTERVAL_S:
            self._write_progress()

    def finish(self, outcome: Outcome) -> None:
        self._replace("metadata_file", self._metadata())
        if isinstance(outcome, GoesOn):
            return
        if isinstance(outcome, BaseException):
            self._replace("status_file", self._status(*_failure(outcome)))
            return
        self._step = self._total_steps = outcome.steps
        if outcome.model is not None:
            path = CHECKPOINT_PATH.fullmatch(outcome.checkpoint_path or "")
            model = {"model_id": outcome.model, "checkpoint": outcome.checkpoint}
            self._replace("output_model_path", model | ({"job_id": path["job_id"]} if path else {}))
        self._replace("status_file", self._status(OK, "completed"))

    def _write_progress(self) -> None:
        self._replace("status_file", self._status(OK, "training"))
        self._replace("metadata_file", self._metadata())
        self._written = self._clock()

    def _status(self, code: int, message: str) -> dict[str, Any]:
        status: dict[str, Any] = {"code": code, "message": message}
        if self._total_steps:
            status["details"] = [{"@type": JOB_PROGRESS, "percent": 100 * self._step // self._total_steps}]
        return status

    def _metadata(self) -> dict[str, Any]:
        elapsed = self._clock() - self._started if self._started is not None else 0.0
        seconds = dict(self._seconds)
        for kind, count in self._accelerators.items():
            seconds[kind] = round(seconds.get(kind, 0) + elapsed * count)
        return {"metadata": {"tokens": self._tokens, "accelerator_seconds": seconds}}

    def _earlier_metadata(self) -> tuple[int, dict[str, int]]:
        path = self._paths.get("metadata_file")
        earlier = (read_json(path) if path is not None else None) or {}
        values = earlier.get("metadata", {})
        return int(values.get("tokens", 0)), dict(values.get("accelerator_seconds", {}))

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        """Training goes on when a file that could be written before no longer can: it is for others to look at.

        Raises:
            LeaseLost: it is another process's to write now.
        """
        if name not in self._paths:
            return
        try:
            with self._guard():
                write_json(self._paths[name], content)
        except CheckpointError as error:
            logger.warning("runner.%s is out of date: %s", name, error)


def _failure(error: BaseException) -> tuple[int, str]:
    """gRPC code and message of what ended a run."""
    if not isinstance(error, Exception):
        return CANCELLED, "Training run cancelled"
    if isinstance(error, ConfigError | DataError | ModelError):
        return INVALID_ARGUMENT, str(error)
    if isinstance(error, TrainerLost):
        return UNAVAILABLE, str(error)
    if isinstance(error, CookbookError):
        return FAILED_PRECONDITION, str(error)
    return INTERNAL, f"{type(error).__name__}: {error}"
