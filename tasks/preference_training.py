"""One optimizer step on pairs of answers. Never retried by a task: the SDK resends under a sequence id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cookbook.data.preferences import PairBatch
from cookbook.losses.preference import PairReference
from cookbook.preference_step import preference_step
from cookbook.run import Progress
from tasks.preference_run import PreferenceRun
from tasks.record import recorded
from tasks.training import adam_params

__all__ = ["train_pairs"]


@recorded(deadline=lambda config: config.step_timeout_s, retried=False, unbroken=True)
def train_pairs(
    run: PreferenceRun, batch: PairBatch, references: Sequence[PairReference] | None, progress: Progress
) -> Progress:
    """Forward, backward and AdamW on one batch of pairs; log its metrics; return where training goes on.

    Args:
        references: one a pair, in their order; None for an objective without a reference.
    """
    config = run.config
    learning_rate = config.learning_rate_at(progress.step, progress.total_steps)
    result = preference_step(
        run.client,
        batch.pairs,
        run.objective,
        adam_params(config, learning_rate),
        references=references,
        grad_accumulation_normalization=config.grad_accumulation_normalization,
        timeout_s=config.step_timeout_s,
    )
    done = replace(
        progress,
        step=progress.step + 1,
        epoch=batch.next.epoch,
        position=batch.next.row,
        data_consumed=progress.data_consumed + len(batch.pairs),
        trained_tokens=progress.trained_tokens + result.num_trained,
    )
    run.log_step(
        done,
        {
            "train/loss": result.loss,
            "train/learning_rate": learning_rate,
            "train/epoch": batch.epoch + 1,
            "train/rows": len(batch.pairs),
            "train/trained_tokens": result.num_trained,
            "train/tokens": result.num_tokens,
            "perf/step_s": result.seconds,
            "perf/tokens_per_s": result.num_tokens / result.seconds,
            **result.metrics,
        },
        tokens=result.num_tokens,
        seconds=result.seconds,
    )
    return done
