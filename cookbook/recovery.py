"""What is done about each error: the one table of what is tried again, what sends a run back to its last commit, and
what ends it.

After the error taxonomy of the training API's wire protocol (section 6) and `cookbook/errors.py`. How often and with
which pauses: `RetryConfig`. The trainer's data plane retries by itself, inside the SDK; what comes out of it is final.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from cookbook.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    CredentialsError,
    DataError,
    DeploymentLost,
    LeaseLost,
    LogprobMismatch,
    ModelError,
    ProvisioningError,
    RequestRejected,
    RewardError,
    SamplingError,
    ShapeError,
    TrainerLost,
    WeightSyncError,
)

if TYPE_CHECKING:
    from cookbook.config import RetryConfig

__all__ = [
    "ACTIONS",
    "CALLER_STATUSES",
    "COMPLETION_STATUSES",
    "CONTROL_PLANE_STATUSES",
    "DEPLOYMENT_LOST_STATUSES",
    "REFUSED_STATUSES",
    "Action",
    "action_for",
    "is_restored",
    "is_retried",
    "retrying",
]

T = TypeVar("T")


class Action(StrEnum):
    """What is done about an error."""

    RETRY = "retry"
    """The same call again: it is idempotent, and what was wrong may pass."""
    RESTORE = "restore"
    """Back to the last commit, with a trainer and a deployment that are found again or made anew."""
    RETRY_THEN_RESTORE = "retry, then restore"
    STOP = "stop"
    """Nothing: something must be changed first, or another process owns the run."""


ACTIONS: Mapping[type[Exception], Action] = MappingProxyType(
    {
        BackendError: Action.STOP,
        CheckpointError: Action.RETRY,  # a file system that was busy; what is damaged stays so, and ends the run
        ConfigError: Action.STOP,
        CredentialsError: Action.STOP,
        DataError: Action.STOP,
        DeploymentLost: Action.RESTORE,
        LeaseLost: Action.STOP,
        LogprobMismatch: Action.STOP,
        ModelError: Action.STOP,
        ProvisioningError: Action.RETRY,
        RequestRejected: Action.STOP,
        RewardError: Action.STOP,
        SamplingError: Action.RETRY,  # row by row, inside the sampler; then it is a DeploymentLost
        ShapeError: Action.STOP,
        TrainerLost: Action.RESTORE,
        WeightSyncError: Action.RETRY_THEN_RESTORE,
    }
)
"""Each of our errors -> what is done about it. A subclass that is not named goes with its base."""

CONTROL_PLANE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses of the control plane and of hot loads that are tried again (wire protocol 6.2)."""

COMPLETION_STATUSES = CONTROL_PLANE_STATUSES | {404, 425}
"""The same of completions: while a snapshot is loaded the deployment answers 425, and a new one 404 (4.4)."""

REFUSED_STATUSES = frozenset({400, 404, 409, 410, 412, 413, 422})
"""HTTP statuses that say no, for good, to what was asked."""

CALLER_STATUSES = frozenset({401, 403})
"""HTTP statuses that say no to whoever asks: to anything with this key."""

DEPLOYMENT_LOST_STATUSES = frozenset({404, 410, 425, 502, 503, 504})
"""HTTP statuses of completions that say that the deployment has ended, or is not there yet."""


def action_for(error: BaseException) -> Action:
    """What is done about an error.

    Errors that are not ours come from a network or a library: tried again. Interrupts are never.
    """
    if not isinstance(error, Exception):
        return Action.STOP
    return next((ACTIONS[kind] for kind in type(error).__mro__ if kind in ACTIONS), Action.RETRY)


def is_retried(error: BaseException) -> bool:
    """Whether another attempt of the same call could succeed."""
    return action_for(error) in (Action.RETRY, Action.RETRY_THEN_RESTORE)


def is_restored(error: BaseException) -> bool:
    """Whether a run goes back to its last commit after this error has come out of a task."""
    return action_for(error) in (Action.RESTORE, Action.RETRY_THEN_RESTORE)


def retrying(
    retry: RetryConfig,
    call: Callable[[], T],
    say: Callable[[Exception, float], object],
    given_up: Callable[[], bool] = lambda: False,
) -> T:
    """Call until it succeeds, as often, with such pauses and for as long as `retry` says.

    Args:
        say: called before each pause, with what was wrong and the pause in seconds.
        given_up: whether nothing is to be tried again any more.

    Raises:
        whatever the last call raises.
    """
    started = time.monotonic()
    for delay in retry.delays():
        try:
            return call()
        except Exception as error:
            pause = delay * (1 + random.uniform(0, retry.jitter))
            late = 0 < retry.deadline_s < time.monotonic() - started + pause
            if late or not is_retried(error) or given_up():
                raise
            say(error, pause)
            time.sleep(pause)
    return call()
