"""The DPO recipe as a Prefect flow. What each line does lives in tasks/ and cookbook/."""

from __future__ import annotations

from prefect import flow

from cookbook.config import DPOConfig
from cookbook.data import Position
from cookbook.summary import RunSummary
from tasks.checkpoints import dcp_save, restore
from tasks.evaluation import evaluate_pairs
from tasks.preference_run import DPORun
from tasks.preference_training import train_pairs
from tasks.preflight import preflight_pairs
from tasks.promotion import promote
from tasks.provisioning import provision_dpo
from tasks.references import fill_references, reference_logprobs, release_reference
from tasks.restoring import restoring
from tasks.run import due, due_at_start, run_name
from tasks.weight_sync import start_sync, weight_sync

__all__ = ["dpo"]


@flow(name="dpo", flow_run_name=run_name)
def dpo(config: DPOConfig) -> RunSummary:
    """Direct preference optimization.

    Rafailov et al. 2023, arXiv:2305.18290, equation 7: the policy learns to give the chosen answer more than the
    rejected one, each measured against a frozen reference, whose logprobs are computed once, while training already
    runs. Run it again with the same log_path to resume: from the last committed checkpoint, at the exact pair.
    """
    return restoring(config, DPORun, _train)


def _train(run: DPORun, config: DPOConfig) -> RunSummary:
    data = preflight_pairs(run)  # every pair rendered and counted, before anything costs money
    provision_dpo(run)  # a reference only while its logprobs are not all known
    progress = restore(run, data.plan.total_steps)  # the last commit, or zeros on a fresh run
    fill_references(run, progress)  # in the background, ahead of training
    start_sync(run, progress)
    if due_at_start(config.evaluation.interval, progress):
        evaluate_pairs(run, progress)  # held-out pairs before training

    for batch in data.batches(Position(progress.epoch, progress.position)):
        references = reference_logprobs(run, batch)  # waits in the first epoch, if at all
        progress = train_pairs(run, batch, references, progress)
        release_reference(run)  # as soon as it has nothing left to do
        if due(config.weight_sync.weight_sync_interval, progress):
            weight_sync(run, progress)
        if due(config.evaluation.interval, progress):
            evaluate_pairs(run, progress)
        if due(config.weight_sync.dcp_save_interval, progress):
            dcp_save(run, progress)

    if config.save_final_checkpoint:
        dcp_save(run, progress, kind="both")
    if config.has_deployment:
        weight_sync(run, progress)
    evaluate_pairs(run, progress)
    if config.output_model_id is not None:
        promote(run)
    return run.finish(progress)
