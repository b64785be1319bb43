"""Flow runs whose process has died: found, looked at twice, and retried, so that a worker takes them up again.

A flow run is dead when Prefect says that it runs, or crashed, and no live process owns its run directory. One that
somebody has cancelled or paused, that has failed or completed, is nobody's business here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry, Crashed

from cookbook.config import RECIPE_CONFIGS
from cookbook.errors import CheckpointError
from cookbook.janitor_config import JanitorConfig
from cookbook.supervision import RunDirectoryState, count_retry
from tasks.page import page_log

__all__ = ["Suspect", "end_stale_janitors", "find_dead_runs", "flow_runs", "log_path_of", "retry_dead_runs"]

FLOWS = (*RECIPE_CONFIGS, "eval")
"""Names of the flows that have a run directory."""

STALE_S = 900.0
"""Seconds after which a flow run of the janitor that still runs, says Prefect, is dead: it takes a minute."""

RECHECK_S = 5.0
"""Seconds after which a retry is looked at: a late report of the crash may have undone it."""

_PAGE = 200


@dataclass(frozen=True)
class Suspect:
    """A flow run without a live process, and what is done about it."""

    flow_run_id: str
    name: str
    log_path: str
    state: str
    """In Prefect's words: RUNNING, PENDING, SCHEDULED or CRASHED."""
    state_id: str
    done: str
    """"to be retried", "retried", "to be ended", "ended" (Prefect is told that it crashed, or is cancelled), "left"."""
    why: str
    run_count: int = 0
    """How often it had begun to run when it was retried."""

    @property
    def is_due(self) -> bool:
        """Whether something is still to be done about it."""
        return self.done.startswith("to be ")

    def row(self) -> dict[str, str]:
        """As a row of a table."""
        values = asdict(self)
        return {name: values[name] for name in ("name", "log_path", "state", "done", "why")}


@task(cache_policy=NO_CACHE)
def find_dead_runs(config: JanitorConfig) -> list[Suspect]:
    """All flow runs of the recipes that no live process works for, the oldest first. Nothing is changed."""
    with get_client(sync_client=True) as client:
        candidates = [run for run in flow_runs(client, states=_DEAD_STATES) if _is_old_enough(run, config)]
        if not candidates:
            return []
        newest = _newest(client, min(_due(run) for run in candidates))
        suspects = [_suspect(run, newest, config) for run in candidates]
    return [suspect for suspect in suspects if suspect is not None]


@task(cache_policy=NO_CACHE)
def retry_dead_runs(config: JanitorConfig, suspects: list[Suspect]) -> list[Suspect]:
    """Wait until Prefect has said all it will say about a death, look again, and retry what is still dead.

    What is not to be retried, but runs as Prefect believes, is ended there: as Running it would count for the limits of
    its queue for ever, and no command would retry it.
    """
    if config.dry_run or not any(suspect.is_due for suspect in suspects):
        return suspects
    time.sleep(config.settle_s)
    with get_client(sync_client=True) as client:
        done = [_settled(client, suspect, config) if suspect.is_due else suspect for suspect in suspects]
        time.sleep(RECHECK_S)
        return [_confirmed(client, suspect) for suspect in done]


@task(cache_policy=NO_CACHE)
def end_stale_janitors() -> int:
    """End earlier flow runs of the janitor that died with their worker; how many.

    Each holds a place in the deployment's concurrency limit until somebody ends it (its lease is in the memory of the
    server, which may have been restarted since): without this, no janitor would run any more.
    """
    before = datetime.now(UTC) - timedelta(seconds=STALE_S)
    with get_client(sync_client=True) as client:
        started = FlowRunFilterExpectedStartTime(before_=before)
        runs = list(flow_runs(client, ("janitor",), states=_LIVE_STATES, expected_start_time=started))
        stale = [run for run in runs if run.state is not None and run.state.timestamp < before]
        for run in stale:
            client.set_flow_run_state(run.id, Crashed(message="Its process has died."))
    return len(stale)


_LIVE_STATES = (StateType.RUNNING, StateType.PENDING)
_DEAD_STATES = (StateType.RUNNING, StateType.PENDING, StateType.CRASHED, StateType.SCHEDULED)


def _suspect(run: FlowRun, newest: dict[Path, UUID], config: JanitorConfig) -> Suspect | None:
    """What to do about a flow run; None when a process works for it, or nobody would want it retried."""
    path = log_path_of(run)
    if path is None or run.state is None:
        return None
    suspect = Suspect(str(run.id), run.name, str(path), run.state.type.value, str(run.state.id), "left", "")
    try:
        directory = RunDirectoryState.read(path, str(run.id))
    except CheckpointError as error:
        return replace(suspect, why=str(error))
    is_newest = newest.get(path, run.id) == run.id
    if directory.is_owned or (run.state.is_crashed() and (directory.is_finished or not is_newest)):
        return None
    if (why := _objection(run, directory, is_newest, config)) is not None:
        is_ended = config.retry_dead_runs and run.state.is_running() and directory.exists
        return replace(suspect, done="to be ended" if is_ended else "left", why=why)
    since = "the start" if directory.commit is None else f"checkpoint {directory.commit}"
    return replace(suspect, done="to be retried", why=f"its process has died; it goes on from {since}")


