"""An open RL run: beside what all runs have, its data, its sampler and what was sampled, and the reference."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.config import Environment, RLConfig
from cookbook.data.rl import RLData
from cookbook.files import read_json, read_jsonl
from cookbook.provisioning import TrainerHandle
from cookbook.reference import Reference
from cookbook.rollouts.collect import RolloutCollector
from cookbook.rollouts.ledger import RowLedger
from cookbook.rollouts.sampler import RolloutSampler
from cookbook.rollouts.store import ROLLOUTS_FOLDER, RolloutStore
from cookbook.run import Progress, RunDirectory, numbers_fingerprint
from cookbook.tracking.tracker import METRICS_FILE
from tasks.page import show_table
from tasks.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RLRun"]

logger = logging.getLogger(__name__)

ANSWERS_FOLDER = "evaluations"
MIN_TABLE_INTERVAL_S = 10.0
"""Seconds between two updates of the table of completions."""
TABLE_ROWS = 16
REWARD = "reward/mean"


class RLRun(Run):
    """What the tasks of one RL flow run share."""

    config: RLConfig

    def __init__(self, config: RLConfig, directory: RunDirectory, env: Environment) -> None:
        super().__init__(config, directory, env)
        self.answers = directory.path / ANSWERS_FOLDER
        self.data: RLData | None = None
        self.reference_trainer: TrainerHandle | None = None
        self.reference: Reference | None = None
        self.sampler: RolloutSampler | None = None
        self.collector: RolloutCollector | None = None
        self._table_at = float("-inf")

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

    def show_rollouts(self, rows: Sequence[dict[str, Any]]) -> None:
        """Completions of the latest step as a table of the UI, at most every 10 s (an update costs about 11 ms)."""
        if time.monotonic() - self._table_at < MIN_TABLE_INTERVAL_S:
            return
        self._table_at = time.monotonic()
        shown = ("step", "row", "question", "completion", "reward", "advantage", "tokens", "finish", "version")
        table = [{name: row[name] for name in shown} for row in rows[:TABLE_ROWS]]
        try:
            show_table(table, key=f"rollouts-{self.directory.run_id}", description="Completions of one step")
        except Exception as error:  # a server that is busy or gone must not end training
            logger.warning("the table of completions was not updated: %s", error)

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
