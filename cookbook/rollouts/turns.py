"""One rollout: turns of the policy, with the replies of an environment between them, scored at the end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cookbook.errors import RewardError
from cookbook.rollouts.environment import Environment, EnvironmentFactory, EnvironmentReply, TurnTemplate
from cookbook.rollouts.ledger import sampling_seed
from cookbook.rollouts.records import Completion
from cookbook.rollouts.sampler import Policy, Sampled

__all__ = ["EmptyCompletion", "Limits", "PromptRow", "Rollouts", "Score", "Scorer", "all_of", "end_all"]

T = TypeVar("T")


class Score(Protocol):
    """What a completion is worth, and what that is made of by name."""

    @property
    def value(self) -> float:
        """The reward; finite."""

    @property
    def parts(self) -> Mapping[str, float]:
        """Empty where the reward has no parts."""


class Scorer(Protocol):
    """Scores the text of a completion. Raises RewardError; bounds its own time; must not block the event loop."""

    async def __call__(self, text: str, row: Mapping[str, Any], *, where: str) -> Score:
        """The reward of a completion of `row`, the whole row of the data file; `where` names it in errors."""


class PromptRow(Protocol):
    """A row of the data, ready to be sampled."""

    @property
    def index(self) -> int:
        """Row in the data file, 0-based."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The conversation that is to be answered."""

    @property
    def prompt_tokens(self) -> Sequence[int]:
        """The conversation and the assistant's header."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The whole row."""


class EmptyCompletion(Exception):
    """A completion has no token: nothing of it can be trained."""


@dataclass(frozen=True)
class Limits:
    """How completions are sampled."""

    max_tokens: int
    """Of a completion, over all its turns, injected tokens included."""
    temperature: float
    stop: tuple[str, ...] = ()
    max_turns: int = 1
    environment_timeout_s: float = 30.0
    """Of one step of the environment."""


