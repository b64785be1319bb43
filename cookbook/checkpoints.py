"""Commits of a run: save_checkpoint, resolve_resume and the rows of checkpoints.jsonl between them.

A row is appended only after the remote save is confirmed, so the last row is a state that can be loaded, unless its
files were damaged since. No SDK here: the client brings it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.deadlines import Deadline
from cookbook.errors import DOES_NOT_FIT, CheckpointError, RequestRejected
from cookbook.files import append_jsonl, cut_torn_line, read_jsonl, replace_jsonl
from cookbook.run import CHECKPOINTS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from cookbook.client import ReconnectableClient

__all__ = [
    "CheckpointKind",
    "CheckpointRow",
    "PendingCheckpoint",
    "ResumeInfo",
    "begin_checkpoint",
    "drop_checkpoints",
    "last_commit",
    "last_promotable",
    "next_checkpoint_name",
    "read_checkpoints",
    "resolve_resume",
    "save_checkpoint",
]

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SAMPLER_SUFFIX_LENGTH = 9  # the SDK appends "-" and 8 hex digits to the names of sampler snapshots
_OWN_KEYS = ("name", "state_path", "sampler_path", "source_job_id", "base_model", "training_shape")

logger = logging.getLogger(__name__)


class CheckpointKind(StrEnum):
    """What a checkpoint holds."""

    STATE = "state"
    """Weights and optimizer: resumable."""
    SAMPLER = "sampler"
    """Weights for serving: promotable."""
    BOTH = "both"


@dataclass(frozen=True)
class CheckpointRow:
    """One line of checkpoints.jsonl."""

    name: str
    step: int
    """Optimizer steps in the weights."""
    data_consumed: int
    """Rows taken over all epochs."""
    state_path: str | None = None
    """Reference to load from, "cross_job://<job>/<name>"; None = not resumable."""
    sampler_path: str | None = None
    """Full name of the sampler snapshot; None = not promotable."""
    source_job_id: str | None = None
    """The trainer job that saved it."""
    base_model: str | None = None
    training_shape: str | None = None
    loop_state: Mapping[str, Any] = field(default_factory=dict)
    """Every other key of the row, with `step` and `data_consumed`."""


@dataclass(frozen=True)
class ResumeInfo:
    """Where a run goes on from."""

    step: int
    """Last completed step."""
    data_consumed: int
    """Data examples consumed."""
    source_job_id: str | None
    """The trainer job that the weights come from."""
    name: str
    """The checkpoint that was loaded."""
    loop_state: Mapping[str, Any] = field(default_factory=dict)
    """What `save_checkpoint` was given; empty for `init_from_checkpoint`."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Newer checkpoints that cannot be loaded: name -> why. Their rows are still there."""


class PendingCheckpoint:
    """A checkpoint whose state is being saved. It is a commit once its row is written. Made by `begin_checkpoint`."""

    def __init__(
        self,
        path: Path,
        row: dict[str, Any],
        labels: dict[str, str],
        guard: Callable[[], AbstractContextManager[None]],
        save: Callable[[], dict[str, str]],
    ) -> None:
        self.name = str(row["name"])
        self.step = int(row["step"])
        self._path = path
        self._row = row
        self._labels = labels
        self._guard = guard
        self._save = save

    def confirm(self) -> dict[str, str]:
        """Wait until all is saved; the paths, as `save_checkpoint` returns them.

        Raises:
            RequestRejected, TrainerLost: from the client.
        """
        return self._save()

    def append(self, paths: Mapping[str, str]) -> None:
        """Write the row: from here on it is a commit. It may be tried again.

        Raises:
            CheckpointError: the row cannot be written; nothing is committed.
            LeaseLost: from the guard.
        """
        with self._guard():
            append_jsonl(self._path, {**self._row, **paths, **self._labels})
        logger.info("checkpoint %s at step %d: %s", self.name, self.step, ", ".join(paths.values()))

    def commit(self) -> dict[str, str]:
        """`confirm`, then `append`; the paths."""
        paths = self.confirm()
        self.append(paths)
        return paths


