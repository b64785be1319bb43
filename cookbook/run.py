"""The run directory: who owns a run, what it was configured with and how far it is.

run.json and summary.json are written here, resources.jsonl in cookbook/ledger.py, checkpoints.jsonl in
cookbook/checkpoints.py, metrics.jsonl in cookbook/tracking. No SDK and no torch: the command line lists runs with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cookbook.errors import CheckpointError, ConfigError, LeaseLost, Problem
from cookbook.files import cut_torn_line, file_lock, read_json, read_jsonl, try_lock, write_json
from cookbook.summary import RunSummary

__all__ = [
    "CHECKPOINTS_FILE",
    "EVALUATION_FILE",
    "JANITOR",
    "LOCK_FILE",
    "RESOURCES_FILE",
    "RUN_FILE",
    "SUMMARY_FILE",
    "Progress",
    "RunDirectory",
    "RunRecord",
    "fixed_fields",
    "is_finished",
    "is_owned",
    "list_runs",
    "numbers_fingerprint",
    "owner_of",
    "read_run",
]

RUN_FILE = "run.json"
RESOURCES_FILE = "resources.jsonl"
CHECKPOINTS_FILE = "checkpoints.jsonl"
SUMMARY_FILE = "summary.json"
EVALUATION_FILE = "evaluation.json"
"""What an evaluation ends with, in place of a summary."""
LOCK_FILE = ".lock"
WRITE_LOCK_FILE = ".write.lock"

FREE_FIELDS = (
    "concurrency",
    "dataset",  # its content is pinned by fingerprint; the file may move
    "deployment",
    "evaluation",
    "infra",
    "init_from_checkpoint",
    "log_path",
    "logprob_check_limit",
    "output_model_id",
    "policy_base_url",
    "policy_job_id",
    "promote_timeout_s",
    "ref_cache_concurrency",
    "reference_base_url",
    "reference_job_id",
    "retry",
    "reward_timeout_s",
    "runner",
    "save_final_checkpoint",
    "save_on_sigterm",
    "sigterm_grace_s",
    "step_timeout",
    "storage",
    "trajectory_dir",
    "wandb",
    "weight_sync.dcp_save_interval",
    "weight_sync.dcp_timeout",
    "weight_sync.weight_sync_timeout",
)
"""Config fields (with all below them) that may change when a run is resumed. Every other one changes its numbers."""

PINNED_FIELDS = ("deployment.tokenizer_model", "infra.ref_training_shape_id")
"""Fields below free ones that do change a run's numbers."""

JANITOR = "janitor"
"""Owner of a lease that is only freeing what an earlier owner left; a run that starts waits for it."""

