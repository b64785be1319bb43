"""One optimizer step of SFT. Never retried by a task: the SDK resends under a sequence id that the trainer knows."""

from __future__ import annotations

import time
from dataclasses import replace

from fireworks.training.sdk import AdamParams

from cookbook.config import RecipeConfig, SFTConfig
from cookbook.data import Batch
from cookbook.data.datums import datum_from_row, token_mean_weights
from cookbook.run import Progress
from tasks.record import recorded
from tasks.run import Run

__all__ = ["adam_params", "train"]


@recorded(deadline=lambda config: config.step_timeout_s, retried=False, unbroken=True)
def train(run: Run, batch: Batch, progress: Progress) -> Progress:
    """Forward, backward and AdamW on one batch; log its metrics; return where training goes on.

    The loss is the mean of the negative log-likelihood over the trained tokens of the batch, in nats: the weights of
    the batch sum to 1; where the trainer normalizes (grad_accumulation_normalization), it gets them as they are.
    """
    config = run.config
    assert isinstance(config, SFTConfig)
    started = time.perf_counter()
    normalized = config.grad_accumulation_normalization in (None, "none")
    weights = token_mean_weights(batch.rows) if normalized else [row.weights for row in batch.rows]
    datums = [datum_from_row(row.tokens, w) for row, w in zip(batch.rows, weights, strict=True)]
    result = run.client.train_step(
        datums,
        "cross_entropy",
        adam_params(config, config.learning_rate_at(progress.step, progress.total_steps)),
        grad_accumulation_normalization=config.grad_accumulation_normalization,
        timeout_s=config.step_timeout_s,
    )
    seconds = time.perf_counter() - started
    done = replace(
        progress,
        step=progress.step + 1,
        epoch=batch.next.epoch,
        position=batch.next.row,
        data_consumed=progress.data_consumed + len(batch.rows),
        trained_tokens=progress.trained_tokens + batch.num_trained,
    )
    num_tokens = sum(len(row.tokens) for row in batch.rows)
    run.log_step(
        done,
        {
            "train/loss": result.loss_sum / (1.0 if normalized else batch.num_trained),
            "train/learning_rate": config.learning_rate_at(progress.step, progress.total_steps),
            "train/grad_norm": result.metrics.get("grad_norm"),  # not every trainer reports it
            "train/epoch": batch.epoch + 1,
            "train/rows": len(batch.rows),
            "train/trained_tokens": batch.num_trained,
            "train/tokens": num_tokens,
            "perf/step_s": seconds,
            "perf/tokens_per_s": num_tokens / seconds,
        },
        tokens=num_tokens,
        seconds=seconds,
    )
    return done


def adam_params(config: RecipeConfig, learning_rate: float) -> AdamParams:
    """Optimizer settings of a step."""
    adam = config.adam
    return AdamParams(
        learning_rate=learning_rate,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip_norm=adam.grad_clip_norm,
    )
