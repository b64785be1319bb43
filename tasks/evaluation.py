"""Held-out evaluation of the policy: on its trainer, teacher-forced, or by greedy answers of its deployment."""

from __future__ import annotations

from functools import partial

from cookbook.config import SFTConfig
from cookbook.data.sft import SFTData
from cookbook.errors import SamplingError
from cookbook.evaluation import evaluate_greedy, evaluate_held_out, evaluate_preferences
from cookbook.files import write_json
from cookbook.run import Progress
from tasks.preference_run import DPORun, PreferenceRun
from tasks.record import recorded
from tasks.references import is_untrained, known_references
from tasks.rl_run import RLRun
from tasks.run import Run

__all__ = ["evaluate", "evaluate_pairs", "evaluate_rewards"]


def evaluate(run: Run, data: SFTData, progress: Progress) -> None:
    """Evaluate on the held-out rows, unless there are none or this step was evaluated already."""
    if data.held_out is not None and progress.step not in run.evaluations():
        held_out_loss(run, data, progress)


@recorded(deadline=lambda config: config.evaluation.timeout_s, retried=True, persist=True)
def held_out_loss(run: Run, data: SFTData, progress: Progress) -> dict[str, float]:
    """Loss (nats a token), token accuracy and exact match over the held-out rows."""
    assert isinstance(run.config, SFTConfig)
    result = evaluate_held_out(run.client, data.held_out_rows(), timeout_s=run.config.evaluation.timeout_s)
    values = result.to_dict()
    run.log_evaluation(progress, values)
    return values


def evaluate_pairs(run: PreferenceRun, progress: Progress) -> None:
    """Evaluate on the held-out pairs, unless there are none or this step was evaluated already."""
    if run.pairs.held_out is not None and progress.step not in run.evaluations():
        held_out_preferences(run, progress)


@recorded(deadline=lambda config: config.evaluation.timeout_s, retried=True, persist=True)
def held_out_preferences(run: PreferenceRun, progress: Progress) -> dict[str, float]:
    """Loss, and how often the chosen answer is preferred, over the held-out pairs."""
    result = evaluate_preferences(
        run.client,
        run.pairs.held_out_pairs(),
        run.objective,
        partial(known_references, run) if isinstance(run, DPORun) else None,
        is_reference=is_untrained(run, progress),
        timeout_s=run.config.evaluation.timeout_s,
    )
    values = result.to_dict()
    run.log_evaluation(progress, values)
    return values


def evaluate_rewards(run: RLRun, progress: Progress) -> None:
    """Answer the held-out rows, unless there are none, this step was evaluated, or the sampler has other weights."""
    is_done = progress.step in run.evaluations()
    if run.rows.held_out is not None and run.is_synced(progress) and not is_done:
        greedy_reward(run, progress)


@recorded(deadline=lambda config: config.evaluation.timeout_s, retried=True, persist=True)
def greedy_reward(run: RLRun, progress: Progress) -> dict[str, float]:
    """Mean reward of greedy answers to the held-out rows; the answers themselves are kept beside."""
    if run.sampler is None or run.sync is None:
        raise SamplingError("there is no deployment to sample from yet: start_sampler comes first.")
    result = evaluate_greedy(
        run.sampler, list(run.rows.held_out_rows()), run.rows.reward, run.config, version=run.sync.version
    )
    with run.directory.guard():
        run.answers.mkdir(exist_ok=True)
        write_json(run.answers_file(progress.step), {"answers": [answer.to_dict() for answer in result.answers]})
    values = result.to_dict()
    run.log_evaluation(progress, values)
    return values
