"""Held-out evaluation by sampling: greedy answers to held-out rows, and what the reward says of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cookbook.config import RLConfig
from cookbook.rewards import LoadedReward, score
from cookbook.rollouts.sampler import Policy
from cookbook.rollouts.turns import PromptRow, all_of

__all__ = ["Answer", "GreedyEvaluation", "evaluate_greedy"]


@dataclass(frozen=True)
class Answer:
    """One greedy answer to a held-out row."""

    index: int
    """Row in the data file, 0-based."""
    prompt: str
    """Content of the last message."""
    text: str
    reward: float
    num_tokens: int
    finish_reason: str

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class GreedyEvaluation:
    """Means over held-out rows, and the answers themselves."""

    reward: float
    parts: dict[str, float]
    """Mean of each named part of the reward."""
    tokens_per_answer: float
    answers: tuple[Answer, ...] = field(repr=False)

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        parts = {f"reward/{name}": value for name, value in self.parts.items()}
        numbers = {"tokens_per_answer": self.tokens_per_answer, "num_rows": float(len(self.answers))}
        return {"reward": self.reward, **parts, **numbers}


def evaluate_greedy(
    policy: Policy, rows: Sequence[PromptRow], reward: LoadedReward, config: RLConfig, *, version: str
) -> GreedyEvaluation:
    """Answer each row at temperature 0 and score it: one turn, also where training takes several.

    Raises:
        SamplingError: a row could not be answered, or not all were within evaluation.timeout_s.
        RewardError: the reward failed.
    """
    max_tokens = config.evaluation.max_completion_tokens or config.max_completion_tokens

    async def one(row: PromptRow) -> tuple[Answer, dict[str, float]]:
        where = f"held-out row {row.index}"
        sampled = await policy.complete(
            row.prompt_tokens,
            max_tokens=max_tokens,
            temperature=0.0,
            seed=0,
            stop=config.stop,
            version=version,
            where=where,
        )
        scored = await score(reward, sampled.text, row.fields, config.reward_timeout_s, where=where)
        prompt = str(row.messages[-1]["content"])
        answer = Answer(row.index, prompt, sampled.text, scored.value, len(sampled.tokens), sampled.finish_reason)
        return answer, dict(scored.parts)

    results = policy.run(all_of(one(row) for row in rows), config.evaluation.timeout_s)
    answers = tuple(answer for answer, _ in results)
    names = sorted({name for _, parts in results for name in parts})
    return GreedyEvaluation(
        reward=statistics.fmean(answer.reward for answer in answers),
        parts={name: statistics.fmean(parts.get(name, 0.0) for _, parts in results) for name in names},
        tokens_per_answer=statistics.fmean(answer.num_tokens for answer in answers),
        answers=answers,
    )
