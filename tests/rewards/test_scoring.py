"""Calling a reward: what it may return, and what happens when it raises, hangs or returns something else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cookbook.errors import RewardError
from cookbook.rewards import LoadedReward, Reward, dry_run, score
from cookbook.rewards.records import RewardFunction


def scored(function: RewardFunction, timeout_s: float = 10.0) -> Reward:
    reward = LoadedReward("mine:score", function)
    return asyncio.run(score(reward, "text", {"ground_truth": "x"}, timeout_s, where="row 3 (a.jsonl, line 4)"))


def returning(value: Any) -> RewardFunction:
    return lambda text, row: value


@pytest.mark.parametrize("value", [1, 1.0, True, Fraction(1), np.float32(1), np.array(1.0), Reward(1.0)])
def test_any_finite_number_is_a_reward(value: Any) -> None:
    assert scored(returning(value)) == Reward(1.0)


def test_parts_are_kept_as_numbers() -> None:
    assert scored(returning(Reward(0.5, {"length": np.int64(3)}))) == Reward(0.5, {"length": 3.0})


def test_a_coroutine_function_runs_on_the_event_loop_and_others_in_a_thread() -> None:
    threads: list[threading.Thread] = []

    async def waits(text: str, row: Mapping[str, Any]) -> float:
        threads.append(threading.current_thread())
        await asyncio.sleep(0)
        return 1.0

    def blocks(text: str, row: Mapping[str, Any]) -> Awaitable[float | Reward]:
        threads.append(threading.current_thread())
        return waits(text, row)

    assert scored(waits) == scored(blocks) == Reward(1.0)
    main = threading.main_thread()
    assert [thread is main for thread in threads] == [True, False, True]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "is nan. Return a finite number."),
        (float("-inf"), "is -inf."),
        (None, "is None, not a number"),
        ("1", "is '1', not a number"),
        (np.zeros(2), "not a number"),
        (10**400, "not a number"),
        (Reward(0.0, {"style": float("nan")}), "part 'style', is nan"),
    ],
)
def test_what_is_no_finite_number_names_reward_row_and_value(value: Any, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        scored(returning(value))
    assert "reward 'mine:score' of row 3 (a.jsonl, line 4)" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [KeyError, TimeoutError, StopIteration, SystemExit])
def test_what_a_reward_raises_is_named_with_its_place(kind: type[BaseException]) -> None:
    def broken(text: str, row: Mapping[str, Any]) -> float:
        raise kind("no such")

    async def broken_later(text: str, row: Mapping[str, Any]) -> float:
        raise kind("no such")

    functions = [broken] if kind in (SystemExit, StopIteration) else [broken, broken_later]
    for function in functions:
        with pytest.raises(RewardError, match=rf"line 4\) raised {kind.__name__}: .*test_scoring.py:\d+"):
            scored(function)


def test_a_reward_that_hangs_is_an_error_after_its_limit() -> None:
    release = threading.Event()

    def hangs(text: str, row: Mapping[str, Any]) -> float:
        release.wait(30)
        return 1.0

    async def hangs_too(text: str, row: Mapping[str, Any]) -> float:
        await asyncio.sleep(30)
        return 1.0

    started = time.monotonic()
    for function in (hangs, hangs_too):
        with pytest.raises(RewardError, match=r"did not return within reward_timeout_s=0.2, for the completion 'text'"):
            scored(function, 0.2)
    assert time.monotonic() - started < 10
    release.set()


def test_a_row_without_a_name_is_shown() -> None:
    with pytest.raises(RewardError, match=r"of row \{'ground_truth': 'x'\}"):
        asyncio.run(score(returning(None), "", {"ground_truth": "x"}, 5.0))


def test_a_dry_run_scores_the_empty_text_inside_a_running_loop_too() -> None:
    seen = []
    reward = LoadedReward("r", lambda text, row: float(not seen.append(text)))

    async def inside() -> Reward:
        return dry_run(reward, {}, 5.0)

    assert asyncio.run(inside()) == dry_run(reward, {}, 5.0) == Reward(1.0)
    assert seen == ["", ""]