def begin_checkpoint(
    client: ReconnectableClient,
    name: str,
    log_path: str | Path,
    loop_state: Mapping[str, Any],
    kind: str = "state",
    *,
    base_model: str | None = None,
    training_shape: str | None = None,
    guard: Callable[[], AbstractContextManager[None]] | None = None,
    timeout_s: float | None = None,
) -> PendingCheckpoint:
    """As `save_checkpoint`, without waiting for the state: training may go on, and the commit is made afterwards, in
    any thread. A sampler snapshot is waited for here.

    Args:
        timeout_s: seconds from now until all must be saved; None = the client's deadlines.

    Raises:
        CheckpointError: unusable name, kind, loop state or log_path; nothing was saved.
        RequestRejected, TrainerLost, LeaseLost: from the client and from the guard.
    """
    path = Path(log_path) / CHECKPOINTS_FILE
    chosen = _kind(kind)
    row = _row_of(loop_state)
    _check_name(path, name, chosen)
    guard = guard or nullcontext
    with guard():
        _check_writable(path)
    deadline = None if timeout_s is None else Deadline(timeout_s)

    def remaining() -> float | None:
        return None if deadline is None else deadline.for_call()

    state = None if chosen is CheckpointKind.SAMPLER else client.begin_save_state(name)
    sampler: dict[str, str] = {}
    if chosen is not CheckpointKind.STATE:
        sampler["sampler_path"] = client.save_weights_for_sampler_ext(name, "base", timeout_s=remaining())

    def save() -> dict[str, str]:
        if state is None:
            return sampler
        return {"state_path": _reference(client.job_id, state.result(remaining())), **sampler}

    labels = {"source_job_id": client.job_id, "base_model": base_model, "training_shape": training_shape}
    known = {key: value for key, value in labels.items() if value is not None}
    return PendingCheckpoint(path, {"name": name, **row}, known, guard, save)


def save_checkpoint(
    client: ReconnectableClient,
    name: str,
    log_path: str | Path,
    loop_state: Mapping[str, Any],
    kind: str = "state",
    *,
    base_model: str | None = None,
    training_shape: str | None = None,
    guard: Callable[[], AbstractContextManager[None]] | None = None,
) -> dict[str, str]:
    """Save the client's model, and commit: append a row to checkpoints.jsonl once the save is confirmed.

    Args:
        client: its model is saved.
        name: of the checkpoint, a DNS label never used in this log_path; `next_checkpoint_name` makes one.
        log_path: directory of checkpoints.jsonl; must exist.
        loop_state: JSON data that comes back from `resolve_resume`; with `step` and `data_consumed`, whole numbers.
        kind: "state" (weights and optimizer), "sampler" (for serving and promotion) or "both".
        base_model, training_shape: recorded in the row.
        guard: entered around the append; a run passes `RunDirectory.guard`.

    Returns:
        `state_path` and `sampler_path`, as far as the kind has them.

    Raises:
        CheckpointError: unusable name, kind, loop state or log_path (before anything is saved), or the row cannot be
            written (then the save is not a commit).
        RequestRejected, TrainerLost: from the client; nothing is committed.
        LeaseLost: from the guard.

    >>> save_checkpoint(client, "step-50", log_path, {"step": 50, "data_consumed": 200})  # doctest: +SKIP
    {'state_path': 'cross_job://sft-1f2e3d4c-policy-g1/step-50'}
    """
    pending = begin_checkpoint(
        client, name, log_path, loop_state, kind, base_model=base_model, training_shape=training_shape, guard=guard
    )
    return pending.commit()