_LEASE_WAIT_S = 1.0  # `list_runs` holds the lock for a moment to see whether a run is live
_JANITOR_WAIT_S = 60.0
_WRITE_LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Progress:
    """How far a run is: the loop state of its commit rows. A position is recorded, never made from step and batch."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Passes over the data done."""
    position: int
    """Next row, as an ordinal in this epoch's permutation."""
    data_consumed: int
    """Rows taken over all epochs, rejected ones included."""
    permutation_seed: int
    """Seed of the order of rows."""
    total_steps: int
    """Steps of the whole run, the denominator of the learning-rate schedule. Fixed before the first step."""
    rejected_rows: int = 0
    """Rows taken but not trained."""
    trained_tokens: int = 0
    """Tokens with a non-zero weight, over all steps."""
    open_rows: tuple[int, ...] = ()
    """RL: rows before `position` that are neither trained nor rejected, as ordinals over the whole run."""

    def to_loop_state(self) -> dict[str, Any]:
        """The record as the loop state of a checkpoint row."""
        return asdict(self) | {"open_rows": list(self.open_rows)}

    @classmethod
    def from_loop_state(cls, loop_state: Mapping[str, Any]) -> Self:
        """Read a record back. Unknown keys are ignored, so that later versions may add some.

        Raises:
            CheckpointError: a key is missing, or is not a whole number >= 0 (`open_rows`: a list of them).
        """
        values: dict[str, Any] = {}
        for entry in fields(cls):
            value = loop_state.get(entry.name, entry.default)
            is_list = entry.name == "open_rows"
            if not (isinstance(value, list | tuple) and all(map(_is_count, value)) if is_list else _is_count(value)):
                got = repr(loop_state[entry.name]) if entry.name in loop_state else "nothing"
                raise CheckpointError(
                    f"the loop state of a checkpoint needs {entry.name!r} as a "
                    f"{'list of whole numbers' if is_list else 'whole number'} >= 0, got {got}. "
                    "The row was not written by this recipe: resume from another one, or start in a new log_path."
                )
            values[entry.name] = tuple(value) if is_list else value
        return cls(**values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class RunDirectory:
    """An open run directory, owned by this process until it is closed or dies.

    Two locks guard it. The lease lock is held for the life of the owner, so a second owner is refused and a killed one
    leaves nothing behind. Every write also checks, under a short lock, that the lease epoch in run.json is still ours:
    an owner that lost its lock without noticing (a file system that forgets locks) cannot write any more.

    >>> with RunDirectory.open("runs/a", recipe="sft", config=config.model_dump(mode="json"), home=home) as run:
    ...     run.run_id  # doctest: +SKIP
    'sft-1f2e3d4c'
    """

    def __init__(self, path: Path, lock: int, record: Mapping[str, Any]) -> None:
        self.path = path
        self.run_id = str(record["run_id"])
        self.recipe = str(record["recipe"])
        self.epoch = int(record["lease"]["epoch"])
        self._lock: int | None = lock

    @classmethod
    def open(
        cls,
        log_path: str | Path,
        *,
        recipe: str,
        config: Mapping[str, Any],
        home: Path,
        owner: str = "run",
        started_by: str | None = None,
    ) -> Self:
        """Own the run in `log_path`; make it when there is none.

        Args:
            log_path: the run directory; made when absent.
            recipe: name of the recipe, the first part of a new run's id.
            config: the whole config as JSON data. Once the run has a commit, fields that change its numbers may not
                change any more (`FREE_FIELDS` lists those that may).
            home: COOKBOOK_HOME, whose `runs` folder lists all runs.
            owner: "run", or JANITOR: gives up at once where a process owns the run, and holds it shortly.
            started_by: id of the flow run that this process works for, for whoever loses the run to it.

        Raises:
            LeaseLost: another process owns the run; names its pid and host, and since when.
            ConfigError: the config differs from the one the run began with.
            CheckpointError: the directory cannot be written, or a file in it is damaged.
        """
        path = Path(log_path).expanduser().resolve()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"log_path {path} cannot be made: {error.strerror}. Use a folder that can be written."
            ) from error
        process = _this_process(started_by)
        lock = _own(path, owner, process)
        try:
            with file_lock(path / WRITE_LOCK_FILE, _WRITE_LOCK_TIMEOUT_S):
                record = _next_record(path, recipe, config, home, process)
                write_json(path / RUN_FILE, record)
                for name in (CHECKPOINTS_FILE, RESOURCES_FILE):  # nobody else can be writing them any more
                    cut_torn_line(path / name)
            entry = {"run_id": record["run_id"], "recipe": recipe, "path": str(path), "created": record["created"]}
            write_json(home / "runs" / f"{record['run_id']}.json", entry)
            return cls(path, lock, record)
        except BaseException:
            os.close(lock)
            raise

    def renewed(self) -> Self:
        """Own the run for its next start in this process, with the next epoch; this object writes nothing any more.

        Raises:
            LeaseLost: another process owns the run.
            CheckpointError: the directory cannot be written; this object is as it was.
        """
        with self.guard():
            record = self._record()
            record["lease"] = {**record["lease"], "epoch": self.epoch + 1}
            write_json(self.path / RUN_FILE, record)
            lock, self._lock = self._lock, None
        assert lock is not None, "the guard has seen it"
        return type(self)(self.path, lock, record)

    def close(self) -> None:
        """Give up the run. Nothing can be written after that."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r}, run_id={self.run_id!r}, epoch={self.epoch})"

    def user_metadata(self) -> dict[str, str]:
        """What a training session says of its owner, so that a trainer can shut out older owners of the run."""
        return {"cookbook_run": self.run_id, "cookbook_epoch": str(self.epoch)}

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Hold the write lock for one write in the run directory. Short, and not to be nested.

        Raises:
            LeaseLost: another process has taken the run over, or this one has closed it.
        """
        with file_lock(self.path / WRITE_LOCK_FILE, _WRITE_LOCK_TIMEOUT_S):
            if self._lock is None:
                raise LeaseLost(f"run {self.run_id} in {self.path} is closed in this process; nothing more is written.")
            lease = self._record()["lease"]
            if lease["epoch"] != self.epoch:
                raise LeaseLost(
                    f"run {self.run_id} in {self.path} was taken over by {_owner(lease)}: its lease has epoch "
                    f"{lease['epoch']}, this process has {self.epoch}. This process stops, and has written nothing "
                    "since; the run goes on there. To have it here instead, stop that process and start again.",
                    started_by=lease.get("started_by"),
                )
            yield

    def check_lease(self) -> None:
        """Check that the run still is this process's, before something that another owner must not do as well.

        Raises:
            LeaseLost: as for `guard`.
        """
        with self.guard():
            pass

    def pin_data(self, fingerprint: str, *, sha256: str | None = None, num_rows: int | None = None) -> None:
        """Tie the run to its training data: the fingerprint of every rendered row.

        Args:
            sha256, num_rows: of the data file (of a procedural task: of its rows as a file), for the record.

        Raises:
            CheckpointError: the run has a commit, and was made on other data.
        """
        with self.guard():
            record = self._record()
            pinned = record["data_fingerprint"]
            if pinned not in (None, fingerprint) and (step := _last_commit(self.path)) is not None:
                raise CheckpointError(
                    f"the data of run {self.run_id} in {self.path} has changed since its commit at step {step}: "
                    f"fingerprint {fingerprint}, was {pinned}. Rows would be trained twice or never. Restore the data "
                    "(and tokenizer), or start in a new log_path; init_from_checkpoint takes the weights along."
                )
            data = {"data_fingerprint": fingerprint, "data_sha256": sha256, "data_rows": num_rows}
            if record | data != record:
                write_json(self.path / RUN_FILE, record | data)

    def summary(self) -> RunSummary | None:
        """What the run came to, or None while it has not ended well."""
        values = read_json(self.path / SUMMARY_FILE)
        return None if values is None else RunSummary.from_dict(values)

    def finish(self, summary: RunSummary) -> None:
        """Record that the run has ended well."""
        with self.guard():
            write_json(self.path / SUMMARY_FILE, summary.to_dict())

    def _record(self) -> dict[str, Any]:
        record = read_json(self.path / RUN_FILE)
        if record is None:
            raise LeaseLost(f"{self.path / RUN_FILE} is gone: run {self.run_id} was removed. This process must stop.")
        return record


