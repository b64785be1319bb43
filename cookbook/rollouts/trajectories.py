"""Rollouts for people: one JSONL file a step, rows for a table, and the step's metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from cookbook.errors import CheckpointError
from cookbook.rollouts.ledger import CollectedStep
from cookbook.rollouts.records import PromptGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["rollout_metrics", "trajectory_rows", "write_trajectories"]


def trajectory_rows(
    step: int, groups: Sequence[PromptGroup], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """A row a completion, in row order: what was asked, what was said, and what it was worth."""
    for group in groups:
        prompt = str(tokenizer.decode(list(group.prompt_tokens), clean_up_tokenization_spaces=False))
        for number, completion in enumerate(group.completions):
            yield {
                "step": step,
                "row": group.row,
                "index": group.index,
                "completion_number": number,
                "question": _question(group),
                "prompt": prompt,
                "completion": completion.text,
                "reward": completion.reward,
                "parts": dict(completion.parts),
                "advantage": completion.advantage,
                "tokens": len(completion.tokens),
                "turns": completion.num_turns,
                "finish": completion.finish_reason,
                "version": completion.version,
            }


def _question(group: PromptGroup) -> str:
    """The last message of the row, without the marks of the chat template."""
    messages = group.fields.get("messages")
    return str(messages[-1].get("content", "")) if messages else ""


def write_trajectories(
    folder: Path, step: int, groups: Sequence[PromptGroup], tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Write the rows of a step to `folder`/step-000012.jsonl and return the file; one that is there is replaced.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = folder / f"step-{step:06d}.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in trajectory_rows(step, groups, tokenizer)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Choose another trajectory_dir."
        ) from error
    return path


def rollout_metrics(collected: CollectedStep) -> dict[str, float]:
    """Metrics of what was collected: rewards of all groups, and lengths of those that are trained.

    `reward/mean` and `reward/std` are over all completions, also of rejected groups (all right, or all wrong); what the
    step is trained on has `reward/trained_mean` and the parts of the reward.
    """
    ended = len(collected.groups) + len(collected.rejected)
    metrics = {"rollout/groups": float(len(collected.groups)), "rollout/rejected": float(len(collected.rejected))}
    if ended:
        metrics["rollout/rejected_share"] = len(collected.rejected) / ended
    rewards = [reward for group in collected.groups for reward in group.rewards]
    rewards += [reward for row in collected.rejected for reward in row.rewards]
    if rewards:
        metrics |= {"reward/mean": fmean(rewards), "reward/std": pstdev(rewards)}
        metrics |= {"reward/min": min(rewards), "reward/max": max(rewards)}
    completions = [completion for group in collected.groups for completion in group.completions]
    if not completions:
        return metrics
    metrics["reward/trained_mean"] = fmean(completion.reward for completion in completions)
    for name in sorted({name for completion in completions for name in completion.parts}):
        metrics[f"reward/{name}"] = fmean(completion.parts.get(name, 0.0) for completion in completions)
    metrics["rollout/tokens"] = float(sum(completion.num_sampled for completion in completions))
    metrics["rollout/tokens_per_completion"] = fmean(completion.num_sampled for completion in completions)
    metrics["rollout/truncated_share"] = fmean(c.finish_reason == "length" for c in completions)
    metrics["rollout/turns"] = fmean(completion.num_turns for completion in completions)
    return metrics
