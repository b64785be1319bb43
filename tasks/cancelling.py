"""Flow runs that somebody has cancelled and that nobody has ended: told to stop, and called Cancelled.

Their worker does that, unless it is gone, or has lived through an outage of the server: then it does not hear of
cancellations any more.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled

from cookbook.errors import CheckpointError
from cookbook.janitor_config import JanitorConfig
from cookbook.run import JANITOR, owner_of
from tasks.supervision import Suspect, flow_runs, log_path_of

__all__ = ["end_cancelled_runs"]

REPORT_S = 15.0
"""Seconds for a process that has let go of its run to tell Prefect its view of it, which is then corrected."""

_POLL_S = 0.2


@task(cache_policy=NO_CACHE)
def end_cancelled_runs(config: JanitorConfig) -> list[Suspect]:
    """End the flow runs that have been cancelling for too long, the oldest first.

    SIGTERM for the process of each, which saves and frees what it has; Cancelled when it has ended. Only processes of
    this machine.
    """
    before = datetime.now(UTC) - timedelta(seconds=config.cancel_s)
    done = []
    with get_client(sync_client=True) as client:
        runs = list(flow_runs(client, states=(StateType.CANCELLING,)))
        for run in runs:
            path = log_path_of(run)
            if path is None or run.state is None or run.state.timestamp > before:
                continue
            suspect = Suspect(str(run.id), run.name, str(path), run.state.type.value, str(run.state.id), "left", "")
            suspect = _ended(run, path, suspect, config)
            if suspect.done == "ended":
                state: State[Any] = Cancelled(message="Ended by the janitor.")
                client.set_flow_run_state(run.id, state, force=True)
            done.append(suspect)
    return done


def _ended(run: FlowRun, path: Path, suspect: Suspect, config: JanitorConfig) -> Suspect:
    """Have the process of a cancelled flow run end; "ended" when there is none any more."""
    try:
        owner = owner_of(path)
        if not path.exists() or (owner is not None and owner.get("host") != socket.gethostname()):
            return replace(suspect, why="cancelled, but its process, if it lives, is on another machine")
        is_its_own = owner is not None and owner.get("started_by") == str(run.id) and owner.get("owner") != JANITOR
        if config.dry_run:
            return replace(suspect, done="to be ended", why="cancelled, and its worker has not ended it")
        if owner is None or not is_its_own:
            return replace(suspect, done="ended", why="cancelled, and no process works for it")
        pid = int(owner["pid"])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _waited(lambda: owner_of(path) != owner, config.cancel_s):
            return replace(suspect, why=f"cancelled; process {pid} was told to stop, and has not ended yet")
        _waited(lambda: not _exists(pid), REPORT_S)
    except (CheckpointError, OSError) as error:
        return replace(suspect, why=str(error))
    return replace(suspect, done="ended", why=f"cancelled; process {pid} was told to stop, and has ended")


def _waited(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