@dataclass(frozen=True)
class RunRecord:
    """A run that was started under this COOKBOOK_HOME."""

    run_id: str
    recipe: str
    path: Path
    created: str
    """UTC, ISO 8601."""
    state: str
    """"running" (a process owns it), "finished", "stopped" (can be resumed), "gone" (its directory is)."""


def list_runs(home: Path) -> list[RunRecord]:
    """All runs that were started under this home, oldest first."""
    runs = [read_run(entry) for entry in (home / "runs").glob("*.json")]
    return sorted((run for run in runs if run is not None), key=lambda run: run.created)


def read_run(entry: Path) -> RunRecord | None:
    """The run of one file of the registry, `<home>/runs/<run id>.json`; None when it has been removed.

    Raises:
        CheckpointError: the file or the run's own record is damaged.
    """
    record = read_json(entry)
    if record is None:
        return None
    path = Path(record["path"])
    return RunRecord(record["run_id"], record["recipe"], path, record["created"], _state_of(path, record["run_id"]))


def is_owned(path: Path) -> bool:
    """Whether a live process owns the run in a directory.

    Raises:
        CheckpointError: its lock cannot be opened.
    """
    if not (path / LOCK_FILE).exists():
        return False
    lock = try_lock(path / LOCK_FILE, shared=True)
    if lock is not None:
        os.close(lock)
    return lock is None


def owner_of(path: Path) -> dict[str, Any] | None:
    """Who owns the run in a directory: pid, host, started, and owner ("run" or JANITOR). None = no live process does.

    {} = one does, and has not said who it is. For the moment in which a new owner has the lock and has not written
    itself into it, this may be who had it before.

    Raises:
        CheckpointError: its lock cannot be opened.
    """
    return _lock_holder(path) if is_owned(path) else None


def is_finished(path: Path) -> bool:
    """Whether the run or evaluation in a directory has come to its end."""
    return any((path / name).exists() for name in (SUMMARY_FILE, EVALUATION_FILE))


def _state_of(path: Path, run_id: str) -> str:
    if (read_json(path / RUN_FILE) or {}).get("run_id") != run_id:
        return "gone"
    lock = try_lock(path / LOCK_FILE, shared=True)
    if lock is None:
        return "running"
    os.close(lock)
    return "finished" if is_finished(path) else "stopped"


