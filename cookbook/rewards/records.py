"""What a reward function is and what it returns. Ready ones: load.py; calling one: scoring.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LoadedReward", "Reward", "RewardFunction", "RowCheck"]


@dataclass(frozen=True)
class Reward:
    """The worth of one completion, and what it was made of."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Numbers by name, for metrics and tables; they do not change what is trained. In means, a completion that lacks a
    part that others have counts as 0 there: give every part each time if that is not so."""


RewardFunction = Callable[[str, Mapping[str, Any]], float | Reward | Awaitable[float | Reward]]
"""From the text of a completion (its prompt is not in it) and the whole row of the data file."""

RowCheck = Callable[[Mapping[str, Any]], str | None]
"""Why no completion of a row can be scored ("ground_truth is missing ..."), or None."""


@dataclass(frozen=True, eq=False)
class LoadedReward:
    """A reward function under the name that the config gives it. Made by `load_reward`."""

    name: str
    function: RewardFunction = field(repr=False)
    check: RowCheck | None = field(default=None, repr=False)
    """Looks at a row before anything runs. None = every row will do."""
    limits_itself: bool = False
    """Whether the function always returns in time: a text that takes it too long gets 0."""
