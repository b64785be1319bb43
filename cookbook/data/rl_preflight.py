"""What an RL run will do, counted before anything is provisioned: prompts, groups, steps, syncs, warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cookbook.config import RLConfig
from cookbook.data.epochs import EpochPlan
from cookbook.data.report import NO_RESUME_POINT, Report, TokenQuantiles, plural

if TYPE_CHECKING:
    from cookbook.data.rl import RLDataset

__all__ = ["RLPreflightReport", "rl_preflight_report"]


@dataclass(frozen=True)
class RLPreflightReport(Report):
    """An RL run in numbers."""

    rows_in_file: int
    """Of them, `rows` are considered, by max_rows."""
    prompt_tokens: TokenQuantiles
    """Of the kept rows."""
    max_completion_tokens: int
    reward: str
    epochs: int
    prompt_groups_per_step: int
    completions_per_prompt: int
    max_steps: int
    """Optimizer steps if no group is rejected; rejected groups make fewer."""
    weight_sync_interval: int
    """Optimizer steps; 0 = never."""
    dcp_save_interval: int
    """Optimizer steps; 0 = never."""
    kl: str
    evaluation_rows: int
    """0 = no evaluation."""
    evaluation_rows_trained: int
    """Held-out rows whose prompt is also a training prompt."""

    @property
    def max_completions(self) -> int:
        """Completions sampled for training over the whole run, rejected ones included."""
        return self.kept * self.epochs * self.completions_per_prompt

    @property
    def max_resume_points(self) -> int:
        """Checkpoints to resume from that are written during training, at most; the final one does not count."""
        return self.max_steps // self.dcp_save_interval if self.dcp_save_interval else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return super().to_dict() | {
            "max_completions": self.max_completions,
            "max_resume_points": self.max_resume_points,
        }

    def _table(self) -> list[tuple[str, str]]:
        return [
            ("data set", self.dataset),
            (
                "rows",
                f"{self.rows:,} of {self.rows_in_file:,} read, {self.kept:,} kept, {self.rows - self.kept:,} dropped",
            ),
            *self._dropped_lines(),
            ("prompt tokens", str(self.prompt_tokens)),
            ("completions", self._completions_text()),
            ("reward", self.reward),
            ("steps", self._steps_text()),
            ("weight syncs", self._interval_text(self.weight_sync_interval, "never")),
            ("KL term", self.kl),
            ("resume points", self._interval_text(self.dcp_save_interval, "none (dcp_save_interval is 0)")),
            ("evaluation", plural(self.evaluation_rows, "row") if self.evaluation_rows else "none"),
        ]

    def _completions_text(self) -> str:
        prompts = plural(self.kept * self.epochs, "prompt")
        each = f"each up to {plural(self.max_completion_tokens, 'token')}"
        return f"{self.max_completions:,} = {prompts} x {self.completions_per_prompt:,}, {each}"

    def _steps_text(self) -> str:
        groups = plural(self.prompt_groups_per_step, "prompt group")
        return f"up to {self.max_steps:,} in {plural(self.epochs, 'epoch')}, {groups} a step"

    @staticmethod
    def _interval_text(interval: int, never: str) -> str:
        return f"every {plural(interval, 'step')}" if interval > 1 else "every step" if interval else never


def rl_preflight_report(
    config: RLConfig, train: RLDataset, plan: EpochPlan, held_out: RLDataset | None
) -> RLPreflightReport:
    """Count what training the rows of `train` means. Cheap: works on the counts that `RLDataset.prepare` made."""
    num_dropped = train.num_rows - len(train.kept)
    report = RLPreflightReport(
        dataset=train.source,
        rows_in_file=len(train.file),
        rows=train.num_rows,
        kept=len(train.kept),
        dropped={f"prompt longer than {train.max_prompt_tokens:,} tokens": num_dropped},
        dropped_examples=tuple(train.dropped()),
        prompt_tokens=TokenQuantiles.of(train.lengths[train.kept]),
        max_completion_tokens=config.max_completion_tokens,
        reward=config.reward,
        epochs=plan.epochs,
        prompt_groups_per_step=config.prompt_groups_per_step,
        completions_per_prompt=config.completions_per_prompt,
        max_steps=-(-len(train.kept) * plan.epochs // config.prompt_groups_per_step),
        weight_sync_interval=config.weight_sync.weight_sync_interval,
        dcp_save_interval=config.weight_sync.dcp_save_interval,
        kl=_kl_text(config),
        evaluation_rows=len(held_out.kept) if held_out is not None else 0,
        evaluation_rows_trained=held_out.num_also_in(train) if held_out is not None else 0,
        warnings=(),
    )
    return dataclasses.replace(report, warnings=tuple(_warnings(report, train, held_out)))


def _kl_text(config: RLConfig) -> str:
    if config.active_kl_beta:
        return f"beta {config.active_kl_beta:g}, {config.kl_estimator}"
    return "off" if config.kl_beta == 0 else "off: there is no reference"


def _warnings(report: RLPreflightReport, train: RLDataset, held_out: RLDataset | None) -> Sequence[str]:
    warnings = []
    if report.weight_sync_interval == 0:
        warnings.append("the sampler never gets the trained weights: weight_sync.weight_sync_interval is 0.")
    if report.max_resume_points == 0:
        warnings.append(NO_RESUME_POINT)
    warnings += report.dropped_warnings("lower max_completion_tokens or shorten the prompts")
    if report.prompt_groups_per_step > report.kept * report.epochs:
        groups = f"prompt_groups_per_step {report.prompt_groups_per_step:,}"
        warnings.append(f"{groups} is above the {report.kept * report.epochs:,} rows of the run: there is one step.")
    if train.renderer.template.end_of_turn is None:
        warnings.append("the chat template ends an answer without a special token: completions may not end.")
    if report.evaluation_rows_trained:
        warnings.append(
            f"{report.evaluation_rows_trained:,} of {report.evaluation_rows:,} held-out prompts are training prompts: "
            "the numbers will not show what was learned. Take other rows (of a task of reasoning-gym: a seed that is "
            "further away than there are rows)."
        )
    if held_out is not None and len(held_out.kept) < held_out.num_rows:
        count = held_out.num_rows - len(held_out.kept)
        warnings.append(f"{plural(count, 'held-out row')} left out: the prompt is too long.")
    return warnings