def _own(path: Path, owner: str, process: Mapping[str, Any]) -> int:
    """The lease lock of a run directory, with this process written into it."""
    started = time.monotonic()
    while (lock := try_lock(path / LOCK_FILE)) is None:
        holder = _lock_holder(path)
        wait_s = 0.0 if owner == JANITOR else _JANITOR_WAIT_S if holder.get("owner") == JANITOR else _LEASE_WAIT_S
        if time.monotonic() - started >= wait_s:
            raise LeaseLost(
                f"{path} is owned by {_owner(holder)}. Wait for it or stop it, or use another log_path.",
                started_by=holder.get("started_by"),
            )
        time.sleep(0.05)
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({**process, "owner": owner}).encode(), 0)
    except OSError as error:
        os.close(lock)
        raise CheckpointError(f"{path / LOCK_FILE} cannot be written: {error.strerror}.") from error
    return lock


def _lock_holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads((path / LOCK_FILE).read_bytes())
    except (OSError, ValueError):  # taken this very moment, not yet written
        return {}
    return holder if isinstance(holder, dict) else {}


def _owner(lease: Mapping[str, Any]) -> str:
    pid, host, started = (lease.get(name, "?") for name in ("pid", "host", "started"))
    return f"process {pid} on {host}, since {started}"


def _this_process(started_by: str | None) -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _now(), "started_by": started_by}


def _next_record(
    path: Path, recipe: str, config: Mapping[str, Any], home: Path, process: Mapping[str, Any]
) -> dict[str, Any]:
    """run.json for the next owner: a new run, or the present one with the next lease epoch."""
    record = read_json(path / RUN_FILE)
    if record is None:
        commit = _last_commit(path)
        if commit is not None:
            raise CheckpointError(
                f"{path} has a commit at step {commit} but no {RUN_FILE}, so whose it is cannot be told. "
                "Restore the file, or use another log_path."
            )
        record = {"run_id": f"{recipe}-{secrets.token_hex(4)}", "recipe": recipe, "created": _now()}
        record |= {"data_fingerprint": None, "lease": {"epoch": 0}}
    else:
        _check_same_run(path, record, recipe, config, home)
    canonical = json.dumps(config, sort_keys=True)
    return {
        **record,
        "config": dict(config),
        "config_fingerprint": hashlib.sha256(canonical.encode()).hexdigest(),
        "lease": {"epoch": record["lease"]["epoch"] + 1, **process},
    }


def _check_same_run(path: Path, record: Mapping[str, Any], recipe: str, config: Mapping[str, Any], home: Path) -> None:
    run_id = record["run_id"]
    if record["recipe"] != recipe:
        what = f"{path} holds run {run_id} of recipe {record['recipe']!r}, this is {recipe!r}."
        raise ConfigError([Problem("log_path", what, "Use another log_path.")])
    registered = read_json(home / "runs" / f"{run_id}.json")
    if registered is not None:
        other = Path(registered["path"])
        if other != path and (read_json(other / RUN_FILE) or {}).get("run_id") == run_id:
            what = f"{path} is a copy of {other}: both are run {run_id}, and would fight over its trainers."
            raise ConfigError([Problem("log_path", what, "Resume the original, or start in an empty folder.")])
    step = _last_commit(path)
    if step is not None:
        problems = [
            Problem(
                name,
                f"is {new!r}, but run {run_id} was started with {old!r} and has a commit at step {step}.",
                "Set it back, or use a new log_path; init_from_checkpoint takes the weights along.",
            )
            for name, old, new in _changes(record["config"], config)
        ]
        if problems:
            raise ConfigError(problems)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of every field that must not change. A field only one of the two knows may differ:
    another version of the code wrote the config."""
    changes = []
    for name in sorted(old.keys() & new.keys()):
        path = prefix + name
        if old[name] == new[name]:
            continue
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            changes += _changes(old[name], new[name], f"{path}.")
        elif not _is_free(path):
            changes.append((path, old[name], new[name]))
    return changes


def numbers_fingerprint(config: Mapping[str, Any], data_fingerprint: str) -> str:
    """sha256 (hex) of the data and of every config field that changes a run's numbers: those that are not free."""
    text = json.dumps([fixed_fields(config), data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fixed_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config that change a run's numbers, blocks flattened: "adam.beta1", ..."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix + name
        if isinstance(value, Mapping):
            found |= fixed_fields(value, f"{path}.")
        elif not _is_free(path):
            found[path] = value
    return found


def _is_free(path: str) -> bool:
    return path not in PINNED_FIELDS and any(path == free or path.startswith(f"{free}.") for free in FREE_FIELDS)


def _last_commit(path: Path) -> int | None:
    """Step of the last row of checkpoints.jsonl that can be resumed from."""
    rows = [row for row in read_jsonl(path / CHECKPOINTS_FILE) if row.get("state_path")]
    return int(rows[-1].get("step", 0)) if rows else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
