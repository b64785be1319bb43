"""The ORPO recipe as a Prefect flow. What each line does lives in tasks/ and cookbook/."""

from __future__ import annotations

from prefect import flow

from cookbook.config import ORPOConfig
from cookbook.data import Position
from cookbook.summary import RunSummary
from tasks.checkpoints import dcp_save, restore
from tasks.evaluation import evaluate_pairs
from tasks.preference_run import PreferenceRun
from tasks.preference_training import train_pairs
from tasks.preflight import preflight_pairs
from tasks.promotion import promote
from tasks.provisioning import provision_trainer
from tasks.restoring import restoring
from tasks.run import due, due_at_start, run_name

__all__ = ["orpo"]


@flow(name="orpo", flow_run_name=run_name)
def orpo(config: ORPOConfig) -> RunSummary:
    """Odds-ratio preference optimization.

    Hong et al. 2024, arXiv:2403.07691, equation 6: supervised fine-tuning on the chosen answer, plus a term that makes
    its odds larger than those of the rejected one; no reference. Run it again with the same log_path to resume: from
    the last committed checkpoint, at the exact pair.
    """
    return restoring(config, PreferenceRun, _train)


def _train(run: PreferenceRun, config: ORPOConfig) -> RunSummary:
    data = preflight_pairs(run)  # every pair rendered and counted, before anything costs money
    provision_trainer(run)
    progress = restore(run, data.plan.total_steps)  # the last commit, or zeros on a fresh run
    if due_at_start(config.evaluation.interval, progress):
        evaluate_pairs(run, progress)  # held-out pairs before training

    for batch in data.batches(Position(progress.epoch, progress.position)):
        progress = train_pairs(run, batch, None, progress)
        if due(config.evaluation.interval, progress):
            evaluate_pairs(run, progress)
        if due(config.weight_sync.dcp_save_interval, progress):
            dcp_save(run, progress)

    if config.save_final_checkpoint:
        dcp_save(run, progress, kind="both")
    evaluate_pairs(run, progress)
    if config.output_model_id is not None:
        promote(run)
    return run.finish(progress)
