"""Answers of a model to rows, scored, and its probability of the reference answers. Means and intervals: report.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cookbook.errors import SamplingError
from cookbook.evaluation.kept import Guard, KeptLines
from cookbook.rewards import LoadedReward, score
from cookbook.rollouts.ledger import sampling_seed
from cookbook.rollouts.sampler import Policy
from cookbook.rollouts.turns import PromptRow, all_of

__all__ = ["Answer", "AnswerFile", "ReferenceLoss", "ReferenceRow", "Sampling", "answer_rows", "reference_losses"]


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out row."""

    index: int
    """Row in the data file, 0-based."""
    prompt: str
    """Content of the last message."""
    text: str
    reward: float | None
    """None where there is no reward."""
    num_tokens: int
    finish_reason: str
    """"stop" or "length"."""
    sample: int = 0
    """Which of the answers to its row, 0-based."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward was made of, by name."""
    version: str = ""
    """Snapshot that served it; "" = the model as it was deployed."""

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Sampling:
    """How rows are answered."""

    max_tokens: int
    temperature: float
    """0 = greedy."""
    stop: tuple[str, ...] = ()
    samples_per_row: int = 1
    seed: int = 0
    """Answer k to row i has the seed that completion k of row i has in a rollout with this run seed."""
    reward_timeout_s: float = 30.0
    version: str = ""
    """The snapshot that was synced last, for answers that do not say which served them."""


def answer_rows(
    policy: Policy,
    rows: Sequence[PromptRow],
    reward: LoadedReward | None,
    sampling: Sampling,
    *,
    timeout_s: float,
    done: Collection[tuple[int, int]] = (),
    on_answer: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Answer every row in one turn, `samples_per_row` times, and score what was said; in row order.

    Args:
        reward: None = answers are not scored.
        timeout_s: seconds for all of them.
        done: (row, sample) of answers that are there already, and are left out.
        on_answer: gets each answer as soon as it is scored, on the policy's event loop.

    Raises:
        SamplingError: a row could not be answered, or not all were in time. No row is ever left out.
        RewardError: the reward failed.
    """

    async def one(row: PromptRow, sample: int) -> Answer:
        which = f", answer {sample}" if sampling.samples_per_row > 1 else ""
        where = f"held-out row {row.index}{which}"
        sampled = await policy.complete(
            row.prompt_tokens,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling_seed(sampling.seed, row.index, sample),
            stop=sampling.stop or None,
            version=sampling.version,
            cache_key=f"row-{row.index}",
            where=where,
        )
        scored = None
        if reward is not None:
            scored = await score(reward, sampled.text, row.fields, sampling.reward_timeout_s, where=where)
        answer = Answer(
            index=row.index,
            prompt=str(row.messages[-1]["content"]),
            text=sampled.text,
            reward=None if scored is None else scored.value,
            num_tokens=len(sampled.tokens),
            finish_reason=sampled.finish_reason,
            sample=sample,
            parts={} if scored is None else dict(scored.parts),
            version=sampled.version,
        )
        if on_answer is not None:
            on_answer(answer)
        return answer

    wanted = [(row, sample) for row in rows for sample in range(sampling.samples_per_row)]
    missing = [(row, sample) for row, sample in wanted if (row.index, sample) not in done]
    return policy.run(all_of(one(row, sample) for row, sample in missing), timeout_s) if missing else []


class AnswerFile(KeptLines):
    """Answers of one model, so that an evaluation that was killed goes on from there."""

    def __init__(self, path: Path, identity: Mapping[str, Any], guard: Guard = nullcontext) -> None:
        """Open the file, and read what is there.

        Raises:
            ConfigError: it holds answers already, of another model or to something else.
            CheckpointError: it is damaged, or cannot be written.
        """
        super().__init__(path, identity, guard)
        self.answers = {(line["index"], line["sample"]): Answer(**line) for line in self.lines}
        """(row, sample) -> answer."""

    def add(self, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self.answers[answer.index, answer.sample] = answer
        self.append(answer.to_dict())


# Reference answers --------------------------------------------------------------------------------------------------


class ReferenceRow(Protocol):
    """A row with the answer that it should get, as tokens."""

    @property
    def index(self) -> int:
        """Row in the data file, 0-based."""

    @property
    def tokens(self) -> Sequence[int]:
        """(N,): the conversation with its answer."""

    @property
    def weights(self) -> Sequence[float]:
        """(N,): 1 on the tokens of the answer, its end-of-turn token included, else 0."""


class TokenScorer(Protocol):
    """Whatever tells the probability of tokens. `RolloutSampler` does."""

    async def token_logprobs(self, tokens: Sequence[int], *, where: str = "a row") -> tuple[float, ...]:
        """Logprob in nats of each token but the first: N-1 values."""

    def run(self, coroutine: Any, timeout_s: float | None = None) -> Any:
        """Run a coroutine on the loop that `token_logprobs` belongs to, and wait for it."""


@dataclass(frozen=True)
class ReferenceLoss:
    """What a model makes of one reference answer."""

    index: int
    """Row in the data file, 0-based."""
    nats: float
    """Negative log-likelihood, summed over the answer's tokens."""
    num_tokens: int


def reference_losses(
    scorer: TokenScorer,
    rows: Sequence[ReferenceRow],
    *,
    timeout_s: float,
    on_row: Callable[[], None] | None = None,
) -> list[ReferenceLoss]:
    """The loss of every row's reference answer, in row order; one request a row.

    Raises:
        SamplingError: a row could not be measured, or its loss is not finite, or not all were within `timeout_s`.
    """

    async def one(row: ReferenceRow) -> ReferenceLoss:
        where = f"the reference answer of row {row.index}"
        logprobs = await scorer.token_logprobs(row.tokens, where=where)
        pairs = [(value, weight) for value, weight in zip(logprobs, row.weights[1:], strict=True) if weight > 0]
        nats = -sum(value for value, _ in pairs)
        if not math.isfinite(nats):
            raise SamplingError(f"{where} has the logprob {-nats}: the model gives one of its tokens no probability.")
        if on_row is not None:
            on_row()
        return ReferenceLoss(row.index, nats, len(pairs))

    losses: list[ReferenceLoss] = scorer.run(all_of(one(row) for row in rows), timeout_s) if rows else []
    return losses
