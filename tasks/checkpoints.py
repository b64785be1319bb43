"""DCP saves, and restoring a run: one path for a fresh run, a retry, a resumed run and one after kill -9."""

from __future__ import annotations

import logging

from cookbook.checkpoints import (
    CheckpointKind,
    CheckpointRow,
    PendingCheckpoint,
    begin_checkpoint,
    next_checkpoint_name,
    read_checkpoints,
    resolve_resume,
)
from cookbook.client import ReconnectableClient
from cookbook.deadlines import Deadline, call_with_deadline
from cookbook.errors import CookbookError, LeaseLost, TrainerLost
from cookbook.run import Progress
from tasks.record import recorded
from tasks.run import Run
from tasks.upkeep import after_commit

__all__ = ["dcp_save", "restore", "save_now"]

SESSION_TIMEOUT_S = 600.0
"""Seconds for a session, and for calls that have no deadline of their own."""

logger = logging.getLogger(__name__)


@recorded(deadline=lambda config: config.weight_sync.dcp_timeout + config.infra.trainer_timeout_s, retried=False)
def restore(run: Run, total_steps: int) -> Progress:
    """Open a session on the trainer, load the last commit, cut the metrics to it, and say where training goes on.

    Args:
        total_steps: of a run that starts afresh; a commit knows its own.

    Raises:
        TrainerLost: no session within the deadline.
        CheckpointError: no commit can be loaded. Never a silent fresh start.
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
        default_timeout_s=min(SESSION_TIMEOUT_S, config.infra.trainer_timeout_s),
        state_timeout_s=config.weight_sync.dcp_timeout,
        base_url=run.trainer.base_url if run.trainer.adopted else None,
    )
    run.resumed = resolve_resume(run.client, str(run.directory.path), config.init_from_checkpoint)
    for name, why in (run.resumed.skipped if run.resumed is not None else {}).items():
        run.say(f"checkpoint {name} cannot be loaded and is passed over: {why}")
    run.upkeep.unusable = set(run.resumed.skipped) if run.resumed is not None else ()
    if run.resumed is not None and run.resumed.loop_state:
        progress = Progress.from_loop_state(run.resumed.loop_state)
        run.say(f"resumed from checkpoint {run.resumed.name}: step {progress.step:,} of {progress.total_steps:,}")
    else:
        progress = Progress(0, 0, 0, 0, permutation_seed=config.seed, total_steps=total_steps)
        run.resumed = None
    run.start(progress)
    return progress


@recorded(deadline=lambda config: 2 * config.weight_sync.dcp_timeout + SESSION_TIMEOUT_S, retried=True)
def dcp_save(run: Run, progress: Progress, kind: str = "state") -> str:
    """Save weights and optimizer as they are now, and return the checkpoint's name; training goes on at once.

    The commit row with `progress` is appended once the save is confirmed, in the background; one save is under way at a
    time. What goes wrong there is raised by the next call, or at the end of the run. Kind "both" adds a sampler
    snapshot to promote, and waits for the commit. A step that is committed already is not saved again: so a run that
    died after its last save promotes what it has. A save never overwrites: a second attempt has the next name.

    Raises:
        RequestRejected: the trainer could not save (disk full, for one). The commits so far stand.
        TrainerLost: the trainer is gone or did not answer in time, or does not have the weights of this step.
        CheckpointError: the row cannot be written.
        LeaseLost: another process owns the run.
    """
    run.saver.settle()
    commit = _newest(run)
    if commit is not None and commit.step == progress.step and (kind == "state" or commit.sampler_path is not None):
        return commit.name
    checkpoint = _begin(run, progress, kind)
    run.saver.begin(checkpoint, lambda: after_commit(run, checkpoint.name))
    if kind != CheckpointKind.STATE:
        run.saver.settle()
    return checkpoint.name


def save_now(run: Run, timeout_s: float) -> str | None:
    """Commit where the run is, unless that is committed; the checkpoint's name, or None where it cannot be in time.

    Raises:
        CookbookError: as `dcp_save`.
    """
    deadline = Deadline(timeout_s)
    progress = run.progress
    if progress is None or not _settled(run, deadline):
        return None
    commit = _newest(run)
    if commit is not None and commit.step >= progress.step:
        return commit.name
    if run.client.step != progress.step:
        return None
    checkpoint = call_with_deadline(lambda: _begin(run, progress), deadline.remaining())
    run.saver.begin(checkpoint, lambda: after_commit(run, checkpoint.name))
    return checkpoint.name if _settled(run, deadline) else None


def _settled(run: Run, deadline: Deadline) -> bool:
    """Whether no save is under way any more. One that has failed is logged: what matters is the next one."""
    try:
        if run.saver.settle(deadline.remaining()):
            return True
    except LeaseLost:
        raise
    except CookbookError as error:
        logger.warning("the checkpoint before is none: %s", error)
        return True
    run.saver.give_up()
    return False


def _newest(run: Run) -> CheckpointRow | None:
    """The last commit, of those that could be loaded."""
    unusable = run.resumed.skipped if run.resumed is not None else {}
    rows = [row for row in read_checkpoints(run.directory.path) if row.state_path and row.name not in unusable]
    return rows[-1] if rows else None


def _begin(run: Run, progress: Progress, kind: str = "state") -> PendingCheckpoint:
    if run.client.step != progress.step:
        raise TrainerLost(
            f"step {progress.step} cannot be saved: trainer {run.client.job_id} has the weights of step "
            f"{run.client.step}. The run must be restored from its last commit."
        )
    name = next_checkpoint_name(run.directory.path, f"step-{progress.step}", taken=run.client.list_checkpoints())
    return begin_checkpoint(
        run.client,
        name,
        str(run.directory.path),
        progress.to_loop_state(),
        CheckpointKind(kind),
        base_model=run.config.base_model,
        training_shape=run.config.infra.training_shape_id,
        guard=run.directory.guard,
        timeout_s=run.config.weight_sync.dcp_timeout,
    )
