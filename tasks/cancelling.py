"""Flow runs that somebody has cancelled and that nobody has ended: told to stop, and called Cancelled.

Their worker does that, unless it is gone, or has lived through an outage of the server: then it does not hear of
cancellations any more. Finding and telling their processes: cookbook/stopping.py.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled

from cookbook.errors import CheckpointError
from cookbook.janitor_config import JanitorConfig
from cookbook.stopping import process_of
from tasks.supervision import Suspect, flow_runs, log_path_of

__all__ = ["end_cancelled_runs"]


@task(cache_policy=NO_CACHE)
def end_cancelled_runs(config: JanitorConfig) -> list[Suspect]:
    """End the flow runs that have been cancelling for too long, the oldest first.

    SIGTERM for the process of each, which saves and frees what it has; Cancelled when it has ended. Only processes of
    this machine.
    """
    before = datetime.now(UTC) - timedelta(seconds=config.cancel_s)
    with get_client(sync_client=True) as client:
        runs = list(flow_runs(client, states=(StateType.CANCELLING,)))
        due = [run for run in runs if run.state is not None and run.state.timestamp <= before]
        return [_ended(client, run, path, config) for run in due if (path := log_path_of(run)) is not None]


def _ended(client: SyncPrefectClient, run: FlowRun, path: Path, config: JanitorConfig) -> Suspect:
    """End a cancelled flow run, unless anything about it has changed since it was found."""
    assert run.state is not None
    suspect = Suspect(str(run.id), run.name, str(path), run.state.type.value, str(run.state.id), "left", "")
    try:
        process = process_of(path, suspect.flow_run_id)
        if config.dry_run:
            return replace(suspect, done="to be ended", why="cancelled, and its worker has not ended it")
        now = client.read_flow_run(run.id)  # others were waited for since it was found
        if now.state is None or now.state.id != run.state.id:
            return replace(suspect, why="its state has changed meanwhile; looked at again next time")
        if process is None:
            return _called_cancelled(client, run, replace(suspect, why="cancelled, and no process works for it"))
        process.tell_to_stop()
        told = f"cancelled; process {process.pid} was told to stop"
        if not process.wait_until_ended(config.cancel_s):
            return replace(suspect, why=f"{told}, and has not ended yet")
    except (CheckpointError, OSError) as error:
        return replace(suspect, why=f"cancelled, but {error}")
    return _called_cancelled(client, run, replace(suspect, why=f"{told}, and has ended"))


def _called_cancelled(client: SyncPrefectClient, run: FlowRun, suspect: Suspect) -> Suspect:
    """Tell Prefect that a flow run is cancelled, unless it has come to another end, or was retried, meanwhile.

    A process that is told to stop by anybody but its worker reports that it crashed; so that is no other end.
    """
    now = client.read_flow_run(run.id)
    is_still = now.state is not None and (now.state.is_cancelling() or now.state.is_crashed())
    if not is_still or now.run_count != run.run_count:
        name = "without a state" if now.state is None else now.state.name
        return replace(suspect, why=f"{suspect.why}; it is {name} meanwhile, which stands")
    state: State[Any] = Cancelled(message="Ended by the janitor.")
    client.set_flow_run_state(run.id, state, force=True)
    return replace(suspect, done="ended")
