"""The RL recipe as a Prefect flow. What each line does lives in tasks/ and cookbook/."""

from __future__ import annotations

from prefect import flow

from cookbook.config import RLConfig
from cookbook.summary import RunSummary
from tasks.checkpoints import dcp_save, restore
from tasks.evaluation import evaluate_rewards
from tasks.policy_training import score_reference, train_policy
from tasks.preflight import preflight_rl
from tasks.promotion import promote
from tasks.provisioning import provision_rl
from tasks.restoring import restoring
from tasks.rl_run import RLRun
from tasks.run import due, due_at_start, run_name
from tasks.sampling import check_sampler, sample
from tasks.weight_sync import start_sampler, weight_sync

__all__ = ["rl"]


@flow(name="rl", flow_run_name=run_name)
def rl(config: RLConfig) -> RunSummary:
    """Group-relative policy optimization, with a choice of policy losses.

    Shao et al. 2024, arXiv:2402.03300, Algorithm 1 with one gradient step a batch: sample G completions for each of P
    prompts, compare the rewards inside each group, take one step, sync the sampler. Run it again with the same log_path
    to resume: from the last committed checkpoint, with every row accounted for.
    """
    return restoring(config, RLRun, _train)


def _train(run: RLRun, config: RLConfig) -> RunSummary:
    data = preflight_rl(run)  # every prompt rendered, the reward tried, before anything costs money
    provision_rl(run)  # policy, reference and deployment, side by side
    progress = restore(run, data.report.max_steps)  # the last commit, or zeros on a fresh run
    start_sampler(run, progress)  # the sampler serves the trainer's weights
    check_sampler(run, progress)  # and agrees with the trainer about them
    if due_at_start(config.evaluation.interval, progress):
        evaluate_rewards(run, progress)  # held-out rows before training

    while run.rows_left(progress):
        step = sample(run, progress)  # P groups with signal; the others are rejected with a reason
        reference = score_reference(run, step)  # nothing without a KL term
        progress = train_policy(run, step, reference, progress)
        if due(config.weight_sync.weight_sync_interval, progress):
            weight_sync(run, progress)
        if due(config.evaluation.interval, progress):
            evaluate_rewards(run, progress)
        if due(config.weight_sync.dcp_save_interval, progress):
            dcp_save(run, progress)

    if config.save_final_checkpoint:
        dcp_save(run, progress, kind="both")
    if config.weight_sync.weight_sync_interval > 0:
        weight_sync(run, progress)
    evaluate_rewards(run, progress)
    if config.output_model_id is not None:
        promote(run)
    return run.finish(progress)
