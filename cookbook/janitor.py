"""The janitor: frees trainers and deployments that no live run owns. Everything is looked at before anything is freed.

Ours is what a ledger of this home names; where a run directory is gone, what has an id of that run. All else is
foreign, and what a run has adopted belongs to somebody else: neither is touched. Safe to run at any time, twice, and to
kill at any moment. Retrying the runs themselves: tasks/supervision.py.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.deployment_state import DELETED as DELETED_DEPLOYMENT
from cookbook.embedded import has_workers
from cookbook.errors import CookbookError, LeaseLost, ProvisioningError
from cookbook.ledger import ResourceLedger, ResourceRecord, read_resources
from cookbook.provisioning import DELETED, STOPPED, STOPPING
from cookbook.run import JANITOR, RunDirectory, RunRecord, read_run
from cookbook.sessions import FOLDER as SESSIONS
from cookbook.snapshots import StoredRun, begins_from, trainers_of

if TYPE_CHECKING:
    from cookbook.control_plane import ControlPlane

__all__ = ["GRACE_S", "Finding", "SweepReport", "backends_to_sweep", "survey", "sweep"]

GRACE_S = 300.0
"""Seconds for which something that a run has just asked for is left alone."""

_CALL_TIMEOUT_S = 30.0  # a run that starts waits for us
_DONE = {"keep": "kept", "cancel": "cancelled", "delete": "deleted"}
_SESSION_KINDS = ("chat", "serve")
_LIVE = ("running", "unknown")
_TAKEN_OVER = "a process has taken the run over meanwhile"
_ADOPTING = ("policy_job_id", "reference_job_id", "deployment_id")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """A trainer or deployment that the backend has, or may have in a moment, and what is to be done about it."""

    kind: str
    """"trainer" or "deployment"."""
    resource_id: str
    state: str
    """In the backend's words; "" when it is not there."""
    run_id: str | None
    """Whose it is; None = of no run of this home."""
    action: str
    """"keep", "cancel" (its hardware is freed, it can be resumed) or "delete"."""
    reason: str