def resolve_resume(
    client: ReconnectableClient, log_path: str | Path, init_from_checkpoint: str | None = None
) -> ResumeInfo | None:
    """Bring the client's model to where the run stopped, and say where that is.

    The last resumable row of checkpoints.jsonl is loaded, weights and optimizer. One that is damaged or missing is
    passed over, with a warning, for the one before it. Only when there is no such row, `init_from_checkpoint` is
    loaded: weights only, with a fresh optimizer, at step 0. With neither the model stays as it was made, and must not
    have been trained.

    Args:
        client: needs no restored model; this call restores it.
        log_path: the run directory.
        init_from_checkpoint: "name" of a state of the client's own trainer job, or "job_id:name".

    Returns:
        None for a fresh start without `init_from_checkpoint`.

    Raises:
        CheckpointError: none of the run's checkpoints can be loaded, or the newest that is whole is of another model,
            or checkpoints.jsonl is damaged. There is never a silent fresh start.
        TrainerLost: from the client.
    """
    rows = [row for row in read_checkpoints(log_path) if row.state_path]
    if rows:
        return _resume_from(client, Path(log_path) / CHECKPOINTS_FILE, rows)
    if init_from_checkpoint is not None:
        return _init_from(client, init_from_checkpoint)
    client.start_fresh()
    return None


def read_checkpoints(log_path: str | Path) -> list[CheckpointRow]:
    """The rows of checkpoints.jsonl, oldest first; rows with fewer or more keys are accepted.

    Raises:
        CheckpointError: a line is not a JSON object (a torn last one is left out and logged), or a row has no name.
    """
    path = Path(log_path) / CHECKPOINTS_FILE
    return [_parse(path, number, row) for number, row in enumerate(read_jsonl(path), start=1)]


def drop_checkpoints(log_path: str | Path, names: Collection[str]) -> None:
    """Take rows out of checkpoints.jsonl, all at once; the other rows stay as they were written.

    Call it under the guard of the run. Their data is deleted after that (cookbook/retention.py), never before.

    Raises:
        CheckpointError: the file is damaged or cannot be written; all rows are kept.
    """
    path = Path(log_path) / CHECKPOINTS_FILE
    rows = read_jsonl(path)
    kept = [row for row in rows if row.get("name") not in names]
    if len(kept) < len(rows):
        replace_jsonl(path, kept)


def last_commit(log_path: str | Path) -> CheckpointRow | None:
    """The last commit: the newest row with weights and optimizer, or None.

    Raises:
        CheckpointError: as for `read_checkpoints`.
    """
    rows = [row for row in read_checkpoints(log_path) if row.state_path]
    return rows[-1] if rows else None


def last_promotable(log_path: str | Path) -> CheckpointRow | None:
    """The newest row with a sampler snapshot, or None.

    Raises:
        CheckpointError: as for `read_checkpoints`.
    """
    rows = [row for row in read_checkpoints(log_path) if row.sampler_path]
    return rows[-1] if rows else None


def next_checkpoint_name(log_path: str | Path, base: str, taken: Collection[str] = ()) -> str:
    """`base`, or `base-r2`, `base-r3`, ...: the first name that neither checkpoints.jsonl nor `taken` has.

    `taken` are names whose save may have happened without a row, because the answer was lost: those that an earlier
    attempt tried, or `client.list_checkpoints()`.

    >>> next_checkpoint_name("no/such/run", "step-50", taken=["step-50"])
    'step-50-r2'
    """
    used = {row.name for row in read_checkpoints(log_path)} | set(taken)
    name, attempt = base, 1
    while name in used:
        attempt += 1
        name = f"{base}-r{attempt}"
    return name


def _resume_from(client: ReconnectableClient, path: Path, rows: Sequence[CheckpointRow]) -> ResumeInfo:
    """Load the newest of the rows that can be loaded."""
    skipped: dict[str, str] = {}
    for row in reversed(rows):
        try:
            _load_row(client, row)
        except RequestRejected as error:
            if DOES_NOT_FIT in str(error):
                raise CheckpointError(
                    f"checkpoint {row.name!r} (step {row.step}) of {path} cannot be loaded from {row.state_path}: "
                    f"{error}. Set the model settings back, or start in a new log_path."
                ) from error
            skipped[row.name] = str(error)
            logger.warning("checkpoint %s (step %d) CANNOT BE LOADED and is passed over: %s", row.name, row.step, error)
            continue
        logger.info("resumed from %s at step %d", row.name, row.step)
        return ResumeInfo(row.step, row.data_consumed, row.source_job_id, row.name, row.loop_state, skipped)
    reasons = "".join(f"\n  - {name!r} (step {row.step}): {skipped[name]}" for row in rows if (name := row.name))
    raise CheckpointError(
        f"none of the {len(rows)} checkpoints of {path} can be loaded:{reasons}\nRestore the snapshot of one, "
        "or start in a new log_path from row 0."
    )


