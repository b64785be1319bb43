"""What an SFT run will do, counted before anything is provisioned: rows, tokens, steps, resume points, warnings.

Counts only; the rows were checked when the data set was prepared (dataset.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cookbook.data.dataset import SFTDataset
from cookbook.data.epochs import EpochPlan
from cookbook.data.report import BatchedReport, TokenQuantiles

__all__ = ["PreflightReport", "preflight_report"]


@dataclass(frozen=True)
class PreflightReport(BatchedReport):
    """An SFT run in numbers."""

    tokens: TokenQuantiles
    """Of the kept rows."""

    def _table(self) -> list[tuple[str, str]]:
        return [
            ("data set", self.dataset),
            ("rows", f"{self.rows:,} read, {self.kept:,} kept, {self.rows - self.kept:,} dropped"),
            *self._dropped_lines(),
            ("tokens a row", str(self.tokens)),
            *self._training_lines("row"),
        ]


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
    warnings = report.plan_warnings(dataset.renderer.template.end_of_turn is not None)
    if evaluation is not None and evaluation.fingerprint == dataset.fingerprint:
        warnings.append("the evaluation rows are the training rows: the numbers will not show what was learned.")
    return warnings
