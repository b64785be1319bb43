"""Upkeep of a run, called by its tasks after a commit and after a weight sync. Nothing here raises or takes long."""

from __future__ import annotations

from tasks.run import Run

__all__ = ["after_commit", "after_sync"]


def after_commit(run: Run, name: str) -> None:
    """Delete what the checkpoint `name` has made needless, and mirror the run directory. From any thread."""
    if run.trainer is not None:
        run.upkeep.after_commit(run.control, name, run.trainer.job_id, run.sync)


def after_sync(run: Run) -> None:
    """Delete the snapshots of weight syncs that nothing will load any more. Returns at once."""
    if run.sync is not None:
        run.upkeep.after_sync(run.control, run.sync)
