"""How a run ends before its time: told to stop, it saves within its grace; then, as after any error, all is freed.

SIGTERM (a preempted machine, a cancelled flow run) arrives as Prefect's TerminationSignal, Ctrl-C as KeyboardInterrupt,
and where nobody handles SIGTERM or SIGHUP, as SystemExit. Each is raised in the main thread, wherever that is; a step
that is under way goes on in its thread meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from prefect.exceptions import Abort

from cookbook.checkpoints import last_commit
from cookbook.deadlines import Deadline
from cookbook.errors import LeaseLost
from cookbook.termination import ending_on_signals, is_interrupt, undisturbed
from tasks.checkpoints import save_now
from tasks.page import page_id, page_log
from tasks.run import Run

__all__ = ["freed_at_end", "interruptible"]

R = TypeVar("R", bound=Run)

logger = logging.getLogger(__name__)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run in order, and a process that lost its run leave the flow run to the other one.

    Raises:
        Abort: the run belongs to another process that works for the same flow run: this one ends without telling
            Prefect a state, which is the other's to tell.
    """
    with ending_on_signals():
        try:
            yield
        except LeaseLost as error:
            if error.started_by is None or error.started_by != page_id():
                raise
            page_log().error("%s Both work for this flow run; its state is left to the other process.", error)
            raise Abort(str(error)) from error


@contextmanager
def freed_at_end(run: R) -> Iterator[R]:
    """One start of a run: save what can be saved if it is told to stop, and free all it has when it does not end well,
    or go on."""
    try:
        yield run
    except BaseException as error:
        try:
            if is_interrupt(error) and run.config.save_on_sigterm:
                _save(run)
        finally:
            with undisturbed():
                run.fail(error)
        raise
    finally:
        run.disconnect()


def _save(run: Run) -> None:
    """Commit where the run is, and say what stands. A second signal ends it at once. Never raises."""
    grace = Deadline(run.config.sigterm_grace_s)
    told = "told to stop"
    try:
        if run.progress is not None and run.progress.step > 0:
            _say(run, f"{told}: saving, within {grace.seconds:g} s; a second signal stops at once")
        problem = _commit(run, grace)
    except BaseException as error:
        problem = "told again" if is_interrupt(error) else f"{error}" or type(error).__name__
    with suppress(Exception):
        commit = last_commit(run.directory.path)
        where = "nothing is saved" if commit is None else f"step {commit.step:,} is saved as {commit.name}"
        _say(run, f"{told}: {where}" + (f" ({problem})" if problem else ""))


def _commit(run: Run, grace: Deadline) -> str | None:
    """Save the weights as they are; why not, where they cannot be."""
    if not run.records.unbroken.settle(grace.remaining()):
        return f"the step under way did not end within {grace.seconds:g} s"
    if run.progress is None or run.progress.step == 0:
        return "training had not begun"
    if not run.client.settle(grace.remaining()):
        return "the trainer was busy with something else"
    save_now(run, grace.for_call())
    commit = last_commit(run.directory.path)
    is_saved = commit is not None and commit.step == run.progress.step
    return None if is_saved else f"the trainer does not have the weights of step {run.progress.step:,}"


def _say(run: Run, text: str) -> None:
    """Tell people, who may have gone with the terminal."""
    with suppress(Exception):
        run.say(text)
