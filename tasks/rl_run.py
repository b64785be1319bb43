"""An open RL run: beside what all runs have, the deployment that samples, its weight sync, and the reference."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prefect.artifacts import create_table_artifact

from cookbook.config import Environment, RLConfig
from cookbook.data.rl import RLData
from cookbook.deployments import DeploymentHandle, release_deployments
from cookbook.files import read_json, read_jsonl
from cookbook.provisioning import TrainerHandle
from cookbook.reference import Reference
from cookbook.rollouts.collect import RolloutCollector
from cookbook.rollouts.ledger import RowLedger
from cookbook.rollouts.sampler import RolloutSampler
from cookbook.rollouts.store import RolloutStore
from cookbook.run import Progress, RunDirectory, numbers_fingerprint
from cookbook.tracking.tracker import METRICS_FILE
from cookbook.weight_sync import WeightSync
from tasks.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RLRun"]

logger = logging.getLogger(__name__)

ROLLOUTS_FOLDER = "rollouts"
ANSWERS_FOLDER = "evaluations"
MIN_TABLE_INTERVAL_S = 10.0
"""Seconds between two updates of the table of completions."""
TABLE_ROWS = 16
REWARD = "reward/mean"


class Closeable(Protocol):
    """What holds threads or connections."""

    def close(self) -> None: ...


P = TypeVar("P", bound=Closeable)


class RLRun(Run):
    """What the tasks of one RL flow run share."""

    config: RLConfig

    def __init__(self, config: RLConfig, directory: RunDirectory, env: Environment) -> None:
        super().__init__(config, directory, env)
        self.answers = directory.path / ANSWERS_FOLDER
        self.data: RLData | None = None
        self.deployment: DeploymentHandle | None = None
        self.reference_trainer: TrainerHandle | None = None
        self.reference: Reference | None = None
        self.sync: WeightSync | None = None
        self.synced_step: int | None = None
        """Step whose weights the deployment serves; None = no weight sync in this start of the run."""
        self.sampler: RolloutSampler | None = None
        self.collector: RolloutCollector | None = None
        self._closing = ExitStack()
        """What holds threads and connections, closed before anything is released."""
        self._table_at = float("-inf")
        self._noted: dict[str, float | None] = {}

    def closed_at_end(self, part: P) -> P:
        """Have `part` closed when the run ends, the last one first."""
        self._closing.callback(part.close)
        return part

    @cached_property
    def store(self) -> RolloutStore:
        """What was sampled for each step, under the run's present config and data."""
        fingerprint = numbers_fingerprint(self.config.model_dump(mode="json"), self.rows.fingerprint)
        return RolloutStore(self.directory.path / ROLLOUTS_FOLDER, fingerprint)

    @property
    def rows(self) -> RLData:
        """The data of the run; preflight_rl reads it."""
        assert self.data is not None, "preflight_rl comes first"
        return self.data

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self.rows.train.renderer.tokenizer

    def is_synced(self, progress: Progress) -> bool:
        """Whether the deployment serves the trainer's weights at `progress`."""
        return (self.synced_step or 0) == progress.step

    def rows_left(self, progress: Progress) -> bool:
        """Whether any row is neither trained nor rejected."""
        return self.row_ledger(progress).pending > 0

    def row_ledger(self, progress: Progress) -> RowLedger:
        """The account of the rows at `progress`.

        Raises:
            CheckpointError: it does not add up.
        """
        return RowLedger(
            total=self.rows.total_rows,
            next_row=progress.position,
            open_rows=progress.open_rows,
            trained=progress.data_consumed - progress.rejected_rows,
            rejected=progress.rejected_rows,
        )

    def steps_at_most(self, step: int, ledger: RowLedger) -> int:
        """Optimizer steps of the whole run if no further row is rejected."""
        return step + math.ceil(ledger.pending / self.config.prompt_groups_per_step)

    def note(self, metrics: Mapping[str, float | None]) -> None:
        """Keep numbers until the next step is logged: sampling and weight syncs belong to the step they serve."""
        self._noted |= metrics

    def log_step(self, progress: Progress, metrics: Mapping[str, float | None], *, tokens: int, seconds: float) -> None:
        noted, self._noted = self._noted, {}
        super().log_step(progress, {**noted, **metrics}, tokens=tokens, seconds=seconds)

    def show_rollouts(self, rows: Sequence[dict[str, Any]]) -> None:
        """Completions of the latest step as a table of the UI, at most every 10 s (an update costs about 11 ms)."""
        if time.monotonic() - self._table_at < MIN_TABLE_INTERVAL_S:
            return
        self._table_at = time.monotonic()
        shown = ("step", "row", "question", "completion", "reward", "advantage", "tokens", "finish", "version")
        table = [{name: row[name] for name in shown} for row in rows[:TABLE_ROWS]]
        try:
            create_table_artifact(table, key=f"rollouts-{self.directory.run_id}", description="Completions of one step")
        except Exception as error:  # a server that is busy or gone must not end training
            logger.warning("the table of completions was not updated: %s", error)

    def _release(self, *, delete: bool) -> None:
        try:
            with suppress(Exception):  # what fails here must not keep hardware from being freed
                self._closing.close()
        finally:
            try:
                self._release_deployment()
            finally:
                super()._release(delete=delete)

    def _release_deployment(self) -> None:
        """Of the run's own ones all, also one that was not ready yet when the run ended."""
        if self.has_control:
            release_deployments(self.control, self.ledger)

    def _summary_fields(self, progress: Progress) -> dict[str, Any]:
        return {
            "rows_rejected": progress.rejected_rows,
            "reward": self._reward_ends(),
            "samples": self._samples(progress),
        }

    def _reward_ends(self) -> dict[str, float]:
        """Mean reward of the first and the last tenth of the steps."""
        rewards = [row[REWARD] for row in read_jsonl(self.directory.path / METRICS_FILE) if REWARD in row]
        if not rewards:
            return {}
        tenth = max(1, len(rewards) // 10)
        return {"first": sum(rewards[:tenth]) / tenth, "last": sum(rewards[-tenth:]) / tenth}

    def _samples(self, progress: Progress) -> list[dict[str, str]]:
        """The first held-out rows, with what was answered before and after training."""
        count = self.config.evaluation.num_samples
        found = [read_json(self.answers_file(step)) for step in (0, progress.step)]
        before, after = (answers["answers"][:count] if answers is not None else [] for answers in found)
        return [
            {"prompt": late["prompt"], "before": early["text"], "after": late["text"]}
            for early, late in zip(before, after, strict=False)
            if early["index"] == late["index"]
        ]

    def answers_file(self, step: int) -> Path:
        """Where the greedy answers of an evaluation are kept."""
        return self.answers / f"step-{step:06d}.json"
