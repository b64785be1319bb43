"""Collecting what the next optimizer step is trained on: which rows are sampled, how far ahead, and what ends a row.

One rollout: turns.py. The requests: sampler.py. The account of the rows: ledger.py.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cookbook.config import RLConfig
from cookbook.data.rollout_datums import with_advantages
from cookbook.errors import CheckpointError, SamplingError
from cookbook.rollouts.environment import EnvironmentFactory, TurnTemplate
from cookbook.rollouts.filters import load_group_filter, rejection
from cookbook.rollouts.ledger import CollectedStep, RowLedger
from cookbook.rollouts.records import Completion, PromptGroup, RejectedRow
from cookbook.rollouts.sampler import Policy
from cookbook.rollouts.turns import EmptyCompletion, Limits, PromptRow, Rollouts, Scorer, all_of, end_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CollectedStep", "PromptRows", "RolloutCollector"]

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0


class PromptRows(Protocol):
    """The training rows of a run, in the order they are taken. RLData is one."""

    @property
    def total_rows(self) -> int:
        """Rows of the whole run: epochs x rows."""

    def row(self, ordinal: int) -> PromptRow:
        """The row with this ordinal, 0 <= ordinal < total_rows. Quick, as it is called between requests."""


@dataclass
class _Window:
    """What is under way between two weight syncs: so many slots, each of which brings one accepted group."""

    version: str
    ledger: RowLedger
    """As of the last step that was collected from this window."""
    next_step: int
    steps_left: int
    open_rows: deque[int]
    next_row: int
    ready: list[PromptGroup] = field(default_factory=list)
    """Accepted and not yet collected, as they arrived."""
    rejected: list[RejectedRow] = field(default_factory=list)
    slots: set[asyncio.Task[None]] = field(default_factory=set)
    """Those still at work."""
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take_row(self) -> int | None:
        """The next row to sample: the open ones of the ledger first."""
        if self.open_rows:
            return self.open_rows.popleft()
        if self.next_row == self.ledger.total:
            return None
        self.next_row += 1
        return self.next_row - 1

    def collect(self, count: int) -> CollectedStep:
        """Book up to `count` groups, those that arrived first, and every row that was rejected."""
        groups = sorted(self.ready[:count], key=lambda group: group.row)
        rejected = sorted(self.rejected, key=lambda row: row.row)
        self.ledger = self.ledger.book(
            next_row=self.next_row, trained=[g.row for g in groups], rejected=[r.row for r in rejected]
        )
        del self.ready[:count]
        self.rejected.clear()
        self.next_step += 1
        self.steps_left -= 1
        return CollectedStep(tuple(groups), tuple(rejected), self.ledger, self.version)


class RolloutCollector:
    """Collects the prompt groups of one optimizer step after another.

    Between two weight syncs, interval x prompt_groups_per_step slots are at work, from the first step's collection on
    and while the trainer trains. Each samples rows until one gives a group that is to be trained; so a rejected group
    is replaced by the next row, never more prompts are in flight or waiting than the steps until the next sync need,
    and nothing is left over when it comes. With interval 1, or 0 (no syncs), nothing is sampled ahead of a step.

    Nothing is booked until a step is collected: whatever fails, rows that were in flight are still pending. Not for
    use from more than one thread at a time.

    >>> with RolloutCollector(sampler, data, score, config) as collector:  # doctest: +SKIP
    ...     collected = collector.collect(ledger, step=0, version="")
    """

    def __init__(
        self,
        policy: Policy,
        data: PromptRows,
        scorer: Scorer,
        config: RLConfig,
        environment: EnvironmentFactory | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Nothing is sampled yet. `tokenizer` is needed with an `environment`, whose replies become tokens.

        Raises:
            ConfigError: config.group_filter cannot be loaded.
        """
        self._policy = policy
        self._data = data
        self._config = config
        self._filter = load_group_filter(config.group_filter)
        if environment is not None and tokenizer is None:
            raise ValueError("an environment needs the tokenizer of the policy, to put its replies into the rollout")
        limits = Limits(
            max_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            stop=tuple(config.stop or ()),
            max_turns=config.max_turns,
            environment_timeout_s=config.reward_timeout_s,
        )
        template = None if tokenizer is None else TurnTemplate(tokenizer)
        self._rollouts = Rollouts(policy, scorer, limits, config.seed, environment, template)
        self._window: _Window | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def collect(self, ledger: RowLedger, *, step: int, version: str) -> CollectedStep:
        """The groups of the optimizer step that follows `step` done ones.

        Args:
            ledger: the account of the last step that was collected, or of the commit that the run was restored to. If
                it is not the one that the last call gave, what is in flight is dropped, and its rows are pending.
            step: optimizer steps done over the whole run.
            version: the snapshot that the deployment serves, as the last weight sync gave it; "" = the base model.

        Raises:
            SamplingError: a row could not be sampled, or was served by another version at every attempt.
            RewardError: a reward or the environment failed.
            CheckpointError: the ledger is of other data.
        Whatever it raises, all requests were cancelled and `ledger` still holds.
        """
        if ledger.total != self._data.total_rows:
            raise CheckpointError(
                f"the row ledger is of {ledger.total} rows, the data and epochs make {self._data.total_rows}. Go on "
                "with the data that the run began with, or start in a new log_path."
            )
        return self._policy.run(self._collect(ledger, step, version))

    def drop(self) -> None:
        """Cancel what is in flight and forget what has not been collected; its rows are pending. For a restored run."""
        self._policy.run(self._drop())

    def close(self) -> None:
        """The same, at the end. Gives up on what does not end within seconds."""
        if self._window is not None:
            self._policy.run(self._drop(), _CLOSE_S)

    # -- on the sampler's loop -----------------------------------------------------------------------------------------

    async def _collect(self, ledger: RowLedger, step: int, version: str) -> CollectedStep:
        try:
            window = self._window
            if window is None or not _continues(window, ledger, step, version):
                await self._drop()
                window = self._window = self._open_window(ledger, step, version)
            while len(window.ready) < self._config.prompt_groups_per_step and window.slots and window.error is None:
                window.changed.clear()
                await window.changed.wait()
            if window.error is not None:
                raise window.error
            return window.collect(self._config.prompt_groups_per_step)
        except BaseException:
            await self._drop()
            raise

    def _open_window(self, ledger: RowLedger, step: int, version: str) -> _Window:
        interval = self._config.weight_sync.weight_sync_interval or 1
        steps = interval - step % interval  # syncs are counted over the whole run, wherever it was resumed
        window = _Window(version, ledger, step, steps, deque(ledger.open_rows), ledger.next_row)
        count = min(steps * self._config.prompt_groups_per_step, ledger.pending)
        window.slots = {asyncio.create_task(self._fill_slot(window)) for _ in range(count)}
        return window

    async def _drop(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            await end_all(window.slots)

    async def _fill_slot(self, window: _Window) -> None:
        """Sample rows until one gives a group that is to be trained, or there are none left."""
        try:
            while (row := window.take_row()) is not None:
                found = await self._try_row(row, window.version)
                if isinstance(found, PromptGroup):
                    window.ready.append(found)
                    break
                logger.info("row %d is rejected: %s", found.row, found.reason)
                window.rejected.append(found)
        except Exception as error:
            window.error = window.error or error
            for slot in window.slots - {asyncio.current_task()}:
                if not slot.cancelling():
                    slot.cancel()
        finally:
            window.slots.discard(asyncio.current_task())
            window.changed.set()

    async def _try_row(self, ordinal: int, version: str) -> PromptGroup | RejectedRow:
        row = self._data.row(ordinal)
        try:
            group = await self._sample_group(row, ordinal, version)
        except EmptyCompletion as empty:
            return RejectedRow(ordinal, row.index, str(empty))
        reason = rejection(self._filter, group)
        return group if reason is None else RejectedRow(ordinal, row.index, reason, group.rewards)

    async def _sample_group(self, row: PromptRow, ordinal: int, version: str) -> PromptGroup:
        """All completions of a row, served by the version that is expected.

        Raises:
            SamplingError: at every attempt, others served it.
        """
        pauses = [*self._config.retry.delays(), 0.0]
        for attempt, pause in enumerate(pauses, start=1):
            roll = functools.partial(self._rollouts.roll, row, ordinal, version=version)
            completions = await all_of(roll(number) for number in range(self._config.completions_per_prompt))
            served = sorted({completion.version for completion in completions})
            if served == [version]:
                return self._group(row, ordinal, completions)
            logger.warning(
                "row %d was served by %s, not by %r (attempt %d of %d); it is sampled again",
                *(ordinal, ", ".join(map(repr, served)), version, attempt, len(pauses)),
            )
            await asyncio.sleep(pause * (1 + self._config.retry.jitter * random.random()))
        raise SamplingError(
            f"row {ordinal} (row {row.index} of the data) was served by {', '.join(map(repr, served))} at the last of "
            f"{len(pauses)} attempts, but {version!r} is synced. Something else loads weights into the deployment: "
            "stop it, then resume the run. The row stays to be sampled."
        )

    def _group(self, row: PromptRow, ordinal: int, completions: Sequence[Completion]) -> PromptGroup:
        group = PromptGroup(ordinal, row.index, tuple(row.prompt_tokens), tuple(completions), row.fields)
        return with_advantages(group, self._config.advantage)


def _continues(window: _Window, ledger: RowLedger, step: int, version: str) -> bool:
    """Whether the next step is one of this window."""
    same = window.ledger == ledger and window.next_step == step and window.version == version
    return same and window.steps_left > 0
