"""Greedy evaluation: means, answers, and errors under their own names. The policy is a function here."""

import asyncio
from dataclasses import dataclass, field

import pytest

from cookbook.config import RLConfig
from cookbook.errors import RewardError
from cookbook.evaluation import evaluate_greedy
from cookbook.rewards import LoadedReward, Reward
from cookbook.rollouts.sampler import Sampled

CONFIG = RLConfig(log_path="a", base_model="b", dataset="c", reward="exact", max_completion_tokens=7)


@dataclass
class Row:
    index: int
    prompt_tokens: tuple = (1, 2)
    messages: tuple = ({"role": "user", "content": "2?"},)
    fields: dict = field(default_factory=dict)


class Echo:
    """Answers with the number of tokens that it was allowed."""

    def __init__(self):
        self.asked = []

    async def complete(self, prompt_tokens, **options):
        self.asked.append(options)
        return Sampled((5,) * 3, (0.0,) * 3, (0.0,) * 3, "stop", str(options["max_tokens"]), options["version"])

    def run(self, coroutine, timeout_s=None):
        return asyncio.run(coroutine)


def half_of_them(completion, row):
    return Reward(row["worth"], {"right": float(row["worth"] > 0)})


def test_the_means_are_over_all_rows_and_every_answer_is_greedy():
    policy = Echo()
    rows = [Row(3, fields={"worth": 2.0}), Row(5, fields={"worth": 0.0})]
    result = evaluate_greedy(policy, rows, LoadedReward("half", half_of_them), CONFIG, version="step-1")
    assert result.to_dict() == {"reward": 1.0, "reward/right": 0.5, "tokens_per_answer": 3.0, "num_rows": 2.0}
    assert [(answer.index, answer.text, answer.reward) for answer in result.answers] == [(3, "7", 2.0), (5, "7", 0.0)]
    assert {(options["temperature"], options["max_tokens"], options["version"]) for options in policy.asked} == {
        (0.0, 7, "step-1")
    }


def test_a_reward_that_fails_is_an_error_of_its_own_name():
    with pytest.raises(RewardError, match="held-out row 3"):
        evaluate_greedy(Echo(), [Row(3)], LoadedReward("half", half_of_them), CONFIG, version="")
