"""What the pre-flight reports of all recipes share: rows read, kept and dropped, warnings, and how they are written.

The numbers of one recipe: preflight.py, preference_preflight.py, rl_preflight.py.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_RESUME_POINT", "BatchedReport", "Report", "TokenQuantiles", "plural"]

NO_RESUME_POINT = "a run that dies starts over: set weight_sync.dcp_save_interval to save resume points."
_DROPPED_WARNING_SHARE = 0.05


@dataclass(frozen=True)
class TokenQuantiles:
    """Tokens a row: shortest, median, 90th percentile (each the length of an actual row), longest."""

    min: int
    p50: int
    p90: int
    max: int

    @classmethod
    def of(cls, lengths: NDArray[np.integer[Any]]) -> TokenQuantiles:
        """Of a non-empty array of lengths."""
        values = np.quantile(lengths, [0.0, 0.5, 0.9, 1.0], method="higher")
        return cls(*(int(value) for value in values))

    def __str__(self) -> str:
        return f"{self.min:,} min, {self.p50:,} median, {self.p90:,} p90, {self.max:,} max"


@dataclass(frozen=True)
class Report(abc.ABC):
    """A run in numbers. `to_text` for a terminal, `to_markdown` for a web page, `to_dict` for a record."""

    dataset: str
    rows: int
    """Rows considered."""
    kept: int
    dropped: dict[str, int]
    """Rows by reason, e.g. {"longer than 512 tokens": 3}."""
    dropped_examples: tuple[tuple[int, int], ...]
    """The first dropped rows as (ordinal, tokens)."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {
            "dropped_examples": [list(example) for example in self.dropped_examples],
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """Aligned lines for a terminal."""
        table = self._table()
        width = max(len(name) for name, _ in table)
        lines = [f"  {name:<{width}}  {value}" for name, value in table]
        return "\n".join(["Pre-flight", *lines, *(f"  warning: {warning}" for warning in self.warnings)])

    def to_markdown(self) -> str:
        """A table and the warnings, for a Prefect artifact."""
        rows = ["| {} | {} |".format(name, value.replace("|", "\\|")) for name, value in self._table()]
        quoted = [f"> **Warning:** {warning}\n" for warning in self.warnings]
        return "\n".join(["## Pre-flight", "", *quoted, "| | |", "|---|---|", *rows]) + "\n"

    @abc.abstractmethod
    def _table(self) -> list[tuple[str, str]]:
        """The report's lines as (name, text)."""

    def _dropped_lines(self) -> list[tuple[str, str]]:
        names = ", ".join(f"row {ordinal} ({tokens:,})" for ordinal, tokens in self.dropped_examples)
        more = self.rows - self.kept - len(self.dropped_examples)
        named = f": {names}" + (f" and {more:,} more" if more else "")
        return [("dropped", f"{count:,} {reason}{named}") for reason, count in self.dropped.items() if count]

    def dropped_warnings(self, remedy: str) -> list[str]:
        """A warning where more than 5% of the rows are dropped."""
        num_dropped = self.rows - self.kept
        share = f"{num_dropped / self.rows:.0%} of the rows are dropped"
        return [f"{share}: {remedy}."] if num_dropped > _DROPPED_WARNING_SHARE * self.rows else []


@dataclass(frozen=True)
class BatchedReport(Report):
    """Of a run that trains all kept rows in batches of one size, epoch after epoch."""

    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    epochs: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    dcp_save_interval: int
    """Optimizer steps; 0 = never."""
    evaluation_rows: int
    """0 = no evaluation."""

    @property
    def trained_tokens(self) -> int:
        """Trained tokens over all epochs."""
        return self.trained_tokens_per_epoch * self.epochs

    @property
    def resume_points(self) -> int:
        """Checkpoints to resume from that are written during training; the final one does not count."""
        return self.total_steps // self.dcp_save_interval if self.dcp_save_interval else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return super().to_dict() | {"trained_tokens": self.trained_tokens, "resume_points": self.resume_points}

    def _training_lines(self, noun: str) -> list[tuple[str, str]]:
        context = self.tokens_per_epoch - self.trained_tokens_per_epoch
        return [
            ("tokens an epoch", f"{self.trained_tokens_per_epoch:,} trained, {context:,} context"),
            ("tokens in all", f"{self.trained_tokens:,} trained, {context * self.epochs:,} context"),
            (
                "steps",
                f"{self.total_steps:,} = {plural(self.epochs, 'epoch')} x {self.steps_per_epoch:,} "
                f"(batches of {self.batch_size:,})",
            ),
            ("resume points", self._resume_text()),
            ("evaluation", plural(self.evaluation_rows, noun) if self.evaluation_rows else "none"),
        ]

    def _resume_text(self) -> str:
        if self.dcp_save_interval == 0:
            return "no resume point (dcp_save_interval is 0)"
        if self.resume_points == 0:
            return f"no resume point (dcp_save_interval is {self.dcp_save_interval:,}, the run has fewer steps)"
        return f"{self.resume_points:,}, every {plural(self.dcp_save_interval, 'step')}"

    def plan_warnings(self, has_end_of_turn: bool) -> list[str]:
        """What may go wrong in any such run."""
        warnings = [] if self.resume_points else [NO_RESUME_POINT]
        warnings += self.dropped_warnings("raise max_seq_len or shorten them")
        if self.batch_size > self.kept:
            warnings.append(f"batch_size {self.batch_size:,} is above the {self.kept:,} rows: one step is one epoch.")
        if not has_end_of_turn:
            warnings.append(
                "the chat template ends an answer without a special token: the model may not learn to stop."
            )
        return warnings


def plural(count: int, noun: str) -> str:
    """As "1 row", "2 rows"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
