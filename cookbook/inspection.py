"""A run seen from outside, also while it is live: what its directory says, and what its backend says where that runs.

Nothing is changed, started or owned. What starting the run again would do is worked out in cookbook/restore_plan.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import ValidationError

from cookbook.checkpoints import CheckpointRow, read_checkpoints
from cookbook.config import RECIPE_CONFIGS, DPOConfig, Environment, RecipeConfig, RLConfig
from cookbook.deadlines import Deadline, call_with_deadline
from cookbook.errors import CheckpointError, CookbookError
from cookbook.files import read_json
from cookbook.ledger import ResourceRecord, read_resources
from cookbook.restore_plan import BackendView, DiskRecord, RecordedStep, Wanted
from cookbook.rollouts.ledger import RowLedger
from cookbook.rollouts.store import ROLLOUTS_FOLDER, RolloutStore
from cookbook.run import EVALUATION_FILE, RUN_FILE, SUMMARY_FILE, Progress, numbers_fingerprint, owner_of
from cookbook.snapshots import Snapshot, SnapshotRef, StoredRun, list_snapshots, trainers_of
from cookbook.tracking.tracker import METRICS_FILE
from cookbook.upkeep_record import read_upkeep

if TYPE_CHECKING:
    from cookbook.control_plane import ControlPlane

__all__ = ["BackendAnswer", "RunOnDisk", "ask_backend"]

_TAIL_BYTES = 64 * 1024
_FIND_TIMEOUT_S = 3.0
_ASK_TIMEOUT_S = 8.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOnDisk:
    """A run directory at one moment."""

    stored: StoredRun
    created: str
    """UTC, ISO 8601."""
    state: str
    """"running", "finished", "stopped", or "never started": nothing was provisioned yet."""
    lease: Mapping[str, Any]
    """Of the last owner: epoch (the number of the start), pid, host, started."""
    owner: Mapping[str, Any] | None
    """Who owns it now: pid, host, started, owner ("run" or "janitor"). None = nobody."""
    record: DiskRecord
    reached: Mapping[int, float]
    """Step -> when it was logged, in seconds since 1970: the newest lines of metrics.jsonl."""
    upkeep: Mapping[str, Mapping[str, Any]]
    """What upkeep.json says of each part."""
    summary: Mapping[str, Any] | None
    """How the run ended, as JSON data; None while it has not."""
    evaluation: Mapping[str, Any] | None
    """The same of an evaluation."""

    @classmethod
    def read(cls, log_path: Path) -> Self:
        """Look at a run directory.

        Raises:
            DataError: it is none.
            CheckpointError: run.json is damaged.
        """
        stored = StoredRun.read(log_path)
        path = stored.path
        described = read_json(path / RUN_FILE) or {}
        damage: list[str] = []
        owner = owner_of(path)
        summary = _readable(lambda: read_json(path / SUMMARY_FILE), None, damage)
        evaluation = _readable(lambda: read_json(path / EVALUATION_FILE), None, damage)
        commits: tuple[CheckpointRow, ...] = _readable(lambda: tuple(read_checkpoints(path)), (), damage)
        resources: tuple[ResourceRecord, ...] = _readable(lambda: tuple(read_resources(path)), (), damage)
        reached = dict(_last_steps(path / METRICS_FILE))
        fingerprint = str(described.get("data_fingerprint") or "")
        record = DiskRecord(
            run_id=stored.run_id,
            recipe=stored.recipe,
            is_finished=summary is not None or evaluation is not None,
            config=stored.config,
            commits=commits,
            resources=resources,
            wanted=_wanted(stored, resources),
            last_step=max(reached, default=None),
            recorded=lambda progress: list(_recorded(stored, fingerprint, progress)) if fingerprint else [],
            damage=tuple(damage),
        )
        return cls(
            stored=stored,
            created=str(described.get("created", "")),
            state=_state(record, owner),
            lease=described.get("lease") or {},
            owner=owner,
            record=record,
            reached=reached,
            upkeep=read_upkeep(path),
            summary=summary,
            evaluation=evaluation,
        )


@dataclass(frozen=True)
class BackendAnswer:
    """What a backend says of a run."""

    view: BackendView
    snapshots: Mapping[SnapshotRef, Snapshot] | None = None
    """None = not asked."""


def ask_backend(run: RunOnDisk, env: Environment) -> BackendAnswer:
    """Ask a run's backend about its trainers, deployments and checkpoints, for a few seconds at most.

    The embedded one is asked only where it runs, Fireworks only with a key from the environment. Never raises: why
    nobody was asked is in the answer.

    Args:
        env: whose home's backend is asked.
    """
    name = run.stored.backend
    try:
        control = _control(name, env)
    except CookbookError as error:
        return BackendAnswer(BackendView(name or "unknown", problem=str(error)))
    if isinstance(control, str):
        return BackendAnswer(BackendView(name or "unknown", problem=control))
    with control:
        try:
            return call_with_deadline(lambda: _answer(control, run), _ASK_TIMEOUT_S)
        except TimeoutError:
            problem = f"{control.base_url} did not answer within {_ASK_TIMEOUT_S:.0f} s"
        except CookbookError as error:
            problem = str(error)
        return BackendAnswer(BackendView(control.backend, problem=problem))


def _control(backend: str | None, env: Environment) -> ControlPlane | str:
    """The control plane of a backend that is there, else why it cannot be asked."""
    from cookbook import embedded
    from cookbook.config import bypass_proxies
    from cookbook.control_plane import ControlPlane, connect

    if backend == "fireworks":
        return connect(backend, env) if env.fireworks_api_key else "FIREWORKS_API_KEY is not set"
    if backend != "embedded":
        return f"{RUN_FILE} does not name one"
    endpoint = embedded.find(env.home, timeout_s=_FIND_TIMEOUT_S)
    if endpoint is None:
        return "none of this version of the code runs"
    bypass_proxies("127.0.0.1")
    return ControlPlane(backend, endpoint.base_url, endpoint.api_key.get_secret_value(), env.home / "models")


def _answer(control: ControlPlane, run: RunOnDisk) -> BackendAnswer:
    kept = [(record.kind, record.resource_id) for record in run.record.resources if record.state != "freed"]
    adopted = [(wanted.kind, wanted.adopted) for wanted in run.record.wanted if wanted.adopted is not None]
    states = {name: _state_of(control, kind, name) for kind, name in dict.fromkeys([*kept, *adopted])}
    snapshots = None
    if not run.record.damage:
        snapshots = list_snapshots(control, trainers_of(run.stored.path), Deadline(_ASK_TIMEOUT_S))
    whole = None if snapshots is None else [ref for ref, snapshot in snapshots.items() if snapshot.is_whole]
    return BackendAnswer(BackendView(control.backend, states=states, snapshots=whole), snapshots)


def _state_of(control: ControlPlane, kind: str, name: str) -> str | None:
    from cookbook.deployment_state import is_scaled_to_zero

    if kind == "trainer":
        found = control.job(name, _ASK_TIMEOUT_S)
    else:
        found = control.deployment(name, _ASK_TIMEOUT_S)
        if found is not None and is_scaled_to_zero(found):
            return "SCALED_TO_ZERO"
    return None if found is None else str(found.get("state", "UNKNOWN")).removeprefix("JOB_STATE_")


def _state(record: DiskRecord, owner: Mapping[str, Any] | None) -> str:
    if owner is not None and owner.get("owner") != "janitor":
        return "running"
    if record.is_finished:
        return "finished"
    has_begun = record.resources or record.commits or record.last_step is not None or record.damage
    return "stopped" if has_begun else "never started"


def _readable(read: Callable[[], T], absent: T, damage: list[str]) -> T:
    """What `read` gives; `absent` where the file is damaged, which is noted."""
    try:
        return read()
    except CheckpointError as error:
        damage.append(str(error))
        return absent


def _last_steps(path: Path) -> Iterator[tuple[int, float]]:
    """Step and time of the lines at the end of a file of metrics, of which there may be gigabytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
            yield int(row["step"]), float(row["time"])
        except (ValueError, KeyError, TypeError):  # the first one may be cut by us, the last one be torn
            continue


