"""What a training run will do, counted before anything is provisioned: rows, tokens, steps, resume points, warnings.

Counts only; the rows were checked when the data set was prepared (dataset.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.data.dataset import SFTDataset
from cookbook.data.epochs import EpochPlan

__all__ = ["PreflightReport", "TokenQuantiles", "plural", "preflight_report", "table_markdown", "table_text"]

_LENGTH_WARNING_SHARE = 0.05


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


@dataclass(frozen=True)
class PreflightReport:
    """A run in numbers. `to_text` for a terminal, `to_markdown` for a web page, `to_dict` for a record."""

    dataset: str
    rows: int
    kept: int
    dropped: dict[str, int]
    """Rows by reason, e.g. {"longer than 512 tokens": 3}."""
    dropped_examples: tuple[tuple[int, int], ...]
    """The first dropped rows as (ordinal, tokens)."""
    tokens: TokenQuantiles
    """Of the kept rows."""
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
    warnings: tuple[str, ...]

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
        return dataclasses.asdict(self) | {
            "trained_tokens": self.trained_tokens,
            "resume_points": self.resume_points,
            "dropped_examples": [list(example) for example in self.dropped_examples],
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """Aligned lines for a terminal."""
        return table_text(self._table(), self.warnings)

    def to_markdown(self) -> str:
        """A table and the warnings, for a Prefect artifact."""
        return table_markdown(self._table(), self.warnings)

    def _table(self) -> list[tuple[str, str]]:
        quantiles = self.tokens
        context = self.tokens_per_epoch - self.trained_tokens_per_epoch
        return [
            ("data set", self.dataset),
            ("rows", f"{self.rows:,} read, {self.kept:,} kept, {self.rows - self.kept:,} dropped"),
            *(("dropped", f"{count:,} {reason}{self._named()}") for reason, count in self.dropped.items() if count),
            (
                "tokens a row",
                f"{quantiles.min:,} min, {quantiles.p50:,} median, {quantiles.p90:,} p90, {quantiles.max:,} max",
            ),
            ("tokens an epoch", f"{self.trained_tokens_per_epoch:,} trained, {context:,} context"),
            ("tokens in all", f"{self.trained_tokens:,} trained, {context * self.epochs:,} context"),
            (
                "steps",
                f"{self.total_steps:,} = {plural(self.epochs, 'epoch')} x {self.steps_per_epoch:,} "
                f"(batches of {self.batch_size:,})",
            ),
            ("resume points", self._resume_text()),
            ("evaluation", plural(self.evaluation_rows, "row") if self.evaluation_rows else "none"),
        ]

    def _named(self) -> str:
        names = ", ".join(f"row {ordinal} ({tokens:,})" for ordinal, tokens in self.dropped_examples)
        more = self.rows - self.kept - len(self.dropped_examples)
        return f": {names}" + (f" and {more:,} more" if more else "")

    def _resume_text(self) -> str:
        if self.dcp_save_interval == 0:
            return "no resume point (dcp_save_interval is 0)"
        if self.resume_points == 0:
            return f"no resume point (dcp_save_interval is {self.dcp_save_interval:,}, the run has fewer steps)"
        return f"{self.resume_points:,}, every {plural(self.dcp_save_interval, 'step')}"


def preflight_report(
    dataset: SFTDataset, plan: EpochPlan, *, dcp_save_interval: int, evaluation: SFTDataset | None = None
) -> PreflightReport:
    """Count what training `dataset` by `plan` means. Cheap: works on the counts that `SFTDataset.prepare` made."""
    lengths = dataset.lengths[dataset.kept]
    num_dropped = dataset.num_rows - len(dataset.kept)
    report = PreflightReport(
        dataset=str(dataset.file.path),
        rows=dataset.num_rows,
        kept=len(dataset.kept),
        dropped={f"longer than {dataset.max_seq_len:,} tokens": num_dropped},
        dropped_examples=tuple(dataset.dropped()),
        tokens=TokenQuantiles.of(lengths),
        tokens_per_epoch=int(lengths.sum(dtype=np.int64)),
        trained_tokens_per_epoch=int(dataset.trained[dataset.kept].sum(dtype=np.int64)),
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        dcp_save_interval=dcp_save_interval,
        evaluation_rows=len(evaluation.kept) if evaluation is not None else 0,
        warnings=(),
    )
    return dataclasses.replace(report, warnings=tuple(_warnings(report, dataset, evaluation)))


def _warnings(report: PreflightReport, dataset: SFTDataset, evaluation: SFTDataset | None) -> Sequence[str]:
    warnings = []
    if report.resume_points == 0:
        warnings.append("a run that dies starts over: set weight_sync.dcp_save_interval to save resume points.")
    num_dropped = report.rows - report.kept
    if num_dropped > _LENGTH_WARNING_SHARE * report.rows:
        warnings.append(f"{num_dropped / report.rows:.0%} of the rows are dropped: raise max_seq_len or shorten them.")
    if report.batch_size > report.kept:
        warnings.append(f"batch_size {report.batch_size:,} is above the {report.kept:,} rows: one step is one epoch.")
    if dataset.renderer.template.end_of_turn is None:
        warnings.append("the chat template ends an answer without a special token: the model may not learn to stop.")
    if evaluation is not None and evaluation.fingerprint == dataset.fingerprint:
        warnings.append("the evaluation rows are the training rows: the numbers will not show what was learned.")
    return warnings


def table_text(table: Sequence[tuple[str, str]], warnings: Sequence[str]) -> str:
    """Aligned lines for a terminal."""
    width = max(len(name) for name, _ in table)
    lines = [f"  {name:<{width}}  {value}" for name, value in table]
    return "\n".join(["Pre-flight", *lines, *(f"  warning: {warning}" for warning in warnings)])


def table_markdown(table: Sequence[tuple[str, str]], warnings: Sequence[str]) -> str:
    """A table and the warnings, for a Prefect artifact."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in table]
    quoted = [f"> **Warning:** {warning}\n" for warning in warnings]
    return "\n".join(["## Pre-flight", "", *quoted, "| | |", "|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def plural(count: int, noun: str) -> str:
    """As "1 row", "2 rows"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
