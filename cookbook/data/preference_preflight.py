"""What a run on pairs of answers will do, counted before anything is provisioned: pairs, lengths, steps, warnings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cookbook.data.epochs import EpochPlan
from cookbook.data.report import BatchedReport, TokenQuantiles, plural

if TYPE_CHECKING:
    from cookbook.data.preferences import PreferenceDataset

__all__ = ["PreferencePreflightReport", "preference_preflight_report"]

_LENGTH_WARNING_RATIO = 2.0


@dataclass(frozen=True)
class PreferencePreflightReport(BatchedReport):
    """A run on pairs in numbers. A row is a pair; tokens are those of both sides, the prompt counted twice."""

    chosen_tokens: TokenQuantiles
    """Response tokens of the chosen answers of the kept rows."""
    rejected_tokens: TokenQuantiles
    longest_tokens: int
    """Of the longest side of all kept rows, prompt and answer."""
    length_ratio: float
    """Median over the kept rows of response tokens, chosen over rejected."""
    repeated: int
    """Kept rows whose prompt and answers stood in an earlier row."""
    evaluation_rows_trained: int
    """Held-out pairs that are also training pairs."""
    evaluation_rows_dropped: int

    def _table(self) -> list[tuple[str, str]]:
        return [
            ("data set", self.dataset),
            ("pairs", f"{self.rows:,} read, {self.kept:,} kept, {self.rows - self.kept:,} dropped"),
            *self._dropped_lines(),
            ("chosen tokens", str(self.chosen_tokens)),
            ("rejected tokens", str(self.rejected_tokens)),
            ("length ratio", f"{self.length_ratio:.2f} median, chosen to rejected"),
            ("longest side", f"{plural(self.longest_tokens, 'token')}, prompt included"),
            *self._training_lines("pair"),
        ]


def preference_preflight_report(
    train: PreferenceDataset, plan: EpochPlan, *, dcp_save_interval: int, held_out: PreferenceDataset | None = None
) -> PreferencePreflightReport:
    """Count what training `train` by `plan` means. Cheap: works on the counts that `PreferenceDataset.prepare` made."""
    lengths, trained = train.lengths[:, train.kept], train.trained[:, train.kept]
    report = PreferencePreflightReport(
        dataset=str(train.file.path),
        rows=train.num_rows,
        kept=len(train.kept),
        dropped={f"with a side longer than {train.max_seq_len:,} tokens": train.num_rows - len(train.kept)},
        dropped_examples=tuple(train.dropped()),
        chosen_tokens=TokenQuantiles.of(trained[0]),
        rejected_tokens=TokenQuantiles.of(trained[1]),
        longest_tokens=int(lengths.max()),
        length_ratio=float(np.median(trained[0] / trained[1])),
        repeated=train.num_repeated(),
        tokens_per_epoch=int(lengths.sum()),
        trained_tokens_per_epoch=int(trained.sum()),
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        dcp_save_interval=dcp_save_interval,
        evaluation_rows=len(held_out.kept) if held_out is not None else 0,
        evaluation_rows_trained=held_out.num_also_in(train) if held_out is not None else 0,
        evaluation_rows_dropped=held_out.num_rows - len(held_out.kept) if held_out is not None else 0,
        warnings=(),
    )
    warnings = report.plan_warnings(train.renderer.template.end_of_turn is not None)
    return dataclasses.replace(report, warnings=(*warnings, *_warnings(report)))


def _warnings(report: PreferencePreflightReport) -> list[str]:
    warnings = []
    if report.repeated:
        pairs = f"{report.repeated:,} of {plural(report.kept, 'pair')}"
        warnings.append(f"{pairs} stand in the data more than once, prompt and answers: they count more often.")
    if report.length_ratio > _LENGTH_WARNING_RATIO:
        warnings.append(
            f"the chosen answers are {report.length_ratio:.1f} times as long as the rejected ones (median): the model "
            "may learn to write long answers instead of better ones."
        )
    if report.evaluation_rows_trained:
        warnings.append(
            f"{report.evaluation_rows_trained:,} of {plural(report.evaluation_rows, 'held-out pair')} are training "
            "pairs: the numbers will not show what was learned."
        )
    if report.evaluation_rows_dropped:
        dropped = plural(report.evaluation_rows_dropped, "held-out pair")
        warnings.append(f"{dropped} left out: a side is too long.")
    return warnings
