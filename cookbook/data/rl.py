"""All that an RL run reads: prompts by their ordinal in the run, held-out prompts, the reward, and a report about them.

A row is {"messages": [...], "ground_truth": ...}; other keys reach the reward. Which rows are trained, in which order
they come back and what rejects one: cookbook/rollouts.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.config import RLConfig
from cookbook.data.context import context_limit
from cookbook.data.counts import MAX_NAMED_ROWS, cached_counts
from cookbook.data.epochs import EpochPlan
from cookbook.data.jsonl import JsonlFile
from cookbook.data.messages import check_messages
from cookbook.data.rendering import Renderer
from cookbook.data.rl_preflight import RLPreflightReport, rl_preflight_report
from cookbook.errors import ConfigError, DataError, ModelError, Problem, RewardError
from cookbook.models import load_tokenizer
from cookbook.rewards import LoadedReward, Reward, dry_run, load_reward, score
from cookbook.rewards.reasoning import HELD_OUT_SEED, PREFIX, make_rows, parse_spec

__all__ = ["RLData", "RLDataset", "RLRow", "load_rl_data", "open_rows"]


@dataclass(frozen=True, eq=False)
class RLRow:
    """A prompt that is ready to be sampled."""

    index: int
    """Row in the data file, 0-based."""
    messages: tuple[Mapping[str, Any], ...] = field(repr=False)
    prompt_tokens: tuple[int, ...] = field(repr=False)
    """The conversation and the assistant's header."""
    fields: Mapping[str, Any] = field(repr=False)
    """The whole row."""
    where: str
    """How messages name the row."""

    @classmethod
    def of(cls, index: int, fields: Mapping[str, Any], renderer: Renderer, where: str) -> RLRow:
        """The row `fields`, rendered.

        Raises:
            DataError: it is not a conversation that can be answered.
        """
        messages = check_messages(fields, where)
        if messages[-1]["role"] == "assistant":
            raise DataError(f"{where} ends with an answer (an assistant message). Remove it: the policy answers.")
        tokens = renderer.prompt_tokens(messages, where, fields.get("tools"))
        return cls(index, tuple(messages), tuple(tokens.tolist()), fields, where)


