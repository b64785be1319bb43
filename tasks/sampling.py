"""Sampling the policy: the prompt groups of one step, and the check that sampler and trainer agree."""

from __future__ import annotations

import time
from pathlib import Path

from cookbook.errors import SamplingError
from cookbook.rollouts.check import check_logprobs
from cookbook.rollouts.ledger import CollectedStep
from cookbook.rollouts.trajectories import rollout_metrics, trajectory_rows, write_trajectories
from cookbook.run import Progress
from tasks.record import recorded
from tasks.rl_run import RLRun

__all__ = ["check_sampler", "sample"]

CHECKED_ROWS = 4
"""Rows of which the self-test samples two completions each."""


@recorded(deadline=lambda config: 24 * 3600.0, retried=False)
def sample(run: RLRun, progress: Progress) -> CollectedStep:
    """The prompt groups of the next step, on disk before they are trained; at the end of the data fewer, or none.

    A step that was recorded before the run died is not sampled again. Rows end only when they are trained or rejected:
    whatever fails here, they stay to be sampled. Requests are retried one by one, and each has its own deadline,
    deployment.sample_timeout.

    Raises:
        SamplingError: a row could not be sampled, after all retries.
        RewardError: the reward failed.
    """
    if run.collector is None or run.sync is None or run.sampler is None:
        raise SamplingError("there is no deployment to sample from yet: start_sampler comes first.")
    started = time.perf_counter()
    ledger = run.row_ledger(progress)
    step = run.store.read_step(progress.step, ledger)
    if step is None:
        step = run.collector.collect(ledger, step=progress.step, version=run.sync.version)
        with run.directory.guard():
            run.store.write_step(progress.step, step)
    seconds = time.perf_counter() - started
    sampled = run.sampler.step_completed()
    speed = sampled["sampling/completion_tokens"] / seconds
    run.note({**sampled, **rollout_metrics(step), "perf/sample_wait_s": seconds, "perf/sampled_tokens_per_s": speed})
    _show(run, progress, step)
    return step


def check_sampler(run: RLRun, progress: Progress) -> None:
    """Check that sampler and trainer agree, where they have the same weights."""
    if run.is_synced(progress):
        check_agreement(run)


@recorded(deadline=lambda config: config.step_timeout_s, retried=False)
def check_agreement(run: RLRun) -> dict[str, float]:
    """Compare the sampler's logprobs of a few completions with the trainer's.

    Raises:
        LogprobMismatch: they differ by more than logprob_check_limit: training would be on wrong ratios.
    """
    if run.sampler is None or run.sync is None:
        raise SamplingError("there is no deployment to sample from yet: start_sampler comes first.")
    rows = [run.rows.row(ordinal) for ordinal in range(min(CHECKED_ROWS, run.rows.total_rows))]
    agreement = check_logprobs(
        run.sampler,
        run.client,
        rows,
        version=run.sync.version,
        limit=run.config.logprob_check_limit,
        max_tokens=min(64, run.config.max_completion_tokens),
        seed=run.config.seed,
        timeout_s=run.config.step_timeout_s,
    )
    run.note(agreement.metrics())
    run.say(
        f"sampler and trainer agree: |difference of logprobs| p50 {agreement.p50:.4f}, p99 {agreement.p99:.4f} nats, "
        f"{agreement.outside:.1%} of the ratios outside [0.9, 1.1]"
    )
    return agreement.metrics()


def _show(run: RLRun, progress: Progress, step: CollectedStep) -> None:
    """Completions for people: a table in the UI, and files where the config wants them."""
    if not step.groups:
        return
    number = progress.step + 1
    run.show_rollouts(list(trajectory_rows(number, step.groups, run.tokenizer)))
    if run.config.trajectory_dir is not None:
        run.directory.check_lease()
        write_trajectories(Path(run.config.trajectory_dir), number, step.groups, run.tokenizer)
