"""One optimizer step of RL. Never retried by a task: the SDK resends under a sequence id that the trainer knows."""

from __future__ import annotations

from dataclasses import replace

from cookbook.policy_step import policy_step
from cookbook.rollouts.ledger import CollectedStep
from cookbook.run import Progress
from tasks.record import recorded
from tasks.rl_run import RLRun
from tasks.training import adam_params

__all__ = ["score_reference", "train_policy"]

ReferenceLogprobs = list[list[float]]
"""A list a completion, in the order of the groups: nats a token under the reference model."""


def score_reference(run: RLRun, step: CollectedStep) -> ReferenceLogprobs | None:
    """Logprobs of the completions under the reference; None where there is no KL term."""
    if run.reference is None or not step.groups:
        return None
    return reference_logprobs(run, step)


@recorded(deadline=lambda config: 3 * config.step_timeout_s, retried=True)
def reference_logprobs(run: RLRun, step: CollectedStep) -> ReferenceLogprobs:
    """Logprobs of the completions under the reference, whose session is opened again once where it was lost.

    Raises:
        TrainerLost: its trainer is gone, or late.
    """
    assert run.reference is not None
    return run.reference.completion_logprobs(step.groups)


@recorded(deadline=lambda config: config.step_timeout_s, retried=False, unbroken=True)
def train_policy(run: RLRun, step: CollectedStep, reference: ReferenceLogprobs | None, progress: Progress) -> Progress:
    """Forward, backward and AdamW on the groups of `step`; book its rows; return where training goes on.

    Where no group had signal, at the end of the data, its rows are booked and nothing is trained.
    """
    booked = replace(
        progress,
        epoch=step.ledger.next_row // run.rows.num_rows,
        position=step.ledger.next_row,
        open_rows=step.ledger.open_rows,
        data_consumed=step.ledger.trained + step.ledger.rejected,
        rejected_rows=step.ledger.rejected,
        total_steps=run.steps_at_most(progress.step + bool(step.groups), step.ledger),
    )
    if not step.groups:
        if progress.step == 0:
            reasons = ", ".join(sorted({row.reason for row in step.rejected})[:3])
            run.say(f"nothing was trained: all {booked.rejected_rows:,} rows were rejected ({reasons}).")
        return booked
    config = run.config
    result = policy_step(
        run.client,
        step.groups,
        config,
        adam_params(config, config.learning_rate),
        reference_logprobs=reference,
        timeout_s=config.step_timeout_s,
    )
    trained = int(result.metrics["train/trained_tokens"])
    done = replace(booked, step=progress.step + 1, trained_tokens=progress.trained_tokens + trained)
    run.log_step(
        done,
        {
            "train/loss": result.loss_sum / max(1, trained),
            "train/learning_rate": config.learning_rate,
            "train/total_steps": done.total_steps,
            "train/rows": len(step.groups),
            "train/tokens": result.num_tokens,
            "perf/step_s": result.seconds,
            "perf/tokens_per_s": result.num_tokens / result.seconds,
            **result.metrics,
        },
        tokens=result.num_tokens,
        seconds=result.seconds,
    )
    return done
