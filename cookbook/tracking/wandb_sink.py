"""Weights & Biases: one W&B run for each start of a run, grouped by the run's id, going on from the restored step.

W&B gets the config and the numbers, nothing else: no console output, no command line, no code, no facts about the
machine. Keys are never in a config. W&B being out of reach never ends a run: metrics.jsonl has all numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook.config import Environment, WandBConfig
from cookbook.tracking.sink import Metrics, Outcome, Sink, Start

__all__ = ["WandbSink"]

TIMEOUT_S = 60.0
"""Seconds that a run waits for W&B when it starts and again when it ends."""

logger = logging.getLogger(__name__)


class WandbSink(Sink):
    """A W&B run, opened when training starts. Off when the config names no project."""

    def __init__(
        self,
        config: WandBConfig,
        env: Environment,
        *,
        log_path: Path,
        run_id: str,
        epoch: int,
        shown: Mapping[str, Any],
    ) -> None:
        """`epoch` counts the starts of the run; `shown` is the config that W&B shows, as JSON data."""
        self._config = config
        self._env = env
        self._log_path = log_path
        self._run_id = run_id
        self._epoch = epoch
        self._shown = shown
        self._run: Any = None
        self._wandb: Any = None

    def start(self, start: Start) -> None:
        """Open the W&B run. Never asks for a key on the terminal."""
        if self._config.project is None or self._env.wandb_mode == "disabled":
            return
        if self._env.wandb_mode == "online" and not self._env.wandb_key_present:
            logger.warning("W&B is off: it has no key. Run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline.")
            return
        import wandb  # half a second, and only needed here

        self._wandb = wandb
        attempt = f"{self._run_id}-{self._epoch}"
        try:
            self._run = wandb.init(
                entity=self._config.entity,
                project=self._config.project,
                id=attempt,
                name=self._name(attempt),
                group=self._run_id,
                config={**self._shown, "run_id": self._run_id, "start": self._epoch, "restored_step": start.step},
                dir=self._log_path,
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_git=True,
                    save_code=False,
                    x_disable_machine_info=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                    init_timeout=TIMEOUT_S,
                    finish_timeout=TIMEOUT_S,
                ),
            )
        except (wandb.errors.Error, OSError) as error:
            logger.warning("W&B is off for this start of the run: %s", error)
            return
        where = Path(self._run.dir).parent if self._run.offline else self._run.url
        logger.info("W&B: %s", where)

    def log_step(self, step: int, metrics: Metrics) -> None:
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)
        except self._wandb.errors.Error as error:
            logger.warning("W&B is off from step %d on: %s", step, error)
            self._run = None

    def finish(self, outcome: Outcome) -> None:
        failed = isinstance(outcome, BaseException)
        self.end({} if isinstance(outcome, BaseException) else outcome.evaluation, failed=failed)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows, which all have the same keys, as a table."""
        if self._run is None or not rows:
            return
        columns = list(rows[0])
        try:
            table = self._wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
            self._run.log({name: table})
        except (self._wandb.errors.Error, OSError) as error:
            logger.warning("W&B has no table %s: %s", name, error)

    def end(self, evaluation: Mapping[str, Mapping[str, float]], *, failed: bool) -> None:
        """Put held-out numbers, by when they were measured or of what, into the summary, and close the W&B run."""
        if self._run is None:
            return
        try:
            for when, values in evaluation.items():
                self._run.summary.update({f"evaluation/{when}/{name}": value for name, value in values.items()})
            self._run.finish(exit_code=1 if failed else 0)
        except (self._wandb.errors.Error, OSError) as error:
            folder = self._log_path / "wandb"
            logger.warning("W&B did not get everything: %s. `wandb sync` uploads what is in %s.", error, folder)
        self._run = None

    def _name(self, attempt: str) -> str:
        if self._config.run_name is None:
            return attempt
        return self._config.run_name if self._epoch == 1 else f"{self._config.run_name}-{self._epoch}"
