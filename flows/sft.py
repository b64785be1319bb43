"""The SFT recipe as a Prefect flow. What each line does lives in tasks/ and cookbook/."""

from __future__ import annotations

from prefect import flow

from cookbook.config import SFTConfig
from cookbook.data import Position
from cookbook.summary import RunSummary
from tasks.checkpoints import dcp_save, restore
from tasks.evaluation import evaluate
from tasks.preflight import preflight
from tasks.promotion import promote
from tasks.provisioning import provision_trainer
from tasks.restoring import restoring
from tasks.run import Run, due, due_at_start, run_name
from tasks.training import train

__all__ = ["sft"]


@flow(name="sft", flow_run_name=run_name)
def sft(config: SFTConfig) -> RunSummary:
    """Supervised fine-tuning: token-mean cross-entropy on the assistant's tokens, AdamW, one step a batch.

    Run it again with the same log_path to resume: from the last committed checkpoint, at the exact row.
    """
    return restoring(config, Run, _train)


def _train(run: Run, config: SFTConfig) -> RunSummary:
    data = preflight(run)  # every row rendered and counted, before anything costs money
    provision_trainer(run)
    progress = restore(run, data.plan.total_steps)  # the last commit, or zeros on a fresh run
    if due_at_start(config.evaluation.interval, progress):
        evaluate(run, data, progress)  # held-out rows before training

    for batch in data.batches(Position(progress.epoch, progress.position)):
        progress = train(run, batch, progress)  # forward_backward + optim_step
        if due(config.evaluation.interval, progress):
            evaluate(run, data, progress)
        if due(config.weight_sync.dcp_save_interval, progress):
            dcp_save(run, progress)

    if config.save_final_checkpoint:
        dcp_save(run, progress, kind="both")
    evaluate(run, data, progress)
    if config.output_model_id is not None:
        promote(run)
    return run.finish(progress)
