"""What a run's checkpoints.jsonl names and what its backend has: the same snapshots, seen from both sides.

Reads only. Commits are made in cookbook/checkpoints.py, snapshots deleted in cookbook/retention.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cookbook.checkpoints import CheckpointKind, CheckpointRow, last_promotable, read_checkpoints
from cookbook.deadlines import MIN_CALL_S, Deadline
from cookbook.errors import DataError
from cookbook.files import read_json
from cookbook.ledger import read_resources
from cookbook.run import RUN_FILE, list_runs

if TYPE_CHECKING:
    from cookbook.control_plane import ControlPlane

__all__ = [
    "Snapshot",
    "SnapshotRef",
    "StoredRun",
    "adopted_by_others",
    "begins_from",
    "find_promotable",
    "list_snapshots",
    "own_trainers",
    "snapshots_of",
    "trainers_of",
    "unplaced_names",
]

_CROSS_JOB = "cross_job://"
_STATE_TYPES = ("TRAINING", "TRAINING_LORA")


@dataclass(frozen=True)
class StoredRun:
    """A run as its directory tells it, whoever owns it."""

    path: Path
    run_id: str
    recipe: str
    config: Mapping[str, Any]
    """As the run was last started with, as JSON data."""

    @property
    def backend(self) -> str | None:
        """ "embedded" or "fireworks"; None when run.json does not say."""
        return self.config.get("backend")

    @classmethod
    def read(cls, log_path: str | Path) -> Self:
        """The run in a directory.

        Raises:
            DataError: there is none.
            CheckpointError: run.json is damaged.
        """
        path = Path(log_path).expanduser().resolve()
        record = read_json(path / RUN_FILE) if path.is_dir() else None
        if record is None:
            raise DataError(f"{log_path} is not a run directory. `cookbook runs list` names the runs of this machine.")
        return cls(path, str(record["run_id"]), str(record["recipe"]), record.get("config") or {})


@dataclass(frozen=True)
class SnapshotRef:
    """What a backend knows a snapshot by."""

    job_id: str
    """The trainer job that saved it; it may be gone."""
    kind: CheckpointKind
    """STATE or SAMPLER."""
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of trainer {self.job_id}"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that a backend lists."""

    ref: SnapshotRef
    promotable: bool
    created: str
    """UTC, RFC 3339; "" when the backend does not say."""
    size_bytes: int | None
    """None when the backend does not say."""
    has_all_files: bool = True
    """Every file is there, and as large as when it was saved; a backend that does not say lists only such."""

    @property
    def is_whole(self) -> bool:
        """Whether it can be relied on, as far as that is known without reading it."""
        return self.has_all_files and self.size_bytes != 0


def snapshots_of(row: CheckpointRow) -> list[SnapshotRef]:
    """What a row names, as far as that can be looked up: state first, then sampler."""
    found = []
    job_id, separator, name = (row.state_path or "").removeprefix(_CROSS_JOB).partition("/")
    if separator and str(row.state_path).startswith(_CROSS_JOB):
        found.append(SnapshotRef(job_id, CheckpointKind.STATE, name))
    if row.sampler_path and row.source_job_id:
        found.append(SnapshotRef(row.source_job_id, CheckpointKind.SAMPLER, row.sampler_path))
    return found


def unplaced_names(row: CheckpointRow) -> set[str]:
    """What a row's snapshots may be called whose trainer cannot be told: every part of their paths."""
    kinds = {ref.kind for ref in snapshots_of(row)}
    paths = {CheckpointKind.STATE: row.state_path, CheckpointKind.SAMPLER: row.sampler_path}
    return {part for kind, path in paths.items() if path and kind not in kinds for part in re.split("[/:]+", path)}


def own_trainers(log_path: Path) -> list[str]:
    """Trainer jobs that the run itself asked for, oldest first. A run that has adopted one saves in it too."""
    return [record.resource_id for record in read_resources(log_path) if record.kind == "trainer"]


def adopted_by_others(home: Path, run_id: str) -> set[str]:
    """Trainer jobs that the other runs of a home name in their configs: their snapshots may be there.

    Raises:
        CheckpointError: a run.json is damaged.
    """
    others = [entry.path for entry in list_runs(home) if entry.run_id != run_id and entry.state != "gone"]
    configs = [StoredRun.read(path).config for path in others]
    named = {config.get(name) for config in configs for name in ("policy_job_id", "reference_job_id")}
    return {job_id for job_id in named if job_id}


