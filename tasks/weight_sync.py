"""Weight syncs: the sampler gets the trainer's weights, and proves that it serves them."""

from __future__ import annotations

from cookbook.deployment_state import is_lost
from cookbook.deployments import DeploymentHandle
from cookbook.errors import WeightSyncError
from cookbook.rollouts.collect import RolloutCollector
from cookbook.rollouts.environment import load_environment
from cookbook.rollouts.sampler import RolloutSampler
from cookbook.run import Progress
from cookbook.weight_sync import WeightSync
from tasks.record import recorded
from tasks.rl_run import RLRun
from tasks.run import Run
from tasks.upkeep import after_sync

__all__ = ["start_sampler", "start_sync", "weight_sync"]


def start_sync(run: Run, progress: Progress) -> None:
    """Make the deployment, where there is one, serve the trainer's weights before it is used for the first time.

    On a fresh run both have the base model's. Everything else needs a weight sync: other weights in the trainer
    (a resumed run, init_from_checkpoint) or in the deployment (adopted, or left by an earlier start). With
    weight_sync_interval 0 a resumed run goes on with the base model in the deployment, as it did before.
    """
    if run.deployment is None:
        return
    assert run.trainer is not None, "provisioning comes first"
    config = run.config
    run.sync = run.closed_at_end(
        WeightSync(run.control, run.deployment, run.trainer, run.client, config.weight_sync, run.directory.check_lease)
    )
    has_other_weights = progress.step > 0 and config.weight_sync.weight_sync_interval > 0
    is_wanted = config.weight_sync.weight_sync_before_training or config.init_from_checkpoint is not None
    if run.sync.serving() != "" or has_other_weights or is_wanted:
        weight_sync(run, progress)


def start_sampler(run: RLRun, progress: Progress) -> None:
    """Make the deployment serve the trainer's weights, and open the sampler on it."""
    assert run.deployment is not None, "provision_rl comes first"
    start_sync(run, progress)
    config = run.config
    run.sampler = run.closed_at_end(open_sampler(run, run.deployment))
    run.collector = run.closed_at_end(
        RolloutCollector(
            run.sampler,
            run.rows,
            run.rows.score,
            config,
            load_environment(config.environment),
            tokenizer=run.tokenizer,
        )
    )


def open_sampler(run: RLRun, deployment: DeploymentHandle) -> RolloutSampler:
    """The sampler of a deployment, as the config wants it."""
    config = run.config
    return RolloutSampler(
        run.control.deployments.inference_url,
        deployment.model,
        run.control.jobs.api_key,
        run.tokenizer,
        config.concurrency,
        config.deployment.replica_count or 1,
        float(config.deployment.sample_timeout),
        config.retry,
        lambda: is_lost(run.control, deployment.deployment_id),
    )


@recorded(deadline=lambda config: config.weight_sync.dcp_timeout + config.weight_sync.weight_sync_timeout, retried=True)
def weight_sync(run: Run, progress: Progress) -> str:
    """Save a sampler snapshot, hot load it, and prove that the deployment serves it; return its name.

    Raises:
        WeightSyncError: one of the states failed or took longer than its deadline. A retry saves under the next name.
        TrainerLost: the trainer's session is gone.
        LeaseLost: another process has taken the run over, and the deployment with it.
    """
    if run.sync is None:
        raise WeightSyncError("there is no deployment to sync to yet: start_sync comes first.")
    result = run.sync.sync(f"step-{progress.step}", first=run.synced_step is None)
    run.synced_step = progress.step
    after_sync(run)
    run.note({"sync/save_s": result.save_s, "sync/load_s": result.load_s, "sync/verify_s": result.verify_s})
    return result.version
