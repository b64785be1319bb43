"""What sampling gives to training: a prompt group and its completions. Records, so that nothing can be misaligned.

How they are sampled: collect.py. How they become datums: cookbook/data/rollout_datums.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cookbook.errors import DataError

__all__ = ["Completion", "PromptGroup", "RejectedRow"]


@dataclass(frozen=True)
class Completion:
    """One rollout of a prompt: what follows the prompt, token by token, and what it was worth.

    All per-token tuples have one length T. `is_sampled` is False for injected tokens (what a tool or an environment
    answered, and the chat marks around it), which are never trained; their logprobs are 0.0 and mean nothing.
    """

    tokens: tuple[int, ...]
    is_sampled: tuple[bool, ...] = field(repr=False)
    rollout_logprobs: tuple[float, ...] = field(repr=False)
    """Nats, of the policy that sampled them at temperature 1 over the full vocabulary."""
    sampling_logprobs: tuple[float, ...] = field(repr=False)
    """Nats, of the distribution that they were drawn from (temperature applied)."""
    text: str
    finish_reason: str
    """"stop" or "length"; of the last turn."""
    version: str
    """Snapshot that served it; "" = the base model as it was deployed."""
    seed: int
    reward: float
    advantage: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward was made of, by name."""
    num_turns: int = 1

    def __post_init__(self) -> None:
        lengths = [len(self.tokens), len(self.is_sampled), len(self.rollout_logprobs), len(self.sampling_logprobs)]
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise DataError(
                f"a completion has {lengths[0]} tokens, {lengths[1]} mask entries, {lengths[2]} rollout_logprobs and "
                f"{lengths[3]} sampling_logprobs. All four must be of one length, at least 1."
            )

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.is_sampled)


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and its completions; advantages are relative to this group."""

    row: int
    """Ordinal over the whole run: epoch x rows + place in the epoch's permutation."""
    index: int
    """Row in the data file, 0-based."""
    prompt_tokens: tuple[int, ...] = field(repr=False)
    completions: tuple[Completion, ...] = field(repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The whole row of the data file."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """One reward a completion."""
        return tuple(completion.reward for completion in self.completions)

    @property
    def version(self) -> str:
        """The snapshot that served every completion of the group.

        Raises:
            DataError: more than one did.
        """
        versions = {completion.version for completion in self.completions}
        if len(versions) != 1:
            raise DataError(
                f"row {self.row} was sampled by {len(versions)} versions of the policy: {sorted(versions)}."
            )
        return versions.pop()


@dataclass(frozen=True)
class RejectedRow:
    """A row that was sampled and is not trained."""

    row: int
    index: int
    reason: str
    rewards: tuple[float, ...] = ()
    """One a completion; empty where there is no whole group."""
