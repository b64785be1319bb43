"""Held-out evaluation by sampling: greedy answers to held-out rows, and what the reward says of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from cookbook.config import RLConfig
from cookbook.evaluation.answers import Answer, Sampling, answer_rows
from cookbook.rewards import LoadedReward
from cookbook.rollouts.sampler import Policy
from cookbook.rollouts.turns import PromptRow

__all__ = ["GreedyEvaluation", "evaluate_greedy"]


@dataclass(frozen=True)
class GreedyEvaluation:
    """Means over held-out rows, and the answers themselves."""

    reward: float
    parts: dict[str, float]
    """Mean of each named part of the reward; an answer without it counts as 0."""
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
    sampling = Sampling(
        max_tokens=config.evaluation.max_completion_tokens or config.max_completion_tokens,
        temperature=0.0,
        stop=tuple(config.stop or ()),
        reward_timeout_s=config.reward_timeout_s,
        version=version,
    )
    answers = answer_rows(policy, rows, reward, sampling, timeout_s=config.evaluation.timeout_s)
    names = sorted({name for answer in answers for name in answer.parts})
    return GreedyEvaluation(
        reward=statistics.fmean(answer.reward for answer in answers if answer.reward is not None),
        parts={name: statistics.fmean(answer.parts.get(name, 0.0) for answer in answers) for name in names},
        tokens_per_answer=statistics.fmean(answer.num_tokens for answer in answers),
        answers=tuple(answers),
    )
