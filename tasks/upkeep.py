"""Upkeep of a run, called by its tasks: after a commit, after a weight sync, and at its end. Nothing here raises."""

from __future__ import annotations

from tasks.run import Run

__all__ = ["after_commit", "after_sync", "final_mirror"]

FINAL_MIRROR_TIMEOUT_S = 120.0


def after_commit(run: Run, name: str) -> None:
    """Delete what the checkpoint `name` has made needless, and mirror the run directory. From any thread."""
    if run.trainer is not None:
        run.upkeep.after_commit(run.control, name, run.trainer.job_id, run.sync)


def after_sync(run: Run) -> None:
    """Delete the snapshots of weight syncs that nothing will load any more. Returns at once."""
    if run.sync is not None:
        run.upkeep.after_sync(run.control, run.sync)


def final_mirror(run: Run, timeout_s: float = FINAL_MIRROR_TIMEOUT_S) -> None:
    """Mirror the run directory as it is at the end of the run; a copy that takes longer is given up."""
    run.upkeep.finish(timeout_s)
