"""Which checkpoints of a run are kept, and the deletion of the others: first from the record, then from the backend.

Safe to kill at any moment: pruning.json in the run directory says what was about to be deleted, and the next prune goes
on with it. What is not deleted by mistake: the last commit, what another run begins from, what a process uses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.checkpoints import CheckpointKind, CheckpointRow, drop_checkpoints, read_checkpoints
from cookbook.control_plane import CALL_TIMEOUT_S, is_refused
from cookbook.deadlines import MIN_CALL_S, Deadline
from cookbook.errors import CheckpointError, DataError, LeaseLost, ProvisioningError
from cookbook.files import read_json, write_json
from cookbook.run import RunDirectory, list_runs
from cookbook.snapshots import (
    Snapshot,
    SnapshotRef,
    StoredRun,
    adopted_by_others,
    begins_from,
    list_snapshots,
    own_trainers,
    snapshots_of,
    trainers_of,
    unplaced_names,
)

if TYPE_CHECKING:
    from cookbook.control_plane import ControlPlane

__all__ = [
    "LiveSaves",
    "PrunePlan",
    "PruneResult",
    "RetentionPolicy",
    "check_prunable",
    "delete_snapshot",
    "own_run",
    "plan_prune",
    "prune",
]

PRUNING_FILE = "pruning.json"

_STEP = re.compile(r"step-(\d+)(-|$)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetentionPolicy:
    """Which rows of checkpoints.jsonl are kept, besides those that are always kept."""

    keep_last: int
    """So many of the newest rows, at least 1."""
    keep_every: int | None = None
    """Also every row whose step is a multiple of this."""

    def __post_init__(self) -> None:
        if self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise DataError(f"keep_last and keep_every must be at least 1, got {self.keep_last}, {self.keep_every}.")


@dataclass(frozen=True)
class LiveSaves:
    """What a run that goes on saves while it is pruned: no row names that yet, and it must stay."""

    newest: str
    """The row that was just committed. Nothing is deleted before the backend lists its snapshots as whole."""
    trainer_id: str
    """The trainer job that saves."""
    is_sync: Callable[[str], bool]
    """Whether a sampler snapshot belongs to the weight syncs under way, which see to it themselves."""
    unusable: Collection[str] = ()
    """Rows that a restore has passed over: they stay, and do not count as kept."""

    def may_be_needed(self, ref: SnapshotRef, step: int) -> bool:
        """Whether a snapshot that no row names may be part of a commit or of a weight sync under way.

        Told by the step in its name, and not by time, which clocks may set back: a save under way is of the newest
        commit's `step`, or of a later one.
        """
        if ref.job_id != self.trainer_id:
            return False
        found = _STEP.match(ref.name)
        return found is None or int(found[1]) >= step or self.is_sync(ref.name)


@dataclass(frozen=True)
class PrunePlan:
    """What a prune is going to do."""

    kept: Mapping[str, str]
    """Name of each row that stays -> why."""
    rows: tuple[CheckpointRow, ...]
    """Rows that leave checkpoints.jsonl."""
    snapshots: tuple[Snapshot, ...]
    """What is deleted on the backend: of those rows, of weight syncs, and what an earlier prune did not get to."""
    unfinished: tuple[SnapshotRef, ...] = ()
    """What an earlier prune began to delete and the backend does not list; asked for once more."""

    @property
    def is_empty(self) -> bool:
        """Nothing to do."""
        return not (self.rows or self.snapshots or self.unfinished)

    @property
    def size_bytes(self) -> int:
        """Of all snapshots whose size is known."""
        return sum(snapshot.size_bytes or 0 for snapshot in self.snapshots)


@dataclass(frozen=True)
class PruneResult:
    """What a prune has done."""

    rows: tuple[str, ...]
    """Names of the rows that left checkpoints.jsonl."""
    deleted: tuple[Snapshot, ...]
    left: tuple[tuple[Snapshot, str], ...]
    """Snapshots that the backend would not delete, as they are in use, with its words. The next prune tries again."""

    @property
    def freed_bytes(self) -> int:
        """Size of what was deleted."""
        return sum(snapshot.size_bytes or 0 for snapshot in self.deleted)


def check_prunable(run: StoredRun, home: Path) -> None:
    """Check, without touching anything, that checkpoints of a run can be pruned here and now.

    Raises:
        CheckpointError: its backend has no call to delete one.
        DataError: the run belongs to another home, where its snapshots lie.
        LeaseLost: a process owns the run.
    """
    if run.backend != "embedded":
        raise CheckpointError(
            f"run {run.run_id} is on backend {run.backend or 'unknown'!r}, whose API has no call to delete "
            "checkpoints. Nothing was touched. Those of the embedded backend can be pruned."
        )
    registered = next((entry for entry in list_runs(home) if entry.run_id == run.run_id), None)
    if registered is None:
        raise DataError(
            f"run {run.run_id} in {run.path} was not started under {home}, so its snapshots are not there. "
            "Set COOKBOOK_HOME (or --home) to the one it was started under."
        )
    if registered.path == run.path and registered.state == "running":
        raise LeaseLost(f"run {run.run_id} in {run.path} is running. Wait for it or stop it, then prune.")


def own_run(run: StoredRun, home: Path) -> RunDirectory:
    """Own a stopped run, as it is, for a prune. The caller closes it.

    Raises:
        LeaseLost, ConfigError, CheckpointError: as for `RunDirectory.open`, and `check_prunable`.
        DataError: as for `check_prunable`.
    """
    check_prunable(run, home)
    return RunDirectory.open(run.path, recipe=run.recipe, config=run.config, home=home)


def plan_prune(
    control: ControlPlane,
    log_path: Path,
    policy: RetentionPolicy,
    *,
    home: Path,
    keep: Collection[str] = (),
    live: LiveSaves | None = None,
    deadline: Deadline | None = None,
) -> PrunePlan:
    """Decide what a prune would delete. Nothing is touched.

    Always kept: the newest commit, the newest one that the backend still has whole, the newest promotable row, what
    another run's record names or begins from, and rows whose snapshots cannot be told (other code wrote them), with
    every snapshot that they may mean. In a trainer that another run has adopted, only what the rows named goes.

    Args:
        log_path: the run directory. Of a live run only its owner may prune.
        home: whose other runs are looked at.
        keep: names of rows and snapshots to keep besides: the one that the run's deployment serves, for one.
        live: what the run saves meanwhile; None = it has stopped.
        deadline: for all calls to the backend. None = each has its own.

    Raises:
        CheckpointError: a record, of this run or of another one, is damaged; or what a live run has just committed is
            not whole on the backend.
        ProvisioningError: the backend cannot be asked.
    """
    rows = read_checkpoints(log_path)
    listed = list_snapshots(control, trainers_of(log_path), deadline)
    if live is not None:
        _check_whole(next((row for row in rows if row.name == live.newest), None), live.newest, listed)
    run = StoredRun.read(log_path)
    others, unplaced = _named_by_others(home, run)
    kept = _kept(rows, policy, listed, others, keep, live.unusable if live is not None else ())
    dropped = tuple(row for row in rows if row.name not in kept)
    named = {ref for row in rows if row.name in kept for ref in snapshots_of(row)}
    begun = _begun(log_path)
    candidates = {ref for row in dropped for ref in snapshots_of(row)} | set(begun)
    swept = set(own_trainers(log_path)) - adopted_by_others(home, run.run_id)
    unnamed = {ref for ref in listed if ref.job_id in swept and ref.name not in unplaced}
    if live is not None:
        unnamed = {ref for ref in unnamed if not live.may_be_needed(ref, rows[-1].step)}
    candidates |= unnamed
    unplaced = {name for row in rows if row.name in kept for name in unplaced_names(row)}
    candidates -= named | set(others) | {ref for ref in candidates if ref.name in unplaced}
    return PrunePlan(
        kept=kept,
        rows=dropped,
        snapshots=tuple(found for ref, found in listed.items() if ref in candidates and ref.name not in keep),
        unfinished=tuple(ref for ref in begun if ref in candidates and ref not in listed),
    )


def prune(
    control: ControlPlane, run: RunDirectory, plan: PrunePlan, *, deadline: Deadline | None = None
) -> PruneResult:
    """Do what `plan_prune` decided: the record first, the data after it.

    Args:
        deadline: for all calls to the backend. None = each has its own.

    Raises:
        LeaseLost: the run is not this process's any more.
        CheckpointError: the record cannot be written; nothing was deleted.
        ProvisioningError: the backend is gone. The next prune goes on.
    """
    if plan.is_empty:
        return PruneResult((), (), ())
    with run.guard():
        _write_begun(run.path, [*(snapshot.ref for snapshot in plan.snapshots), *plan.unfinished])
        drop_checkpoints(run.path, {row.name for row in plan.rows})
    left: list[tuple[Snapshot, str]] = []
    unlisted = [Snapshot(ref, promotable=False, created="", size_bytes=None) for ref in plan.unfinished]
    for snapshot in [*unlisted, *plan.snapshots]:
        refusal = delete_snapshot(control, snapshot.ref, deadline)
        if refusal is not None:
            logger.warning("%s was not deleted: %s", snapshot.ref, refusal)
            left.append((snapshot, refusal))
    with run.guard():
        _write_begun(run.path, [snapshot.ref for snapshot, _ in left])
    refused = {snapshot for snapshot, _ in left}
    deleted = tuple(snapshot for snapshot in plan.snapshots if snapshot not in refused)
    return PruneResult(tuple(row.name for row in plan.rows), deleted, tuple(left))


def delete_snapshot(control: ControlPlane, ref: SnapshotRef, deadline: Deadline | None = None) -> str | None:
    """Delete a snapshot; the backend's words when it will not: it is in use, for one.

    Raises:
        ProvisioningError: the backend cannot be asked.
    """
    timeout_s = CALL_TIMEOUT_S if deadline is None else deadline.for_call(MIN_CALL_S)
    try:
        control.delete_checkpoint(ref.job_id, ref.name, ref.kind, timeout_s)
    except ProvisioningError as error:
        if not is_refused(error):
            raise
        return str(error)
    return None


def _kept(
    rows: Sequence[CheckpointRow],
    policy: RetentionPolicy,
    listed: Mapping[SnapshotRef, Snapshot],
    others: Mapping[SnapshotRef, str],
    keep: Collection[str],
    unusable: Collection[str],
) -> dict[str, str]:
    """Name -> why, in the order of the rows; the strongest reason wins."""
    newest = {row.name for row in [row for row in rows if row.name not in unusable][-policy.keep_last :]}
    resumable = [row for row in rows if row.state_path]
    whole = {ref for ref, snapshot in listed.items() if ref.kind == CheckpointKind.STATE and snapshot.is_whole}
    there = [row for row in resumable if not whole.isdisjoint(snapshots_of(row))]
    promotable = [row for row in rows if row.sampler_path]
    reasons: dict[str, str] = {}
    for row in rows:
        refs = snapshots_of(row)
        if row in resumable[-1:]:
            reasons[row.name] = "the last commit"
        elif used := [others[ref] for ref in refs if ref in others]:
            reasons[row.name] = f"run {used[0]} needs it"
        elif row.name in keep or any(ref.name in keep for ref in refs):
            reasons[row.name] = "in use"
        elif row in promotable[-1:]:
            reasons[row.name] = "the last promotable one"
        elif row in there[-1:]:
            reasons[row.name] = "the last commit that the backend has"
        elif row.name in unusable:
            reasons[row.name] = "it could not be loaded"
        elif row.name in newest:
            reasons[row.name] = f"one of the last {policy.keep_last}"
        elif policy.keep_every is not None and row.step % policy.keep_every == 0:
            reasons[row.name] = f"step {row.step:,} is a multiple of {policy.keep_every:,}"
        elif len(refs) != bool(row.state_path) + bool(row.sampler_path):
            reasons[row.name] = "its row does not say where its snapshots are"
    return reasons


def _check_whole(row: CheckpointRow | None, name: str, listed: Mapping[SnapshotRef, Snapshot]) -> None:
    """That a backend has all of a checkpoint that was just committed."""
    refs = snapshots_of(row) if row is not None else []
    lacking = [f"{ref}" for ref in refs if ref not in listed or not listed[ref].is_whole]
    if lacking or not refs:
        what = ", ".join(lacking) or "its row does not say where it is"
        raise CheckpointError(f"checkpoint {name} is not whole on the backend ({what}); the older ones are kept.")


def _named_by_others(home: Path, run: StoredRun) -> tuple[dict[SnapshotRef, str], set[str]]:
    """Snapshots that the other runs of a home need -> the run: those of their rows, and what they began from. And the
    names that their rows give to snapshots of trainers that cannot be told."""
    found: dict[SnapshotRef, str] = {}
    unplaced: set[str] = set()
    for entry in list_runs(home):
        if entry.run_id == run.run_id or entry.state == "gone":
            continue
        rows, other = read_checkpoints(entry.path), StoredRun.read(entry.path)
        refs = [ref for row in rows for ref in snapshots_of(row)]
        found |= dict.fromkeys([*refs, *begins_from(other)], entry.run_id)
        if other.backend in (run.backend, None):
            unplaced |= {name for row in rows for name in unplaced_names(row)}
    return found, unplaced


def _begun(log_path: Path) -> list[SnapshotRef]:
    """What an earlier prune was about to delete."""
    entries: list[dict[str, Any]] = (read_json(log_path / PRUNING_FILE) or {}).get("snapshots", [])
    return [SnapshotRef(entry["job_id"], CheckpointKind(entry["kind"]), entry["name"]) for entry in entries]


def _write_begun(log_path: Path, refs: Sequence[SnapshotRef]) -> None:
    path = log_path / PRUNING_FILE
    if refs:
        entries = [{"job_id": ref.job_id, "kind": ref.kind.value, "name": ref.name} for ref in refs]
        write_json(path, {"snapshots": entries})
    else:
        path.unlink(missing_ok=True)