def _load_row(client: ReconnectableClient, row: CheckpointRow) -> None:
    """Load one checkpoint. RequestRejected when it cannot be, or when it is not what its row says."""
    assert row.state_path is not None, "a resumable row has a state_path"
    saved_step = client.saved_step(row.state_path)
    if saved_step not in (None, row.step):
        raise RequestRejected(f"{row.state_path} holds the weights of step {saved_step}, its row says {row.step}.")
    client.load_state_with_optimizer(row.state_path, step=row.step)


def _init_from(client: ReconnectableClient, init_from_checkpoint: str) -> ResumeInfo:
    job_id, _, name = init_from_checkpoint.rpartition(":")
    try:
        client.load_state(client.resolve_checkpoint_path(name, source_job_id=job_id or None))
    except RequestRejected as error:
        raise CheckpointError(
            f"init_from_checkpoint {init_from_checkpoint!r} cannot be loaded: {error}. "
            'Name an existing state as "job_id:name".'
        ) from error
    logger.info("initialized the weights from %s", init_from_checkpoint)
    return ResumeInfo(step=0, data_consumed=0, source_job_id=job_id or client.job_id, name=name)


def _reference(job_id: str, saved_path: str) -> str:
    """What to load a saved state by, from any trainer job. The path that the trainer answered is authoritative; a bare
    name is qualified with its job."""
    return saved_path if "/" in saved_path else f"cross_job://{job_id}/{saved_path}"


def _kind(kind: str) -> CheckpointKind:
    try:
        return CheckpointKind(kind)
    except ValueError:
        choices = ", ".join(choice.value for choice in CheckpointKind)
        raise CheckpointError(f"kind must be one of {choices}, got {kind!r}.") from None


def _row_of(loop_state: Mapping[str, Any]) -> dict[str, Any]:
    """The loop state as it will come back from the file."""
    reserved = [key for key in _OWN_KEYS if key in loop_state]
    if reserved:
        raise CheckpointError(f"loop_state must not have the keys {reserved}: checkpoint rows use them. Rename them.")
    try:
        row = json.loads(json.dumps(dict(loop_state), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"loop_state cannot be written as JSON: {error}. Use numbers, strings, lists.") from None
    for key in ("step", "data_consumed"):
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), int) or row[key] < 0:
            raise CheckpointError(f"loop_state needs {key!r} as a whole number >= 0, got {row.get(key)!r}.")
    return dict(row)


def _check_name(path: Path, name: str, kind: CheckpointKind) -> None:
    longest = 63 if kind is CheckpointKind.STATE else 63 - _SAMPLER_SUFFIX_LENGTH
    if not _DNS_LABEL.fullmatch(name) or len(name) > longest:
        raise CheckpointError(
            f"checkpoint name {name!r} cannot be used: 1 to {longest} of a-z, 0-9 and '-', not at the ends."
        )
    if any(row.name == name for row in read_checkpoints(path.parent)):
        raise CheckpointError(f"checkpoint {name!r} is in {path} already. Use next_checkpoint_name().")


def _check_writable(path: Path) -> None:
    """Open the file as the append will, so that no save is paid for in vain."""
    try:
        cut_torn_line(path)
        path.open("ab").close()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}; nothing was saved. Make log_path, and make it writable."
        ) from error


def _parse(path: Path, number: int, row: Mapping[str, Any]) -> CheckpointRow:
    name = row.get("name")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}, row {number} has no name: {dict(row)!r:.200}. Restore the file from a backup.")
    labels = {key: row.get(key) for key in _OWN_KEYS if key != "name"}
    loop_state = {key: value for key, value in row.items() if key not in _OWN_KEYS}
    try:
        return CheckpointRow(
            name, int(row.get("step", 0)), int(row.get("data_consumed", 0)), **labels, loop_state=loop_state
        )
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{path}, row {number} ({name!r}): step and data_consumed must be whole numbers, got "
            f"{row.get('step')!r} and {row.get('data_consumed')!r}."
        ) from None