@dataclass
class _Transcript:
    """A rollout as it grows."""

    tokens: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    turns: list[Sampled] = field(default_factory=list)
    reward: float | None = None

    def add_turn(self, turn: Sampled) -> None:
        self.turns.append(turn)
        self.tokens += turn.tokens
        self.is_sampled += [True] * len(turn.tokens)
        self.rollout_logprobs += turn.rollout_logprobs
        self.sampling_logprobs += turn.sampling_logprobs

    def inject(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.is_sampled += [False] * len(tokens)
        self.rollout_logprobs += [0.0] * len(tokens)
        self.sampling_logprobs += [0.0] * len(tokens)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Makes the rollouts of a run: all that is the same for every row."""

    policy: Policy = field(repr=False)
    scorer: Scorer = field(repr=False)
    limits: Limits
    run_seed: int
    make_environment: EnvironmentFactory | None = None
    template: TurnTemplate | None = field(default=None, repr=False)
    """Needed with an environment."""

    async def roll(self, row: PromptRow, ordinal: int, number: int, version: str) -> Completion:
        """Completion `number` of the row with this ordinal, scored.

        Raises:
            EmptyCompletion: the policy said nothing at all.
            SamplingError, RewardError, DataError: see `Policy`, `Scorer` and `TurnTemplate`.
        """
        where = f"row {ordinal} (row {row.index} of the data), completion {number}"
        transcript = await self._talk(row, ordinal, number, version, where)
        if not transcript.tokens:
            raise EmptyCompletion(f"completion {number} is empty")
        turns = transcript.turns
        value, parts = await self._score(transcript, row, where)
        return Completion(
            tokens=tuple(transcript.tokens),
            is_sampled=tuple(transcript.is_sampled),
            rollout_logprobs=tuple(transcript.rollout_logprobs),
            sampling_logprobs=tuple(transcript.sampling_logprobs),
            text=turns[0].text
            if len(turns) == 1 or self.template is None
            else self.template.text_of(transcript.tokens),
            finish_reason=turns[-1].finish_reason,
            version=_common_version(turns),
            seed=sampling_seed(self.run_seed, ordinal, number),
            reward=value,
            parts=parts,
            num_turns=len(turns),
        )

    async def _talk(self, row: PromptRow, ordinal: int, number: int, version: str, where: str) -> _Transcript:
        transcript = _Transcript()
        messages = list(row.messages)
        environment = None if self.make_environment is None else self.make_environment()
        for turn_number in range(self.limits.max_turns if environment is not None else 1):
            turn = await self.policy.complete(
                [*row.prompt_tokens, *transcript.tokens],
                max_tokens=self.limits.max_tokens - len(transcript.tokens),
                temperature=self.limits.temperature,
                stop=self.limits.stop or None,
                seed=sampling_seed(self.run_seed, ordinal, number, turn_number),
                version=version,
                cache_key=f"row-{ordinal}",
                where=where,
            )
            transcript.add_turn(turn)
            if environment is None or not turn.tokens:
                break
            reply = await self._reply(environment, row, turn, where)
            if reply.reward is not None:
                transcript.reward = (transcript.reward or 0.0) + reply.reward
            is_last = turn_number == self.limits.max_turns - 1
            if reply.done or reply.text is None or is_last or turn.finish_reason == "length":
                break
            injected = self._between(messages, turn, reply, where)
            if len(transcript.tokens) + len(injected) >= self.limits.max_tokens:
                break  # no room for another turn; what nobody answers is not appended
            transcript.inject(injected)
            # What the template writes after a turn does not depend on what earlier ones said.
            messages += [{"role": "assistant", "content": "-"}, {"role": reply.role, "content": "-"}]
        return transcript

    async def _reply(self, environment: Environment, row: PromptRow, turn: Sampled, where: str) -> EnvironmentReply:
        who, limit = f"{where}: the environment {type(environment).__name__}", self.limits.environment_timeout_s
        try:
            async with asyncio.timeout(limit):
                reply = await environment.step(row.fields, turn.text, turn.tokens)
        except TimeoutError as error:
            raise RewardError(f"{who} did not answer a turn within {limit:g} s.") from error
        except Exception as error:  # the user's code
            raise RewardError(f"{who} raised {type(error).__name__}: {error}.") from error
        if not isinstance(reply, EnvironmentReply):
            raise RewardError(f"{who} returned {reply!r:.100}, not an EnvironmentReply.")
        if reply.reward is not None and not math.isfinite(reply.reward):
            raise RewardError(f"{who} gave the reward {reply.reward}. It must be finite.")
        return reply

    def _between(
        self, messages: Sequence[Mapping[str, Any]], turn: Sampled, reply: EnvironmentReply, where: str
    ) -> tuple[int, ...]:
        assert self.template is not None, "an environment needs the chat template"
        return self.template.between(messages, turn.tokens, reply, where)

    async def _score(self, transcript: _Transcript, row: PromptRow, where: str) -> tuple[float, dict[str, float]]:
        """The environment's rewards, else the scorer's of what the policy said last."""
        if transcript.reward is not None:
            return transcript.reward, {"environment": transcript.reward}
        score = await self.scorer(transcript.turns[-1].text, row.fields, where=where)
        return score.value, dict(score.parts)


def _common_version(turns: Sequence[Sampled]) -> str:
    """The version that served all turns; where several did, a text that is no version, so that the group is redone."""
    versions = sorted({turn.version for turn in turns})
    return versions[0] if len(versions) == 1 else f"several: {', '.join(map(repr, versions))}"


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, at least one; when one raises, the others are cancelled and waited for."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await end_all(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return [task.result() for task in tasks]


async def end_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that are not done, and wait until they are.

    Each is cancelled once, and not again when this is cancelled itself: a second cancellation would break into an HTTP
    client that is closing its connection, which would then stay open, with the request at work on the other side.
    """
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        if not task.cancelling():
            task.cancel()
    if pending:
        await asyncio.wait(pending)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain that nobody did
