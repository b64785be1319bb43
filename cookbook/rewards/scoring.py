"""Calling a reward: under a time limit, and with its number checked. What the rewards are: load.py."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, SupportsFloat

from cookbook.deadlines import call_with_deadline
from cookbook.errors import RewardError
from cookbook.rewards.records import LoadedReward, Reward, RewardFunction

__all__ = ["dry_run", "score"]


@dataclass(frozen=True)
class _Outcome:
    """What a function returned or raised, kept apart from what calling it raises: both can be a TimeoutError."""

    value: object = None
    error: BaseException | None = None


async def score(
    reward: LoadedReward | RewardFunction, text: str, row: Mapping[str, Any], timeout_s: float, *, where: str = ""
) -> Reward:
    """The worth of the completion `text` of `row`.

    A coroutine function runs on this event loop; any other in a thread of its own, which is abandoned when it is late.

    Args:
        timeout_s: seconds for the call. A ready reward that limits itself is waited for.
        where: how errors name the row; else they show its beginning.

    Raises:
        RewardError: the function raised, is late, or did not return a finite number. Names the reward, the row and
            the value.
    """
    if not isinstance(reward, LoadedReward):
        reward = LoadedReward(getattr(reward, "__qualname__", repr(reward)), reward)
    subject = f"reward {reward.name!r} of {where or f'row {dict(row)!r:.200}'}"
    limit_s = None if reward.limits_itself else timeout_s
    try:
        outcome = await asyncio.wait_for(_call(reward.function, text, row), limit_s)
    except TimeoutError as error:
        raise RewardError(
            f"{subject} did not return within reward_timeout_s={timeout_s:g}, for the completion {text!r:.200}. Make "
            "it faster, or raise reward_timeout_s."
        ) from error
    if isinstance(outcome.error, RewardError):
        raise RewardError(f"{subject}: {outcome.error}") from outcome.error
    if outcome.error is not None:
        raise RewardError(
            f"{subject} raised {_described(outcome.error)}, for the completion {text!r:.200}. Correct it."
        )
    return _checked(outcome.value, subject)


def dry_run(
    reward: LoadedReward, row: Mapping[str, Any], timeout_s: float, *, text: str = "", where: str = ""
) -> Reward:
    """Score a text, by itself the empty one, to see a broken reward before a run starts. Has an event loop of its own.

    Raises:
        RewardError: as `score`.
    """

    def run() -> Reward:
        return asyncio.run(score(reward, text, row, timeout_s, where=where))

    try:  # in a thread: there may be a running event loop in this one
        return call_with_deadline(run, timeout_s + 150.0)
    except TimeoutError as error:  # a coroutine that does not yield cannot be stopped from within
        raise RewardError(
            f"reward {reward.name!r} of {where} blocks its event loop for more than reward_timeout_s={timeout_s:g}. "
            "Let it await what it waits for, or write it as a plain function."
        ) from error


async def _call(function: RewardFunction, text: str, row: Mapping[str, Any]) -> _Outcome:
    if _is_async(function):
        return await _awaited(function(text, row))
    outcome = await _in_thread(lambda: function(text, row))
    return await _awaited(outcome.value) if inspect.isawaitable(outcome.value) else outcome


def _is_async(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _awaited(value: object) -> _Outcome:
    assert isinstance(value, Awaitable)
    try:
        return _Outcome(await value)
    except Exception as error:
        return _Outcome(error=error)


async def _in_thread(function: Callable[[], object]) -> _Outcome:
    """Not asyncio's own threads: few, and the process would wait at its end for one that hangs."""
    future: Future[_Outcome] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(_Outcome(function()))
        except BaseException as error:  # SystemExit too: it is the reward's, not ours
            future.set_result(_Outcome(error=error))

    threading.Thread(target=run, name="cookbook-reward", daemon=True).start()
    return await asyncio.wrap_future(future)


def _checked(value: object, subject: str) -> Reward:
    parts: Mapping[str, object] = {}
    if isinstance(value, Reward):
        parts, value = value.parts, value.value
    number = _number(value, subject)
    return Reward(number, {str(name): _number(part, f"{subject}, part {name!r},") for name, part in parts.items()})


def _number(value: object, subject: str) -> float:
    is_text = isinstance(value, str | bytes)
    if is_text or not isinstance(value, SupportsFloat):
        raise RewardError(f"{subject} is {value!r:.100}, not a number. Return a float, or a Reward.")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"{subject} is {value!r:.100}, not a number: {error}. Return a float.") from error
    if not math.isfinite(number):
        raise RewardError(f"{subject} is {number}. Return a finite number.")
    return number


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
