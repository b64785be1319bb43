"""One run's tracker: every place that its numbers go to, behind one interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from cookbook.config import Environment, RecipeConfig
from cookbook.errors import LeaseLost
from cookbook.run import Progress, RunDirectory
from cookbook.tracking.metrics_file import MetricsFile
from cookbook.tracking.runner_files import RunnerFiles
from cookbook.tracking.sink import Metrics, Outcome, Sink, Start
from cookbook.tracking.terminal import terminal_progress
from cookbook.tracking.wandb_sink import WandbSink

__all__ = ["METRICS_FILE", "Tracker", "open_tracker"]

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


def open_tracker(config: RecipeConfig, run: RunDirectory, env: Environment) -> Tracker:
    """The tracker of an open run. The runner's status file says "pending" from now on; nothing else is written yet.

    Raises:
        CheckpointError: a file of the runner cannot be written.
    """
    shown = config.model_dump(mode="json")
    return Tracker(
        [
            RunnerFiles(config.runner, env.runner_files, run.guard, first_start=run.epoch == 1),
            MetricsFile(run.path / METRICS_FILE, run.guard),
            WandbSink(config.wandb, env, log_path=run.path, run_id=run.run_id, epoch=run.epoch, shown=shown),
            terminal_progress(run.run_id),
        ],
        accelerators=_accelerators(config),
    )


class Tracker:
    """Passes everything on to its sinks. `finish` is called once, whatever happened; later calls do nothing."""

    def __init__(self, sinks: Sequence[Sink], accelerators: Mapping[str, int]) -> None:
        self._sinks = list(sinks)
        self._accelerators = accelerators

    def rows_read(self, done: int, total: int) -> None:
        """`done` of `total` rows of a data file are read. Before `start`."""
        for sink in self._sinks:
            sink.rows_read(done, total)

    def start(self, progress: Progress, accelerators: Mapping[str, int] | None = None) -> None:
        """Training begins, or goes on from the commit that `progress` is. Call it once, before the first `log_step`.

        metrics.jsonl is cut to the restored step; a W&B run is opened; accelerator-seconds count from now on.

        Args:
            accelerators: type -> number of the trainer's accelerators, where it is known. None = from the config:
                the embedded backend has one CPU; a training shape does not say.

        Raises:
            CheckpointError: metrics.jsonl is damaged or cannot be written.
            LeaseLost: another process has taken the run over.
        """
        start = Start(progress.step, progress.total_steps, accelerators or self._accelerators)
        for sink in self._sinks:
            sink.start(start)

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Record numbers of optimizer step `step` (1 = the first; 0 = before training), named `group/name`.

        Raises:
            CheckpointError: metrics.jsonl cannot be written.
            LeaseLost: another process has taken the run over.
        """
        for sink in self._sinks:
            sink.log_step(step, metrics)

    def event(self, text: str) -> None:
        """Show one line to people."""
        for sink in self._sinks:
            sink.event(text)

    def finish(self, outcome: Outcome) -> None:
        """The run has ended: with its summary, or with the error that ended it. Never raises."""
        sinks, self._sinks = self._sinks, []
        for sink in reversed(sinks):  # the terminal first, so that what follows is readable
            try:
                sink.finish(outcome)
            except LeaseLost:
                logger.info("%s is left as it is: the run is another process's now", type(sink).__name__)
            except Exception:
                logger.exception("%s could not be finished; the run's own records are whole", type(sink).__name__)


def _accelerators(config: RecipeConfig) -> dict[str, int]:
    infra = config.infra
    if config.backend == "embedded":
        return {"CPU": 1}
    return {infra.accelerator_type or "UNKNOWN": (infra.accelerator_count or 1) * (infra.node_count or 1)}
