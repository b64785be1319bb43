"""DCP saves, and restoring a run: one path for a fresh run, a retry, a resumed run and one after kill -9."""

from __future__ import annotations

from cookbook.checkpoints import CheckpointKind, last_commit, next_checkpoint_name, resolve_resume, save_checkpoint
from cookbook.client import ReconnectableClient
from cookbook.deadlines import call_with_deadline
from cookbook.run import Progress
from tasks.record import recorded
from tasks.run import Run

__all__ = ["dcp_save", "restore", "save_now"]


@recorded(deadline=lambda config: config.weight_sync.dcp_timeout + config.infra.trainer_timeout_s, retried=False)
def restore(run: Run, total_steps: int) -> Progress:
    """Open a session on the trainer, load the last commit, cut the metrics to it, and say where training goes on.

    Args:
        total_steps: of a run that starts afresh; a commit knows its own.

    Raises:
        TrainerLost: no session within the deadline.
        CheckpointError: the last commit cannot be loaded. Never a silent fresh start.
    """
    assert run.trainer is not None, "provision_trainer comes first"
    config = run.config
    run.client = ReconnectableClient(
        run.control.jobs,
        run.trainer.job_id,
        run.trainer.base_model,
        lora_rank=config.lora_rank,
        seed=config.seed,
        user_metadata=run.directory.user_metadata(),
        state_timeout_s=config.weight_sync.dcp_timeout,
        base_url=run.trainer.base_url if run.trainer.adopted else None,
    )
    run.resumed = resolve_resume(run.client, str(run.directory.path), config.init_from_checkpoint)
    if run.resumed is not None and run.resumed.loop_state:
        progress = Progress.from_loop_state(run.resumed.loop_state)
        run.say(f"resumed from checkpoint {run.resumed.name}: step {progress.step:,} of {progress.total_steps:,}")
    else:
        progress = Progress(0, 0, 0, 0, permutation_seed=config.seed, total_steps=total_steps)
        run.resumed = None
    run.start(progress)
    return progress


@recorded(deadline=lambda config: config.weight_sync.dcp_timeout, retried=True)
def dcp_save(run: Run, progress: Progress, kind: str = "state") -> str:
    """Save weights and optimizer, then append the commit row with `progress`; return the checkpoint's name.

    A retry saves under the next name: a save never overwrites. Kind "both" adds a sampler snapshot to promote. A step
    that is committed already is not saved again: so a run that died after its last save promotes what it has.

    Raises:
        RequestRejected: the trainer could not save (disk full, for one). The commits so far stand.
        TrainerLost: the trainer is gone or did not answer in time.
    """
    commit = last_commit(run.directory.path)
    if commit is not None and commit.step == progress.step and (kind == "state" or commit.sampler_path is not None):
        return commit.name
    name = next_checkpoint_name(run.directory.path, f"step-{progress.step}", taken=run.client.list_checkpoints())
    save_checkpoint(
        run.client,
        name,
        str(run.directory.path),
        progress.to_loop_state(),
        CheckpointKind(kind),
        base_model=run.config.base_model,
        training_shape=run.config.infra.training_shape_id,
        guard=run.directory.guard,
    )
    return name


def save_now(run: Run, timeout_s: float) -> str | None:
    """Commit where the run is, unless that is committed; the checkpoint's name, or None where it cannot be."""
    assert run.progress is not None
    progress = run.progress
    if run.client.step != progress.step:
        return None
    return call_with_deadline(lambda: dcp_save.body(run, progress), timeout_s)
