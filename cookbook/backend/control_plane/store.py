"""The records that must survive the control plane: trainer jobs, deployments and promotions, in one SQLite file.

Used from the event loop's thread only. WAL, one statement a transaction: a kill at any moment leaves the last record
whole. Checkpoints and models are not here; what lies on disk says which there are.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["LIVE_STATES", "Job", "JobState", "Kind", "Operation", "Store"]


class Kind:
    """What a job's worker does. Also the name of the process, as in `python -m cookbook.backend <kind>`."""

    TRAINER = "trainer"
    DEPLOYMENT = "deployment"


class JobState:
    """The states of a job, as they appear on the wire for trainer jobs; deployments.py translates them for deployments.

    CANCELLED is any end on purpose: on request, idle, or with the backend. FAILED is any other.
    """

    CREATING = "JOB_STATE_CREATING"
    RUNNING = "JOB_STATE_RUNNING"
    FAILED = "JOB_STATE_FAILED"
    CANCELLED = "JOB_STATE_CANCELLED"
    DELETED = "JOB_STATE_DELETED"


LIVE_STATES = (JobState.CREATING, JobState.RUNNING)
"""The states in which a job has a worker."""


@dataclass(frozen=True)
class Job:
    """One trainer job or deployment: a resource that a worker process works for.

    `request` is what was asked for, `spec` what its worker is started with. `worker_pid` is the last worker's.
    Times are seconds since 1970. Ids are unique within a kind.
    """

    job_id: str
    state: str
    status_message: str
    created: float
    updated: float
    shape: str | None
    request: dict[str, Any]
    spec: dict[str, Any]
    worker_pid: int | None = None
    kind: str = Kind.TRAINER

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES


@dataclass(frozen=True)
class Operation:
    """One promotion of a checkpoint to a model. `error` is a message, `code` its gRPC code."""

    operation_id: str
    job_id: str
    checkpoint: str
    output_model: str
    created: float
    done: bool = False
    code: int = 0
    error: str = ""


_TABLES = """
create table if not exists jobs (
    kind text not null, job_id text not null, state text not null, status_message text not null, created real not null,
    updated real not null, shape text, request text not null, spec text not null, worker_pid integer,
    primary key (kind, job_id)
);
create table if not exists operations (
    operation_id text primary key, job_id text not null, checkpoint text not null, output_model text not null,
    created real not null, done integer not null, code integer not null, error text not null
);
"""


class Store:
    """Jobs and operations on disk."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. sqlite3.Error when it cannot be written."""
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("pragma journal_mode=wal")
        # NORMAL under WAL survives a killed process; only a power failure could lose the last record, and then the
        # workers are gone as well.
        self._db.execute("pragma synchronous=normal")
        self._db.executescript(_TABLES)

    def close(self) -> None:
        self._db.close()

    def add_job(self, job: Job) -> bool:
        """Insert a job; False when the id exists already in its kind (in any state)."""
        values = (
            *(job.kind, job.job_id, job.state, job.status_message, job.created, job.updated, job.shape),
            *(json.dumps(job.request), json.dumps(job.spec), job.worker_pid),
        )
        try:
            self._db.execute("insert into jobs values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            return False
        return True

    def job(self, job_id: str, kind: str = Kind.TRAINER) -> Job | None:
        rows = self._db.execute("select * from jobs where kind = ? and job_id = ?", (kind, job_id)).fetchall()
        return _job(rows[0]) if rows else None

    def jobs(self, states: Sequence[str] | None = None, *, kind: str | None = None) -> list[Job]:
        """All jobs, or those in some states or of one kind, oldest first."""
        rows = self._db.execute("select * from jobs order by created, job_id")
        wanted = [job for job in map(_job, rows) if kind is None or job.kind == kind]
        return [job for job in wanted if states is None or job.state in states]

    def set_state(self, job: Job, state: str, status_message: str) -> Job:
        """Record a job's new state and return the job as it is now."""
        changed = replace(job, state=state, status_message=status_message, updated=time.time())
        self._db.execute(
            "update jobs set state = ?, status_message = ?, updated = ? where kind = ? and job_id = ?",
            (changed.state, changed.status_message, changed.updated, changed.kind, changed.job_id),
        )
        return changed

    def set_request(self, job: Job, request: dict[str, Any], spec: dict[str, Any]) -> Job:
        """Record what a job is to be from now on and return the job as it is now. A live worker is not told."""
        changed = replace(job, request=request, spec=spec, updated=time.time())
        self._db.execute(
            "update jobs set request = ?, spec = ?, updated = ? where kind = ? and job_id = ?",
            (json.dumps(request), json.dumps(spec), changed.updated, changed.kind, changed.job_id),
        )
        return changed

    def remove_job(self, job: Job) -> None:
        """Forget a job: its id is free again."""
        self._db.execute("delete from jobs where kind = ? and job_id = ?", (job.kind, job.job_id))

    def set_worker(self, job: Job, pid: int | None) -> Job:
        """Record the process that works for a job; None while it is being started."""
        self._db.execute("update jobs set worker_pid = ? where kind = ? and job_id = ?", (pid, job.kind, job.job_id))
        return replace(job, worker_pid=pid)

    def add_operation(self, operation: Operation) -> None:
        values = (
            *(operation.operation_id, operation.job_id, operation.checkpoint, operation.output_model),
            *(operation.created, operation.done, operation.code, operation.error),
        )
        self._db.execute("insert into operations values (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def operation(self, operation_id: str) -> Operation | None:
        rows = self._db.execute("select * from operations where operation_id = ?", (operation_id,)).fetchall()
        return _operation(rows[0]) if rows else None

    def unfinished_operations(self) -> list[Operation]:
        rows = self._db.execute("select * from operations where not done order by created")
        return [_operation(row) for row in rows]

    def finish_operation(self, operation: Operation, *, code: int = 0, error: str = "") -> Operation:
        """Record the end of an operation, good (code 0) or bad, and return it as it is now."""
        self._db.execute(
            "update operations set done = 1, code = ?, error = ? where operation_id = ?",
            (code, error, operation.operation_id),
        )
        return replace(operation, done=True, code=code, error=error)


def _job(row: sqlite3.Row) -> Job:
    return Job(**{**dict(row), "request": json.loads(row["request"]), "spec": json.loads(row["spec"])})


def _operation(row: sqlite3.Row) -> Operation:
    return Operation(**{**dict(row), "done": bool(row["done"])})
