"""The reward `format:REGEX`: whether a completion has a form. Regular expressions run in a worker process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cookbook.errors import RewardError
from cookbook.rewards.isolation import Late, call_isolated
from cookbook.rewards.records import LoadedReward, Reward

__all__ = ["DEFAULT_FORMAT", "format_reward", "matches", "pattern_problem"]

DEFAULT_FORMAT = r"\A\s*<think>.*</think>\s*<answer>.*</answer>\s*\Z"
"""Reasoning in its tags, then the answer in its tags, and nothing else."""


def format_reward(spec: str, limit_s: float) -> LoadedReward:
    """The reward of `format` or `format:REGEX`: 1 where the expression is found in the completion, else 0.

    `.` also stands for a new line; anchor with \\A and \\Z for the whole text. A text that takes longer than `limit_s`
    seconds gets 0, and the part `late`.

    Raises:
        RewardError: the expression is wrong.
    """
    problem = pattern_problem(spec)
    if problem is not None:
        raise RewardError(problem)
    pattern = _pattern(spec)

    def reward(text: str, row: Mapping[str, Any]) -> Reward:
        try:
            return Reward(float(call_isolated("format", {"pattern": pattern, "text": text}, limit_s)))
        except Late:
            return Reward(0.0, {"late": 1.0})

    return LoadedReward(spec, reward, limits_itself=True)


def pattern_problem(spec: str) -> str | None:
    """What is wrong with the expression of `format:REGEX`, or None."""
    try:
        re.compile(_pattern(spec), re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{spec!r} is not a regular expression: {error}. Correct it."
    return None


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is found in `text`."""
    return re.search(pattern, text, re.DOTALL) is not None


def _pattern(spec: str) -> str:
    return spec.partition(":")[2] or DEFAULT_FORMAT
