"""Who wins, answer against answer: by a judge of the user's, or by the reward. Means and intervals: report.py."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook.deadlines import call_with_deadline
from cookbook.errors import RewardError
from cookbook.evaluation.kept import Guard, KeptLines
from cookbook.rewards import LoadedReward, dry_run, score
from cookbook.rewards.load import import_function
from cookbook.rollouts.turns import all_of

__all__ = ["Duel", "Judge", "VerdictFile", "judge_duels", "load_judge", "reward_wins", "try_judge"]

_AT_ONCE = 16  # a judge may be a service with limits of its own
_GRACE_S = 30.0

JudgeFunction = Callable[[Mapping[str, Any], str, str], float | Awaitable[float]]


@dataclass(frozen=True)
class Judge:
    """A function of the user's under its name: (row, answer, other) -> 0 (other wins) to 1 (answer wins)."""

    name: str
    function: JudgeFunction = field(repr=False)


@dataclass(frozen=True)
class Duel:
    """Two answers to one row, under one seed."""

    row: Mapping[str, Any] = field(repr=False)
    """The whole row of the data file."""
    answer: str
    other: str
    where: str
    """How errors name it."""

    @property
    def digest(self) -> str:
        """sha256 (hex) over which duel it is and what both said."""
        return hashlib.sha256(json.dumps([self.where, self.answer, self.other]).encode()).hexdigest()


class VerdictFile(KeptLines):
    """What a judge has said, so that no duel is judged, and paid for, twice."""

    def __init__(self, path: Path, judge: Judge, guard: Guard = nullcontext) -> None:
        """Open the file, and read what is there.

        Raises:
            ConfigError: it holds the verdicts of another judge.
            CheckpointError: it is damaged, or cannot be written.
        """
        super().__init__(path, {"judge": judge.name}, guard)
        self._verdicts: dict[str, float] = {line["duel"]: line["verdict"] for line in self.lines}

    def __len__(self) -> int:
        return len(self._verdicts)

    def find(self, duel: Duel) -> float | None:
        """What the judge said of a duel; None while it has not been asked."""
        return self._verdicts.get(duel.digest)

    def add(self, duel: Duel, verdict: float) -> None:
        """Keep a verdict.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._verdicts[duel.digest] = verdict
        self.append({"duel": duel.digest, "where": duel.where, "verdict": verdict})


def load_judge(spec: str) -> Judge:
    """The judge that `module:function` names, with the current directory importable.

    Raises:
        RewardError: it cannot be imported, or cannot be called with a row and two answers.
    """
    function = import_function(spec)
    try:
        inspect.signature(function).bind({}, "", "")
    except TypeError as error:
        raise RewardError(
            f"judge {spec!r} cannot be called with a row and two answers: {error}. Write it as "
            "`def judge(row: dict, answer: str, other: str) -> float`."
        ) from error
    except ValueError:  # a function in C without a signature
        pass
    return Judge(spec, function)


def try_judge(judge: Judge, row: Mapping[str, Any], timeout_s: float, *, where: str) -> None:
    """Call a judge once with two empty answers, to see a broken one before anything starts.

    Raises:
        RewardError: it raised, is late, or gave no number from 0 to 1.
    """
    duel = Duel(row, "", "", where)
    _checked(dry_run(_as_reward(judge, duel), row, timeout_s, where=where).value, judge, duel)


def judge_duels(
    judge: Judge,
    duels: Sequence[Duel],
    *,
    reward_timeout_s: float,
    timeout_s: float,
    kept: VerdictFile | None = None,
) -> list[float]:
    """What the judge says of each duel: 1 = answer, 0.5 = neither, 0 = other. Called once each, the answer first.

    A judge that is drawn to a place must itself look from both sides.

    Args:
        reward_timeout_s: seconds for one call.
        timeout_s: seconds for all.
        kept: verdicts that are there already, and gets the others as they come.

    Raises:
        RewardError: as `try_judge`, or not all were judged in time.
    """

    async def one(duel: Duel, free: asyncio.Semaphore) -> float:
        if kept is not None and (known := kept.find(duel)) is not None:
            return known
        async with free:
            given = await score(_as_reward(judge, duel), duel.answer, duel.row, reward_timeout_s, where=duel.where)
        verdict = _checked(given.value, judge, duel)
        if kept is not None:
            kept.add(duel, verdict)
        return verdict

    async def every() -> list[float]:
        free = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.timeout(timeout_s):
            return await all_of(one(duel, free) for duel in duels)

    try:  # in a thread: there may be a running event loop in this one
        return call_with_deadline(lambda: asyncio.run(every()), timeout_s + _GRACE_S)
    except TimeoutError as error:
        raise RewardError(
            f"judge {judge.name!r} had not judged all {len(duels)} pairs of answers within timeout_s={timeout_s:g}. "
            "Make it faster, or raise timeout_s."
        ) from error


def reward_wins(reward: float, other: float) -> float:
    """1 where the reward is higher than the other's, 0 where it is lower, 0.5 for a tie."""
    return 0.5 if reward == other else float(reward > other)


def _as_reward(judge: Judge, duel: Duel) -> LoadedReward:
    """The judge of one duel as a reward, so that it runs under the same limits."""

    def judged(text: str, row: Mapping[str, Any]) -> float | Awaitable[float]:
        return judge.function(row, text, duel.other)

    return LoadedReward(f"judge {judge.name}", judged)


def _checked(value: float, judge: Judge, duel: Duel) -> float:
    if not 0.0 <= value <= 1.0:
        raise RewardError(
            f"judge {judge.name!r} of {duel.where} gave {value:g}. Return 1 for the answer, 0 for the other, or "
            "something between."
        )
    return value