def begins_from(run: StoredRun) -> list[SnapshotRef]:
    """The state of `init_from_checkpoint`: "job:name", or "name" of the run's own trainer."""
    reference = run.config.get("init_from_checkpoint")
    if not reference:
        return []
    job_id, _, name = str(reference).rpartition(":")
    adopted = run.config.get("policy_job_id")
    jobs = [job_id] if job_id else [adopted] if adopted else own_trainers(run.path)
    return [SnapshotRef(job, CheckpointKind.STATE, name) for job in jobs]


def trainers_of(log_path: Path) -> list[str]:
    """Trainer jobs with snapshots of the run: its own, and adopted ones that its rows name."""
    named = [ref.job_id for row in read_checkpoints(log_path) for ref in snapshots_of(row)]
    return list(dict.fromkeys([*own_trainers(log_path), *named]))


def list_snapshots(
    control: ControlPlane, job_ids: Iterable[str], deadline: Deadline | None = None
) -> dict[SnapshotRef, Snapshot]:
    """What the backend has of these trainer jobs, oldest first a job. One listing a job.

    Args:
        deadline: for all of it. None = each listing has its own.

    Raises:
        ProvisioningError: the backend cannot be asked.
    """
    found = {}
    for job_id in job_ids:
        timeout = {} if deadline is None else {"timeout_s": deadline.for_call(MIN_CALL_S)}
        for listed in control.list_checkpoints(job_id, **timeout):
            snapshot = _snapshot(job_id, listed)
            found[snapshot.ref] = snapshot
    return found


def find_promotable(
    log_path: Path, name: str | None, listed: Mapping[SnapshotRef, Snapshot]
) -> tuple[SnapshotRef, CheckpointRow | None]:
    """The sampler snapshot to promote, and the row that names it (None: that of a weight sync).

    Args:
        name: of a row of checkpoints.jsonl, or a sampler snapshot's own; None = the run's last promotable row.
        listed: what the backend has of the run's trainers.

    Raises:
        DataError: there is none of that name, or it cannot be promoted; says which can.
    """
    rows = read_checkpoints(log_path)
    choices = _choices(rows, listed)
    row = last_promotable(log_path) if name is None else next((row for row in rows if row.name == name), None)
    if row is not None:
        ref = next((ref for ref in snapshots_of(row) if ref.kind == CheckpointKind.SAMPLER), None)
        if ref is None:
            raise DataError(f"checkpoint {row.name!r} has no sampler snapshot: it can only be resumed from. {choices}")
    else:
        samplers = [ref for ref in listed if ref.kind == CheckpointKind.SAMPLER and ref.name == name]
        if not samplers:
            what = "has a sampler snapshot" if name is None else f"is called {name!r}"
            raise DataError(f"no checkpoint of {log_path} {what}. {choices}")
        ref = samplers[0]
        row = next((row for row in rows if ref in snapshots_of(row)), None)
    if ref not in listed:
        raise DataError(f"the {ref} is not on the backend any more. {choices}")
    if not listed[ref].promotable:
        raise DataError(f"the {ref} cannot be promoted: the backend says that it is not a whole model. {choices}")
    return ref, row


def _choices(rows: list[CheckpointRow], listed: Mapping[SnapshotRef, Snapshot]) -> str:
    there = [ref for ref, snapshot in listed.items() if snapshot.promotable]
    names = [row.name for row in rows if any(ref in there for ref in snapshots_of(row))]
    named = {ref for row in rows for ref in snapshots_of(row)}
    names += [ref.name for ref in there if ref not in named]
    if names:
        return f"These can be promoted: {', '.join(names)}."
    return "None of this run can: a run saves one at its end (save_final_checkpoint), RL also with every weight sync."


def _snapshot(job_id: str, listed: Mapping[str, Any]) -> Snapshot:
    kind = str(listed.get("checkpointType", "")).removeprefix("CHECKPOINT_TYPE_")
    size = listed.get("sizeBytes")
    return Snapshot(
        ref=SnapshotRef(
            job_id,
            CheckpointKind.STATE if kind in _STATE_TYPES else CheckpointKind.SAMPLER,
            str(listed.get("name", "")).rpartition("/")[2],
        ),
        promotable=bool(listed.get("promotable")),
        created=str(listed.get("createTime") or ""),
        size_bytes=None if size is None else int(size),
        has_all_files=bool(listed.get("hasAllFiles", True)),
    )
