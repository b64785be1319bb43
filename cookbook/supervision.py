"""What a run directory tells about a flow run that looks dead: whether a process owns it, and how often it was retried.

No Prefect: which flow runs there are and how one is retried is in tasks/supervision.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cookbook.checkpoints import last_commit
from cookbook.files import read_json, write_json
from cookbook.run import RUN_FILE, is_finished, is_owned

__all__ = ["RunDirectoryState", "count_retry"]

RETRIES_FILE = "supervisor.json"


@dataclass(frozen=True)
class RunDirectoryState:
    """A run directory, seen from outside."""

    exists: bool
    """False: the run has not got that far, or the directory is on another machine."""
    is_owned: bool
    """A live process owns it."""
    is_finished: bool
    commit: str | None
    """Name of the last commit."""
    retries: int
    """How often the flow run was retried since that commit."""

    @classmethod
    def read(cls, log_path: Path, flow_run_id: str) -> Self:
        """Look at a run directory, touching nothing.

        Raises:
            CheckpointError: a record in it is damaged.
        """
        if not (log_path / RUN_FILE).exists():
            return cls(False, False, False, None, _retries(log_path, flow_run_id, None))
        commit = last_commit(log_path)
        name = None if commit is None else commit.name
        return cls(True, is_owned(log_path), is_finished(log_path), name, _retries(log_path, flow_run_id, name))


def count_retry(log_path: Path, flow_run_id: str, commit: str | None) -> int:
    """Write down, before it is done, that a flow run is retried; how often it was since this commit, this one included.

    Raises:
        CheckpointError: it cannot be written; the run must not be retried.
    """
    retries = _retries(log_path, flow_run_id, commit) + 1
    write_json(log_path / RETRIES_FILE, {"flow_run_id": flow_run_id, "commit": commit, "retries": retries})
    return retries


def _retries(log_path: Path, flow_run_id: str, commit: str | None) -> int:
    noted = read_json(log_path / RETRIES_FILE) or {}
    return int(noted["retries"]) if (noted.get("flow_run_id"), noted.get("commit")) == (flow_run_id, commit) else 0
