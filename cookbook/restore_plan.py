"""What starting a run again would do, from what is on disk and, where it was asked, from what its backend has.

A function of records. Who reads the disk and asks the backend: cookbook/inspection.py. What a start really does:
tasks/restoring.py, cookbook/checkpoints.py, cookbook/provisioning.py and cookbook/deployments.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cookbook.checkpoints import CheckpointKind, CheckpointRow
from cookbook.errors import CheckpointError
from cookbook.ledger import ResourceRecord
from cookbook.run import Progress
from cookbook.snapshots import SnapshotRef, snapshots_of

__all__ = ["BackendView", "DiskRecord", "RecordedStep", "ResourcePlan", "RestorePlan", "Wanted", "plan_restore"]

_STOPPED_JOB = ("CANCELLED", "CANCELLING", "PAUSED", "COMPLETED", "EARLY_STOPPED")
_DELETED = ("DELETING", "DELETED", "ARCHIVED")
_FAILED = "FAILED"
_DEAD_DEPLOYMENT = (_FAILED, "SCALED_TO_ZERO")
_SAMPLED = "rl"
"""The recipe that samples what it trains on."""
_EVALUATION = "eval"
_SESSIONS = ("chat", "serve")


@dataclass(frozen=True)
class Wanted:
    """A trainer or deployment that a run works with."""

    kind: str
    """"trainer" or "deployment"."""
    role: str
    """As in the ledger: "policy", "reference", "sampler"."""
    adopted: str | None = None
    """Id of the one that the config names, which is not the run's own."""
    is_certain: bool = True
    """False: only for what is not known yet (the reference logprobs of DPO)."""


@dataclass(frozen=True)
class RecordedStep:
    """What was sampled for one step after the last commit, under the run's present config and data."""

    step: int
    """Steps done before it."""
    num_groups: int