@dataclass(frozen=True, eq=False)
class RLDataset:
    """The rows of a data file whose prompts leave room for a completion. Made by `RLDataset.prepare`."""

    source: str
    """The file or task, as the config names it."""
    file: JsonlFile
    renderer: Renderer
    max_prompt_tokens: int
    lengths: NDArray[np.int64] = field(repr=False)
    """int64 (rows,): prompt tokens of every row that was considered, dropped ones included."""
    digests: NDArray[np.int64] = field(repr=False)
    """int64 (rows,): the same for two rows exactly when their prompts are."""
    kept: NDArray[np.int64] = field(repr=False)
    """int64 (kept rows,): row numbers in the data file, in file order."""

    @classmethod
    def prepare(
        cls,
        source: str,
        renderer: Renderer,
        reward: LoadedReward,
        *,
        cache_dir: Path,
        max_prompt_tokens: int,
        max_rows: int | None = None,
        default_seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> RLDataset:
        """Check and count every row of `source`, or its first `max_rows`.

        Rows with more than `max_prompt_tokens` tokens are dropped and can be named (`dropped`). A row that cannot be
        rendered, or that `reward` can never score, is never dropped: it is an error. Counts, and the rows of a task of
        reasoning-gym (with `default_seed` unless it sets one), are kept in `cache_dir`; `progress` gets (rows done,
        rows) every 10,000 rows.

        Raises:
            DataError: the file is missing or empty, there is no such task, rows are invalid (up to 20 are named, all
                are counted), or no prompt is short enough.
        """
        file = open_rows(source, cache_dir, max_rows=max_rows, default_seed=default_seed)
        num_rows = len(file) if max_rows is None else min(max_rows, len(file))
        parts = ("rl-1", file.fingerprint, renderer.fingerprint, num_rows, reward.name)

        def count(index: int, fields: dict[str, Any]) -> tuple[int, int]:
            row = RLRow.of(index, fields, renderer, file.where(index))
            problem = reward.check(fields) if reward.check is not None else None
            if problem is not None:
                raise DataError(f"{row.where} {problem}")
            return len(row.prompt_tokens), _prompt_digest(row.prompt_tokens)

        path = cache_dir / f"prompts-{_digest(parts)}.npy"
        counts = cached_counts(path, file, count, (2, num_rows), np.int64, progress)
        kept = np.flatnonzero(counts[0] <= max_prompt_tokens)
        if len(kept) == 0:
            raise DataError(
                f"no prompt of {source} leaves room for a completion: the shortest of {num_rows} has "
                f"{int(counts[0].min())} tokens, and {max_prompt_tokens} are left. Lower max_completion_tokens, raise "
                "max_seq_len or shorten the prompts."
            )
        return cls(source, file, renderer, max_prompt_tokens, counts[0], counts[1], kept)

    @property
    def num_rows(self) -> int:
        """Rows considered: those of the file, or `max_rows` of them."""
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the data file's bytes and of which rows are kept."""
        return hashlib.sha256(self.file.fingerprint.encode() + self.kept.tobytes()).hexdigest()

    def dropped(self, limit: int = MAX_NAMED_ROWS) -> list[tuple[int, int]]:
        """The first `limit` dropped rows as (row in the file, tokens of its prompt)."""
        indices = np.flatnonzero(self.lengths > self.max_prompt_tokens)[:limit]
        return [(int(index), int(self.lengths[index])) for index in indices]

    def num_also_in(self, other: RLDataset) -> int:
        """Kept rows whose prompt is also one of the kept rows of `other`."""
        return int(np.isin(self.digests[self.kept], other.digests[other.kept]).sum())

    def render(self, index: int) -> RLRow:
        """Row `index` of the data file.

        Raises:
            DataError: the file changed since it was counted.
        """
        return RLRow.of(index, self.file[index], self.renderer, self.file.where(index))

    def rows(self) -> Iterator[RLRow]:
        """The kept rows in file order, one by one; for evaluation."""
        return (self.render(int(index)) for index in self.kept)


@dataclass(frozen=True, eq=False)
class RLData:
    """The data of one RL run. Made by `load_rl_data`."""

    train: RLDataset = field(repr=False)
    held_out: RLDataset | None = field(repr=False)
    reward: LoadedReward
    reward_timeout_s: float
    plan: EpochPlan
    """The permutation of each epoch. Its steps are the most that there can be: rejected rows make fewer."""
    report: RLPreflightReport = field(repr=False)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self.plan.num_rows

    @property
    def total_rows(self) -> int:
        """Rows of the whole run, epochs x rows: ordinals are below this."""
        return self.plan.num_rows * self.plan.epochs

    @property
    def fingerprint(self) -> str:
        """Text that is the same for two data sets exactly when each ordinal of an epoch can only be the same row."""
        text = f"{self.train.fingerprint}/{self.train.renderer.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()

    def row(self, ordinal: int) -> RLRow:
        """The row with this ordinal: epoch x `num_rows` + place in the epoch's permutation.

        Raises:
            IndexError: there is no such ordinal.
            DataError: the file changed since it was counted.
        """
        if not 0 <= ordinal < self.total_rows:
            raise IndexError(f"row {ordinal} of {self.total_rows}")
        epoch, place = divmod(ordinal, self.num_rows)
        return self.train.render(int(self.train.kept[_permutation(self.plan, epoch)[place]]))

    def rows(self, start: int = 0) -> Iterator[tuple[int, RLRow]]:
        """(ordinal, row) from the ordinal `start` to the end of the last epoch."""
        return ((ordinal, self.row(ordinal)) for ordinal in range(start, self.total_rows))

    def held_out_rows(self) -> Iterator[RLRow]:
        """Held-out rows in file order; none without a held-out data set."""
        return self.held_out.rows() if self.held_out is not None else iter(())

    async def score(self, text: str, row: Mapping[str, Any], *, where: str = "") -> Reward:
        """What the completion `text` of the row with the fields `row` is worth, within the run's limit.

        Raises:
            RewardError: the reward raised, is late, or is not a finite number.
        """
        return await score(self.reward, text, row, self.reward_timeout_s, where=where)


@functools.lru_cache(maxsize=4)
def _permutation(plan: EpochPlan, epoch: int) -> NDArray[np.int64]:
    return plan.permutation(epoch)


def load_rl_data(
    config: RLConfig,
    models_dir: Path,
    cache_dir: Path,
    *,
    shape_context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RLData:
    """Read, check and count all rows that `config` names, and call its reward once with an empty completion.

    Args:
        models_dir: folder of the models known by name.
        cache_dir: folder for counts and for the rows of procedural tasks, so that a resumed run has the same.
        shape_context: context length of the training shape in tokens, None on a manual launch.
        progress: gets (rows done, rows) now and then.

    Raises:
        ConfigError: the problems of the model, the reward, the training rows and the held-out rows, together.
    """
    renderer, limit = _renderer_and_limit(config, models_dir, shape_context)
    problems: list[Problem] = []
    try:
        reward = load_reward(config.reward, timeout_s=config.reward_timeout_s)
    except RewardError as error:
        problems.append(Problem("reward", str(error), ""))
        reward = LoadedReward(config.reward, lambda text, row: 0.0)  # the rows can be checked all the same

    def prepare(where: str, source: str, max_rows: int | None, room: int, seed: int) -> RLDataset | None:
        if room < 1:
            return None
        try:
            return RLDataset.prepare(
                source,
                renderer,
                reward,
                cache_dir=cache_dir,
                max_prompt_tokens=room,
                max_rows=max_rows,
                default_seed=seed,
                progress=progress,
            )
        except (DataError, RewardError) as error:
            problems.append(Problem(where, str(error), ""))
            return None

    room = _room(limit, "max_completion_tokens", config.max_completion_tokens, problems)
    train = prepare("dataset", config.dataset, config.max_rows, room, 0)
    evaluation, held_out = config.evaluation, None
    if evaluation.dataset is not None:
        longest = evaluation.max_completion_tokens
        if longest is not None:
            room = _room(limit, "evaluation.max_completion_tokens", longest, problems)
        held_out = prepare("evaluation.dataset", evaluation.dataset, evaluation.max_rows, room, HELD_OUT_SEED)
    if train is not None and not problems:
        problems += _dry_run(reward, train, config.reward_timeout_s)
    if problems or train is None:
        raise ConfigError(problems)
    plan = EpochPlan(
        num_rows=len(train.kept), batch_size=config.prompt_groups_per_step, epochs=config.epochs, seed=config.seed
    )
    report = rl_preflight_report(config, train, plan, held_out)
    return RLData(train, held_out, reward, config.reward_timeout_s, plan, report)


def open_rows(source: str, cache_dir: Path, *, max_rows: int | None = None, default_seed: int = 0) -> JsonlFile:
    """The rows of a data file, or of a task of reasoning-gym, which is written to `cache_dir` first if it is not there.

    Raises:
        DataError: no such file or task, or no rows.
    """
    if not source.startswith(PREFIX):
        return JsonlFile.open(source)
    spec = parse_spec(source)
    path = cache_dir / f"{spec.name}-{_digest((spec.name, sorted(spec.options.items()), max_rows, default_seed))}.jsonl"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path.parent} cannot be written: {error.strerror}. Make it writable.") from error
        make_rows(spec, path, max_rows, default_seed)
    return JsonlFile.open(path)


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _prompt_digest(tokens: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _room(limit: int, where: str, longest: int, problems: list[Problem]) -> int:
    """Tokens that are left for a prompt."""
    if longest >= limit:
        what = f"is {longest}, which leaves no room for a prompt: a sequence may have {limit} tokens."
        problems.append(Problem(where, what, "Lower it, or raise max_seq_len."))
    return limit - longest


def _dry_run(reward: LoadedReward, train: RLDataset, timeout_s: float) -> list[Problem]:
    row = train.render(int(train.kept[0]))
    try:
        dry_run(reward, row.fields, timeout_s, where=row.where)
    except RewardError as error:
        return [Problem("reward", str(error), "")]
    return []


def _renderer_and_limit(config: RLConfig, models_dir: Path, shape_context: int | None) -> tuple[Renderer, int]:
    """The renderer, and the most tokens that a prompt and its completion may have."""
    try:
        renderer = Renderer(load_tokenizer(config.tokenizer, models_dir))
        return renderer, context_limit(config, models_dir, shape_context)
    except ModelError as error:
        where = "deployment.tokenizer_model, tokenizer_model or base_model"
        raise ConfigError([Problem(where, str(error), "")]) from error