def _wanted(stored: StoredRun, resources: tuple[ResourceRecord, ...]) -> tuple[Wanted, ...]:
    """The trainers and deployments that a run works with, as its config says."""
    kind = RECIPE_CONFIGS.get(stored.recipe)
    if kind is None:
        return ()
    try:
        config: RecipeConfig = kind.model_validate(dict(stored.config))
    except ValidationError:  # another version of the code wrote it: what the run has asked for tells
        roles = dict.fromkeys((record.kind, record.role) for record in resources)
        return tuple(Wanted(kind, role) for kind, role in roles)
    if isinstance(config, RLConfig):
        found = [Wanted("trainer", "policy", config.policy_job_id)]
        if config.needs_reference_trainer:
            found.append(Wanted("trainer", "reference", config.reference_job_id))
        return (*found, Wanted("deployment", "sampler", config.deployment.deployment_id))
    found = [Wanted("trainer", "policy")]
    if isinstance(config, DPOConfig):
        if config.needs_reference_trainer:
            found.append(Wanted("trainer", "reference", is_certain=False))
        if config.has_deployment:
            found.append(Wanted("deployment", "sampler", config.deployment.deployment_id))
    return tuple(found)


def _recorded(stored: StoredRun, data_fingerprint: str, progress: Progress | None) -> Iterator[RecordedStep]:
    """The recorded steps that follow upon a commit, as far as the run would train them again."""
    store = RolloutStore(stored.path / ROLLOUTS_FOLDER, numbers_fingerprint(stored.config, data_fingerprint))
    step = 0 if progress is None else progress.step
    ledger: RowLedger | None = None
    while step in store.steps():
        collected = store.read_step(step, ledger)
        if collected is None:
            return
        if ledger is None and not collected.follows(_ledger_at(progress, collected.ledger.total)):
            return
        yield RecordedStep(step, len(collected.groups))
        step, ledger = step + 1, collected.ledger


def _ledger_at(progress: Progress | None, total: int) -> RowLedger:
    """The account of an RL run's rows at a commit, as the run makes it."""
    if progress is None:
        return RowLedger(total)
    return RowLedger(
        total,
        next_row=progress.position,
        open_rows=progress.open_rows,
        trained=progress.data_consumed - progress.rejected_rows,
        rejected=progress.rejected_rows,
    )