@dataclass(frozen=True)
class SweepReport:
    """What a sweep has found and done."""

    backend: str
    findings: tuple[Finding, ...]
    """Everything that was found, ours first."""
    freed: tuple[Finding, ...] = ()
    left: tuple[tuple[Finding, str], ...] = ()
    """What was to be freed and could not be, and why. The next sweep tries again."""
    sessions: tuple[str, ...] = ()
    """Chats and servers that were killed, whose records were removed."""
    problems: tuple[str, ...] = ()
    """Records that cannot be read. What they may own was left alone."""

    @property
    def foreign(self) -> int:
        """How many of the findings are of no run of this home."""
        return sum(finding.run_id is None for finding in self.findings)

    def rows(self) -> list[dict[str, str]]:
        """What is ours, as a table: what it is, what became of it, and why."""
        problems = dict(self.left)
        rows = []
        for finding in (found for found in self.findings if found.run_id is not None):
            done = _DONE[finding.action]
            if finding in problems:
                done = f"not {done}: {problems[finding]}"
            elif finding.action != "keep" and finding not in self.freed:
                done = f"to be {done}"
            rows.append(
                {
                    "resource": f"{finding.kind} {finding.resource_id}",
                    "state": finding.state.removeprefix("JOB_STATE_").lower() or "not there",
                    "run": str(finding.run_id),
                    "done": done,
                    "why": finding.reason,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            **asdict(self),
            "left": [{**asdict(finding), "problem": problem} for finding, problem in self.left],
        }


@dataclass(frozen=True)
class _Owner:
    """A run or session of this home that may own something on the backend."""

    run_id: str
    path: Path
    state: str
    """As in RunRecord, or "unknown": its record is damaged."""
    resources: Mapping[str, ResourceRecord] = field(default_factory=dict)
    uses: frozenset[str] = frozenset()
    """Of others: trainers and deployments that it has adopted, trainers whose checkpoints it needs."""
    stored: StoredRun | None = None
    is_session: bool = False

    def owns(self, kind: str, resource_id: str) -> bool:
        if self.state in ("gone", "unknown"):
            prefix = "" if kind == "trainer" else r"[a-z0-9-]+-"
            pattern = rf"{prefix}{re.escape(self.run_id)}(-[a-z0-9-]+)?"
            return re.fullmatch(pattern, resource_id) is not None
        record = self.resources.get(resource_id)
        return record is not None and record.kind == kind


def backends_to_sweep(home: Path, *, has_key: bool) -> list[str]:
    """The backends where something of this home may run. Starts none, and asks none.

    Args:
        has_key: whether there is a key for fireworks.
    """
    found = ["embedded"] if has_workers(home) else []
    if has_key:
        owners, _ = _owners(home, "fireworks")
        found += ["fireworks"] if owners else []
    return found


def survey(home: Path, control: ControlPlane, *, grace_s: float = GRACE_S) -> list[Finding]:
    """Everything that the backend has, and what a sweep would do about each. Nothing is touched.

    Args:
        home: COOKBOOK_HOME, whose runs and sessions are looked at.
        control: the backend.
        grace_s: how long something that a run has just asked for is left alone.

    Raises:
        ProvisioningError: the backend cannot be asked.
    """
    owners, _ = _owners(home, control.backend)
    return _findings(owners, control, grace_s)


def sweep(home: Path, control: ControlPlane, *, grace_s: float = GRACE_S, dry_run: bool = False) -> SweepReport:
    """Free what no live run owns, one run after the other. Each is owned meanwhile, so that nobody starts it.

    Trainers of a stopped run are cancelled, those of a finished one deleted; checkpoints stay. A trainer that another
    run needs, or only its checkpoints, is never deleted. Deployments are deleted.

    Args:
        dry_run: only look.

    Raises:
        ProvisioningError: the backend cannot be asked. Failures to free something are in the report.
    """
    owners, problems = _owners(home, control.backend)
    report = SweepReport(control.backend, tuple(_findings(owners, control, grace_s)), problems=tuple(problems))
    if dry_run:
        return report
    for owner in owners:
        report = _swept(report, owner, home, control)
    return report


# -- whose is what -----------------------------------------------------------------------------------------------------


def _owners(home: Path, backend: str) -> tuple[list[_Owner], list[str]]:
    """All runs and sessions of a home on this backend, and what could not be read of them."""
    owners, problems = [], []
    for entry in sorted((home / "runs").glob("*.json")):
        record = None
        try:
            record = read_run(entry)
            owner = None if record is None else _owner(record, home, backend)
        except (CookbookError, KeyError, TypeError, AttributeError) as error:
            path = entry if record is None else record.path
            owner = _Owner(entry.stem, path, "unknown", uses=_adopted_by(path))
            problems.append(f"the record of run {entry.stem} cannot be read: {error}")
        if owner is not None:
            owners.append(owner)
    return owners, problems


def _owner(run: RunRecord, home: Path, backend: str) -> _Owner | None:
    """What a run owns and uses; None when that is on another backend.

    Raises:
        CheckpointError: one of its records is damaged.
    """
    if run.state == "gone":
        return _Owner(run.run_id, run.path, run.state)
    stored = StoredRun.read(run.path)
    if stored.backend != backend:
        return None
    resources = {record.resource_id: record for record in read_resources(run.path)}
    uses: set[str] = set()
    if run.state != "finished":
        uses = {*_adopted(stored.config), *trainers_of(run.path), *(ref.job_id for ref in begins_from(stored))}
    is_session = run.path.parent == (home / SESSIONS).resolve() and run.recipe in _SESSION_KINDS
    return _Owner(run.run_id, run.path, run.state, resources, frozenset(uses - set(resources)), stored, is_session)


def _adopted_by(path: Path) -> frozenset[str]:
    """What a run has adopted of which little can be read."""
    try:
        return frozenset(_adopted(StoredRun.read(path).config))
    except (CookbookError, KeyError, TypeError, AttributeError):
        return frozenset()


def _adopted(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _adopted(value)
        elif name in _ADOPTING and isinstance(value, str):
            yield value


# -- what is to be done ------------------------------------------------------------------------------------------------


def _findings(owners: Sequence[_Owner], control: ControlPlane, grace_s: float) -> list[Finding]:
    listed = [("trainer", job) for job in control.list_jobs()]
    listed += [("deployment", deployment) for deployment in control.list_deployments()]
    states = {(kind, _id_of(found)): str(found.get("state", "")) for kind, found in listed}
    findings, ours = [], set()
    for owner in owners:
        named = [(record.kind, name) for name, record in owner.resources.items()]
        for kind, name in dict.fromkeys([*named, *(key for key in states if owner.owns(*key))]):
            ours.add((kind, name))
            finding = _finding(owner, owners, kind, name, states.get((kind, name)), grace_s)
            if finding is not None:
                findings.append(finding)
    foreign = [key for key in states if key not in ours and states[key] not in (*DELETED, *DELETED_DEPLOYMENT)]
    why = "no run of this home asked for it"
    return findings + [Finding(kind, name, states[kind, name], None, "keep", why) for kind, name in foreign]


def _finding(
    owner: _Owner, owners: Sequence[_Owner], kind: str, name: str, state: str | None, grace_s: float
) -> Finding | None:
    """What to do about one thing of ours; None when it is not there, nor will be."""
    is_fresh = _is_fresh(owner.resources.get(name), grace_s) and owner.state != "running"
    if state is None or state in (*DELETED, *DELETED_DEPLOYMENT):
        return Finding(kind, name, "", owner.run_id, "keep", "just asked for: it may come yet") if is_fresh else None
    user = next((other for other in owners if other is not owner and name in other.uses), None)
    has_stopped = state in (*STOPPED, STOPPING) and kind == "trainer"
    what = "session" if owner.is_session else "run"
    action, reason = "delete" if kind == "deployment" else "cancel", f"its {what} has stopped"
    if owner.state == "running":
        action, reason = "keep", f"its {what} is live"
    elif owner.state == "unknown":
        action, reason = "keep", "the record of its run is damaged"
    elif user is not None and (user.state in _LIVE or kind == "deployment" or has_stopped):
        action, reason = "keep", f"run {user.run_id} uses it"
    elif is_fresh:
        action, reason = "keep", "just asked for"
    elif user is not None:
        reason = f"its run is {owner.state}; run {user.run_id} needs it, and can resume it"
    elif owner.state == "finished":
        action, reason = "delete", f"its {what} has finished"
    elif has_stopped:
        action, reason = "keep", f"its {what} has stopped, and can resume it"
    elif owner.state == "gone":
        reason = f"its run directory {owner.path} is gone"
    return Finding(kind, name, state, owner.run_id, action, reason)


def _is_fresh(record: ResourceRecord | None, grace_s: float) -> bool:
    if record is None or record.state != "intended":
        return False
    try:
        written = datetime.fromisoformat(record.time)
    except ValueError:
        return False
    return (datetime.now(UTC) - written).total_seconds() < grace_s


def _id_of(found: Mapping[str, Any]) -> str:
    return str(found.get("name", "")).rpartition("/")[2]


# -- doing it ----------------------------------------------------------------------------------------------------------


def _swept(report: SweepReport, owner: _Owner, home: Path, control: ControlPlane) -> SweepReport:
    """Free what was found of one run."""
    found = [finding for finding in report.findings if finding.run_id == owner.run_id]
    wanted = [finding for finding in found if finding.action != "keep"]
    is_left_over = owner.is_session and owner.state == "stopped" and len(wanted) == len(found)
    if not wanted and not is_left_over:
        return report
    if owner.stored is None:
        return _swept_of_gone(report, wanted, owner, home, control)
    try:
        with RunDirectory.open(
            owner.path, recipe=owner.stored.recipe, config=owner.stored.config, home=home, owner=JANITOR
        ) as run:
            report = _freed(report, _still_unused(wanted, owner, home, control.backend), ResourceLedger(run), control)
            if is_left_over and not any(finding in wanted for finding, _ in report.left):
                shutil.rmtree(owner.path, ignore_errors=True)
                (home / "runs" / f"{owner.run_id}.json").unlink(missing_ok=True)
                report = replace(report, sessions=(*report.sessions, owner.run_id))
    except CookbookError as error:
        report = _left(report, wanted, _TAKEN_OVER if isinstance(error, LeaseLost) else str(error))
    return report


def _swept_of_gone(
    report: SweepReport, wanted: Sequence[Finding], owner: _Owner, home: Path, control: ControlPlane
) -> SweepReport:
    """Free what was found of a run whose directory is gone. There is nothing to own, and no ledger to write.

    So each is freed only if the directory still is gone: it may have been moved, and its run started there.
    """
    for finding in _still_unused(wanted, owner, home, control.backend):
        try:
            record = read_run(home / "runs" / f"{owner.run_id}.json")
        except CookbookError as error:
            return _left(report, wanted, str(error))
        if record is None or record.state != "gone":
            return _left(report, wanted, _TAKEN_OVER)
        report = _freed(report, [finding], None, control)
    return report


def _left(report: SweepReport, wanted: Sequence[Finding], why: str) -> SweepReport:
    """A report that says of all that was not done why it was not."""
    done = {*report.freed, *(finding for finding, _ in report.left)}
    left = [(finding, why) for finding in wanted if finding not in done]
    return replace(report, left=(*report.left, *left))


def _still_unused(wanted: Sequence[Finding], owner: _Owner, home: Path, backend: str) -> list[Finding]:
    """What no other run has begun to use since it was looked at."""
    owners, _ = _owners(home, backend)
    others = [other for other in owners if other.run_id != owner.run_id]
    used = {name for other in others for name in other.uses}
    live = {name for other in others for name in other.uses if other.state in _LIVE}
    return [
        finding
        for finding in wanted
        if finding.resource_id not in live and (finding.action == "cancel" or finding.resource_id not in used)
    ]


def _freed(
    report: SweepReport, wanted: Sequence[Finding], ledger: ResourceLedger | None, control: ControlPlane
) -> SweepReport:
    records = {} if ledger is None else {record.resource_id: record for record in ledger.all()}
    for finding in wanted:
        try:
            _free(finding, control)
        except ProvisioningError as error:
            logger.warning("%s %s was not freed: %s", finding.kind, finding.resource_id, error)
            report = replace(report, left=(*report.left, (finding, str(error))))
            continue
        logger.info("%s %s: %s, as %s", finding.kind, finding.resource_id, finding.action, finding.reason)
        record = records.get(finding.resource_id)
        if ledger is not None and record is not None and finding.action == "delete" and record.state != "freed":
            ledger.freed(record)
        report = replace(report, freed=(*report.freed, finding))
    return report


def _free(finding: Finding, control: ControlPlane) -> None:
    if finding.kind == "deployment":
        control.delete_deployment(finding.resource_id, _CALL_TIMEOUT_S)
    elif finding.action == "delete":
        control.delete(finding.resource_id, _CALL_TIMEOUT_S)
    else:
        control.cancel(finding.resource_id, _CALL_TIMEOUT_S)
