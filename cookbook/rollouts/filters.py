"""Which prompt groups are trained: the default filter, and loading one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from cookbook.errors import ConfigError, DataError, Problem, RewardError
from cookbook.rewards.load import import_function
from cookbook.rollouts.records import PromptGroup

__all__ = ["GroupFilter", "import_for", "load_group_filter", "rejection", "rewards_all_equal"]

GroupFilter: TypeAlias = Callable[[PromptGroup], str | None]
"""Gets a scored group; returns why it is not to be trained, or None to train it. Be quick: it runs between requests."""


def rewards_all_equal(group: PromptGroup) -> str | None:
    """The default filter: rewards that are all equal give every completion the advantage 0, so nothing is learnt."""
    first = group.rewards[0]
    return f"all rewards are {first:g}" if all(reward == first for reward in group.rewards) else None


def load_group_filter(spec: str | None) -> GroupFilter:
    """The filter that `group_filter` of the config names, module:function; None = the default one.

    Raises:
        ConfigError: there is no such module or function.
    """
    return rewards_all_equal if spec is None else import_for(spec, "group_filter")


def rejection(group_filter: GroupFilter, group: PromptGroup) -> str | None:
    """What the filter says of a group.

    Raises:
        DataError: it returned something other than None or a text. What it raises passes through.
    """
    reason = group_filter(group)
    if reason is None or (isinstance(reason, str) and reason):
        return reason
    name = getattr(group_filter, "__name__", repr(group_filter))
    raise DataError(
        f"the group filter {name} returned {reason!r} for row {group.row}. Return None to train the group, or a text "
        "that says why not."
    )


def import_for(spec: str, where: str) -> Callable[..., Any]:
    """The function that module:function names, for the field `where` of the config.

    Raises:
        ConfigError: there is no such module or function, or the module cannot be imported.
    """
    if ":" not in spec:
        raise ConfigError([Problem(where, f"{spec!r} is not of the form module:function.", "Name it like that.")])
    try:
        function: Callable[..., Any] = import_function(spec)
    except RewardError as error:
        raise ConfigError([Problem(where, str(error), "")]) from error
    return function
