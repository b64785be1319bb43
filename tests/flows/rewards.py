"""Rewards of the RL flow tests. Run in the flow's process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cookbook.config import environment
from cookbook.control_plane import connect
from cookbook.rewards import Reward


def vowels(completion: str, row: Mapping[str, Any]) -> Reward:
    """The more vowels the better; the tiny model finds that out within a few steps."""
    found = sum(letter in "aeiou" for letter in completion)
    return Reward(found / 8, {"any": float(found > 0)})


def fails_at_row_9(completion: str, row: Mapping[str, Any]) -> float:
    """As `vowels`, but broken for one row for as long as a file exists."""
    if completion and row["number"] == 9 and Path(os.environ["REWARD_BROKEN"]).exists():
        return 1 / 0
    return vowels(completion, row).value


def hot_loads_at_row_2(completion: str, row: Mapping[str, Any]) -> float:
    """As `vowels`; but at one row, somebody else loads another snapshot into the deployment."""
    if completion and row["number"] == 2:
        with connect("embedded", environment()) as control:
            assert control.deployments.hotload_and_wait("by-hand", os.environ["BY_HAND_MODEL"], "step-2")
    return vowels(completion, row).value


def judge_of_empty_answers(row: Mapping[str, Any], answer: str, other: str) -> float:
    """Well when it is tried, and broken for real answers."""
    return 0.5 if not answer and not other else 1 / 0