def _objection(run: FlowRun, directory: RunDirectoryState, is_newest: bool, config: JanitorConfig) -> str | None:
    """Why a dead flow run is not retried."""
    assert run.state is not None
    if not config.retry_dead_runs:
        return "its process has died; retry_dead_runs is off"
    if run.deployment_id is None:
        return "its process has died; it has no deployment, so no worker would take it up: start it again"
    if not is_newest:
        return "its process has died; a later flow run has the same log_path"
    if run.state.is_running() and not directory.exists:
        return "no run directory on this machine, so whether its process lives cannot be told"
    if directory.retries >= config.max_retries:
        return (
            f"its process has died; it was retried {directory.retries} times without a further commit "
            "(max_retries). Look at its log, then retry it by hand"
        )
    return None


def _settled(client: SyncPrefectClient, suspect: Suspect, config: JanitorConfig) -> Suspect:
    """Retry a flow run, or end it, unless anything about it has changed since it was found."""
    run = client.read_flow_run(UUID(suspect.flow_run_id))
    if run.state is None or str(run.state.id) != suspect.state_id:
        return replace(suspect, done="left", why="its state has changed meanwhile; looked at again next time")
    try:
        directory = RunDirectoryState.read(Path(suspect.log_path), suspect.flow_run_id)
        if directory.is_owned:
            return replace(suspect, done="left", why="a process has taken the run over meanwhile")
        if suspect.done == "to be ended":
            client.set_flow_run_state(run.id, Crashed(message=f"{suspect.why}."))
            return replace(suspect, done="ended")
        retries = count_retry(Path(suspect.log_path), suspect.flow_run_id, directory.commit)
    except CheckpointError as error:
        return replace(suspect, done="left", why=str(error))
    if not run.state.is_final():
        # A flow run that has retried itself in its process keeps its retries for that process until it has ended.
        client.set_flow_run_state(run.id, Crashed(message="Its process has died."))
    suspect = replace(suspect, run_count=run.run_count)
    return _set_to_retry(client, suspect, f"{suspect.why} ({retries} of {config.max_retries})")


def _set_to_retry(client: SyncPrefectClient, suspect: Suspect, why: str) -> Suspect:
    state: State[Any] = AwaitingRetry(message="Its process has died.")
    answer: OrchestrationResult[Any] = client.set_flow_run_state(UUID(suspect.flow_run_id), state)
    if answer.status != SetStateStatus.ACCEPT:
        reason = getattr(answer.details, "reason", None)
        return replace(suspect, done="left", why=f"Prefect refused to retry it: {reason or answer.status.value}")
    page_log().warning("flow run %s is retried: %s", suspect.name, why)
    return replace(suspect, done="retried", why=why)


def _confirmed(client: SyncPrefectClient, suspect: Suspect) -> Suspect:
    """A retry that a late report of the same crash has undone is issued once more; further ones are for next time.

    Prefect counts a flow run whenever it begins to run: one that has begun since has crashed again. That retry is used
    up, and the next is counted, next time.
    """
    if suspect.done != "retried":
        return suspect
    run = client.read_flow_run(UUID(suspect.flow_run_id))
    if run.state is None or not run.state.is_crashed():
        return suspect
    if run.run_count > suspect.run_count:
        return replace(suspect, why=f"{suspect.why}; it has crashed again since")
    return _set_to_retry(client, suspect, f"{suspect.why}; a late report of the crash had undone it")


def flow_runs(
    client: SyncPrefectClient,
    flows: tuple[str, ...] = FLOWS,
    *,
    states: tuple[StateType, ...] | None = None,
    **options: Any,
) -> Iterator[FlowRun]:
    """Flow runs of these flows, the oldest first."""
    state = None if states is None else FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))
    offset = 0
    while True:
        page = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=list(flows))),
            flow_run_filter=FlowRunFilter(state=state, **options),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=_PAGE,
            offset=offset,
        )
        yield from page
        if len(page) < _PAGE:
            return
        offset += _PAGE


def _newest(client: SyncPrefectClient, since: datetime) -> dict[Path, UUID]:
    """Run directory -> the newest flow run that was to begin there between then and now.

    One that waits for its turn counts, one that is scheduled for later does not.
    """
    window = FlowRunFilterExpectedStartTime(after_=since - timedelta(seconds=1), before_=datetime.now(UTC))
    runs = flow_runs(client, expected_start_time=window)
    return {path: run.id for run in runs if (path := log_path_of(run)) is not None}


def _due(run: FlowRun) -> datetime:
    return run.expected_start_time or run.created or datetime.now(UTC)


def log_path_of(run: FlowRun) -> Path | None:
    """The run directory of a flow run; None when its parameters name none."""
    config = run.parameters.get("config")
    log_path = config.get("log_path") if isinstance(config, dict) else None
    return Path(log_path).expanduser().resolve() if isinstance(log_path, str) and log_path else None


def _is_old_enough(run: FlowRun, config: JanitorConfig) -> bool:
    """Whether a state is one to look at: pending for long, crashed not long ago, running, or waiting for a process that
    was to retry the flow itself and has not for long: no worker would take that up."""
    assert run.state is not None
    age = datetime.now(UTC) - run.state.timestamp
    if run.state.is_scheduled():
        late = datetime.now(UTC) - (run.next_scheduled_start_time or run.state.timestamp)
        is_its_own = run.empirical_policy.retry_type == "in_process"
        return is_its_own and late >= timedelta(seconds=config.pending_s)
    if run.state.is_pending():
        return age >= timedelta(seconds=config.pending_s)
    return run.state.is_running() or age <= timedelta(hours=config.crashed_within_h)
