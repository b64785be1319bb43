"""Prompt groups made by hand."""

from __future__ import annotations

from cookbook.rollouts.records import Completion, PromptGroup

__all__ = ["make_completion", "make_group"]


def make_completion(reward: float = 0.0, **changes: object) -> Completion:
    values = {
        "tokens": (104, 105, 259),
        "is_sampled": (True, True, True),
        "rollout_logprobs": (-0.1, -1 / 3, -2e-17),
        "sampling_logprobs": (-0.2, -2 / 3, -4e-17),
        "text": "hi",
        "finish_reason": "stop",
        "version": "step-1",
        "seed": 5,
        "reward": reward,
    }
    return Completion(**values | changes)


def make_group(row: int, rewards: tuple[float, ...] = (0.0, 1.0), **changes: object) -> PromptGroup:
    completions = tuple(make_completion(reward, **changes) for reward in rewards)
    return PromptGroup(row, row, (112, 113), completions, {"ground_truth": str(row)})