@dataclass(frozen=True)
class DiskRecord:
    """What a run directory says of its run."""

    run_id: str
    recipe: str
    is_finished: bool
    config: Mapping[str, Any] = field(default_factory=dict)
    commits: tuple[CheckpointRow, ...] = ()
    """The rows of checkpoints.jsonl."""
    resources: tuple[ResourceRecord, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    last_step: int | None = None
    """Newest step in metrics.jsonl."""
    recorded: Callable[[Progress | None], Sequence[RecordedStep]] = lambda progress: ()
    """What was sampled for the steps that follow upon a commit (None = upon the start). May raise CheckpointError."""
    damage: tuple[str, ...] = ()
    """Files that cannot be read: which, where, and what to do."""


@dataclass(frozen=True)
class BackendView:
    """What a run's backend says of it."""

    name: str
    """"embedded" or "fireworks"."""
    problem: str | None = None
    """Why it could not be asked; None = it was."""
    states: Mapping[str, str | None] = field(default_factory=dict)
    """Id -> state in the backend's words, without "JOB_STATE_"; None = there is none of that id."""
    snapshots: Collection[SnapshotRef] | None = None
    """Whole snapshots of the run's trainers; None = not asked."""


@dataclass(frozen=True)
class ResourcePlan:
    """What becomes of one trainer or deployment."""

    kind: str
    role: str
    resource_id: str | None
    """The newest one; None = there was none."""
    action: str
    """"use", "resume", "make", "adopt", or "find" (the backend was not asked)."""
    text: str


@dataclass(frozen=True)
class RestorePlan:
    """What starting a run again would do."""

    action: str
    """"nothing" (it has finished), "resume" (from a commit), "start" (from row 0), "fail" (see `problems`)."""
    checkpoint: str | None = None
    """The commit that would be loaded."""
    passed_over: tuple[str, ...] = ()
    """Later commits that the backend does not have whole."""
    step: int = 0
    """Steps done in it."""
    total_steps: int | None = None
    epoch: int = 1
    """The pass over the data that would go on, the first one being 1."""
    row: int = 0
    """The next row, as an ordinal in that pass; RL: over the whole run."""
    open_rows: int = 0
    """RL: rows before `row` that are still to be sampled."""
    repeated_steps: int = 0
    """Steps that ran after the commit and run again."""
    recorded_steps: int = 0
    """RL: of the steps after the commit, those whose groups are recorded and are trained as they were."""
    recorded_groups: int = 0
    resources: tuple[ResourcePlan, ...] = ()
    problems: tuple[str, ...] = ()
    """What a start would end with, and what to do."""
    sentences: tuple[str, ...] = ()
    """The same in words."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def plan_restore(record: DiskRecord, backend: BackendView) -> RestorePlan:
    """Work out what starting a run again, with the same config, would do.

    >>> plan_restore(DiskRecord("sft-1f2e", "sft", is_finished=True), BackendView("embedded")).action
    'nothing'
    """
    if record.is_finished and not record.damage:
        return RestorePlan("nothing", sentences=("It would give its summary again and do nothing: it has finished.",))
    if record.recipe in _SESSIONS:
        return RestorePlan("nothing", sentences=(f"Nothing: a {record.recipe} session is not restored.",))
    problems = list(record.damage)
    commit, skipped = _loaded(record.commits, backend)
    progress, recorded = None, []
    if skipped and commit is None:
        problems.append(f"{_lost(skipped)} Restore one, or start in a new log_path from row 0.")
    try:
        progress = Progress.from_loop_state(commit.loop_state) if commit is not None else None
        recorded = _following(record.recorded(progress), 0 if progress is None else progress.step)
    except CheckpointError as error:
        problems.append(str(error) if commit is None else f"checkpoint {commit.name}: {error}")
    if problems:
        return RestorePlan(
            "fail",
            checkpoint=None if commit is None else commit.name,
            step=0 if commit is None else commit.step,
            problems=tuple(problems),
            sentences=("It would end with an error:", *problems),
        )
    resources = tuple(_resource(record, wanted, backend) for wanted in record.wanted)
    if record.recipe == _EVALUATION:
        first = "It would go on with what is not answered yet; answers and verdicts that are kept stay."
        return RestorePlan("resume", resources=resources, sentences=_sentences(first, [], resources))
    if commit is None or progress is None:
        return _from_the_start(record, recorded, resources)
    plan = _from_commit(record, commit, progress, recorded, resources)
    if skipped:
        told = f"{_lost(skipped)} {'It' if len(skipped) == 1 else 'They'} would be passed over."
        plan = replace(plan, passed_over=tuple(row.name for row in skipped), sentences=(told, *plan.sentences))
    return plan


def _from_the_start(
    record: DiskRecord, recorded: Sequence[RecordedStep], resources: tuple[ResourcePlan, ...]
) -> RestorePlan:
    begin = record.config.get("init_from_checkpoint")
    weights = f"the weights of init_from_checkpoint {begin}" if begin else "the weights of base_model"
    first = f"Nothing is committed: it would start at row 0, with {weights} and a fresh optimizer."
    repeated = record.last_step or 0
    return RestorePlan(
        "start",
        repeated_steps=repeated,
        recorded_steps=len(recorded),
        recorded_groups=sum(step.num_groups for step in recorded),
        resources=resources,
        sentences=_sentences(first, _again(record, 0, recorded), resources),
    )


def _from_commit(
    record: DiskRecord,
    commit: CheckpointRow,
    progress: Progress,
    recorded: Sequence[RecordedStep],
    resources: tuple[ResourcePlan, ...],
) -> RestorePlan:
    is_sampled = record.recipe == _SAMPLED
    epoch = progress.epoch + 1
    where = f"row {progress.position:,}" + (f" of epoch {epoch}" if not is_sampled else "")
    first = (
        f"It would go on after step {progress.step:,} of {progress.total_steps:,}, at {where}, from checkpoint "
        f"{commit.name}."
    )
    if progress.open_rows:
        first += f" {_count(len(progress.open_rows), 'earlier row')} would be sampled first."
    if progress.step >= progress.total_steps:
        first = (
            f"All {progress.total_steps:,} steps are in checkpoint {commit.name}: it would only do what follows the "
            "last one (saving for promotion, evaluation, promotion), as far as that is not done."
        )
    return RestorePlan(
        "resume",
        checkpoint=commit.name,
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=epoch,
        row=progress.position,
        open_rows=len(progress.open_rows),
        repeated_steps=max(0, (record.last_step or 0) - progress.step),
        recorded_steps=len(recorded),
        recorded_groups=sum(step.num_groups for step in recorded),
        resources=resources,
        sentences=_sentences(first, _again(record, progress.step, recorded), resources),
    )


def _sentences(first: str, again: Sequence[str], resources: Sequence[ResourcePlan]) -> tuple[str, ...]:
    return (first, *again, *(f"{resource.text[0].upper()}{resource.text[1:]}." for resource in resources))


def _again(record: DiskRecord, step: int, recorded: Sequence[RecordedStep]) -> list[str]:
    """What happens to the steps that were done after the commit at `step`."""
    last = record.last_step or 0
    sentences = []
    if last > step:
        text = f"Step {last:,}" if last == step + 1 else f"Steps {step + 1:,} to {last:,}"
        text += ", which ran after it," if step else ""
        same = ", with the same numbers" if record.recipe != _SAMPLED else ""
        sentences.append(f"{text} would run again{same}.")
    if record.recipe == _SAMPLED and recorded:
        groups = _count(sum(entry.num_groups for entry in recorded), "recorded group")
        of = f"step {step + 1:,}" if len(recorded) == 1 else f"steps {step + 1:,} to {step + len(recorded):,}"
        sentences.append(f"{groups} of {of} would be trained as they were; what follows would be sampled.")
    elif record.recipe == _SAMPLED and last > step:
        sentences.append("None of their groups are recorded for the present config and data: they would be sampled.")
    return sentences


def _following(recorded: Sequence[RecordedStep], step: int) -> list[RecordedStep]:
    """The recorded steps that follow upon `step` without a gap."""
    usable = {entry.step: entry for entry in recorded}
    found: list[RecordedStep] = []
    while step + len(found) in usable:
        found.append(usable[step + len(found)])
    return found


def _loaded(rows: Sequence[CheckpointRow], backend: BackendView) -> tuple[CheckpointRow | None, list[CheckpointRow]]:
    """The newest commit that the backend has, as far as it was asked, and the later ones, newest first."""
    skipped: list[CheckpointRow] = []
    for row in reversed(rows):
        states = [ref for ref in snapshots_of(row) if ref.kind == CheckpointKind.STATE]
        if not row.state_path:
            continue
        if backend.snapshots is None or not states or states[0] in backend.snapshots:
            return row, skipped
        skipped.append(row)
    return None, skipped


def _lost(rows: Sequence[CheckpointRow]) -> str:
    names = ", ".join(row.name for row in reversed(rows))
    what = f"Checkpoint {names} is" if len(rows) == 1 else f"Checkpoints {names} are"
    return f"{what} not on the backend, or not whole."


# -- trainers and deployments ------------------------------------------------------------------------------------------


def _resource(record: DiskRecord, wanted: Wanted, backend: BackendView) -> ResourcePlan:
    """What becomes of the trainer or deployment of one role."""
    called = f"{'reference ' if wanted.role == 'reference' else ''}{wanted.kind}"

    def plan(resource_id: str | None, action: str, text: str) -> ResourcePlan:
        if not wanted.is_certain:
            text += ", if it is still needed"
        return ResourcePlan(wanted.kind, wanted.role, resource_id, action, text)

    if wanted.adopted is not None:
        state = backend.states.get(wanted.adopted)
        resumed = wanted.kind == "trainer" and state in (*_STOPPED_JOB, _FAILED)
        what = f"is {_word(state)} and would be resumed" if resumed else "would be used as it is"
        return plan(wanted.adopted, "adopt", f"{called} {wanted.adopted}, which is not the run's own, {what}")
    own = [entry for entry in record.resources if (entry.kind, entry.role) == (wanted.kind, wanted.role)]
    newest = max(own, key=lambda entry: entry.generation, default=None)
    if newest is None:
        return plan(None, "make", f"a {called} would be made")
    name = f"{called} {newest.resource_id}"
    following = f"generation {newest.generation + 1} would be made"
    if newest.state == "freed":
        return plan(newest.resource_id, "make", f"{name} was deleted, {following}")
    if newest.resource_id not in backend.states:
        how = "would be resumed" if wanted.kind == "trainer" else "would be used"
        return plan(newest.resource_id, "find", f"{name} {how} if it can be, else {following}")
    action, text = _fate(newest, backend.states[newest.resource_id], following)
    return plan(newest.resource_id, action, f"{name} {text}")


def _fate(newest: ResourceRecord, state: str | None, following: str) -> tuple[str, str]:
    """What becomes of the newest one of a role, which the backend was asked about."""
    if state is None and newest.state == "intended":
        return "make", "was asked for and is not there, it would be made"
    if state is None:
        return "make", f"is gone, {following}"
    if state in _DELETED or (newest.kind == "deployment" and state in _DEAD_DEPLOYMENT):
        return "make", f"is {_word(state)}, {following}"
    if newest.kind == "trainer" and state in (*_STOPPED_JOB, _FAILED):
        return "resume", f"{'has' if state == _FAILED else 'is'} {_word(state)} and would be resumed"
    return "use", f"is {_word(state)} and would be used"


def _word(state: str | None) -> str:
    return "unknown" if state is None else state.replace("_", " ").lower()


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number:,} {what}s"
