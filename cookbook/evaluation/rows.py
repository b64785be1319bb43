"""All that an evaluation reads: the rows as each model's tokens, the reward and the judge; every problem at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from cookbook.data.counts import MAX_NAMED_ROWS
from cookbook.data.jsonl import JsonlFile
from cookbook.data.messages import check_messages
from cookbook.data.rendering import Renderer
from cookbook.data.rl import open_rows
from cookbook.errors import ConfigError, DataError, ModelError, Problem, RewardError
from cookbook.evaluation.win_rate import Judge, load_judge, try_judge
from cookbook.evaluation_config import EvaluationConfig
from cookbook.models import context_length, load_tokenizer
from cookbook.models.folders import find_folder
from cookbook.rewards import LoadedReward, dry_run, load_reward
from cookbook.rewards.reasoning import HELD_OUT_SEED

__all__ = ["EvaluationData", "EvaluationRow", "Reference", "load_evaluation_data", "open_evaluation_rows"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Reference:
    """A row with its reference answer, as N tokens."""

    index: int
    """Row in the data file, 0-based."""
    tokens: tuple[int, ...] = field(repr=False)
    weights: tuple[float, ...] = field(repr=False)
    """(N,): 1 on the tokens of the answer, its end-of-turn token included, else 0."""
    text: str


@dataclass(frozen=True, eq=False)
class EvaluationRow:
    """A row that is ready to be answered by one model."""

    index: int
    """Row in the data file, 0-based."""
    messages: tuple[Mapping[str, Any], ...] = field(repr=False)
    """The conversation that is to be answered, without its reference answer."""
    prompt_tokens: tuple[int, ...] = field(repr=False)
    """The conversation and the assistant's header."""
    fields: Mapping[str, Any] = field(repr=False)
    """The whole row."""
    reference: Reference | None
    """None where the row does not end with an assistant message."""

    @classmethod
    def of(cls, index: int, fields: Mapping[str, Any], renderer: Renderer, where: str) -> EvaluationRow:
        """The row `fields`, rendered.

        Raises:
            DataError: it is not a conversation that can be answered.
        """
        messages = check_messages(fields, where)
        reference = None
        if messages[-1]["role"] == "assistant":
            if len(messages) == 1:
                raise DataError(f"{where} is an answer without a question. Put the messages before it, or remove it.")
            rendered = renderer.render(fields, where)
            text = str(messages[-1].get("content") or "")
            reference = Reference(index, tuple(rendered.tokens.tolist()), tuple(rendered.weights.tolist()), text)
            messages = messages[:-1]
        tokens = renderer.prompt_tokens(messages, where, fields.get("tools"))
        return cls(index, tuple(messages), tuple(tokens.tolist()), fields, reference)

    def length_problem(self, limit: int, max_completion_tokens: int | None, where: str) -> str | None:
        """Why the row does not fit `limit` tokens, or None. max_completion_tokens: None = it is not to be answered."""
        if max_completion_tokens is not None and len(self.prompt_tokens) + max_completion_tokens > limit:
            return (
                f"{where} has a prompt of {len(self.prompt_tokens)} tokens, which leaves no room for "
                f"max_completion_tokens={max_completion_tokens}: the limit is {limit}."
            )
        if self.reference is not None and len(self.reference.tokens) >= limit:
            return f"{where} has {len(self.reference.tokens)} tokens with its answer, and must be below {limit}."
        return None


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """The data of one evaluation. Made by `load_evaluation_data`."""

    source: str
    fingerprint: str
    """sha256 (hex) of the data file's bytes."""
    rows: Mapping[str, list[EvaluationRow]] = field(repr=False)
    """Role -> the same rows, in file order, as the tokens of the model in that role."""
    reward: LoadedReward | None
    judge: Judge | None
    tokenizers: Mapping[str, str] = field(repr=False)
    """Role -> fingerprint of how its tokens are made."""

    @property
    def same_tokens(self) -> bool:
        """Whether all models have one tokenizer: else their losses are a token of their own each, and not compared."""
        return len(set(self.tokenizers.values())) == 1

    @property
    def num_rows(self) -> int:
        """Rows that each model answers."""
        return len(next(iter(self.rows.values())))

    def references(self, role: str) -> list[Reference]:
        """The reference answers, as the tokens of the model in `role`."""
        return [row.reference for row in self.rows[role] if row.reference is not None]


def open_evaluation_rows(config: EvaluationConfig, cache_dir: Path) -> JsonlFile:
    """The data file; the rows of a procedural task are written to `cache_dir` first, with a held-out seed of their own.

    Raises:
        DataError: no such file or task, or no rows.
    """
    return open_rows(config.dataset, cache_dir, max_rows=config.max_rows, default_seed=HELD_OUT_SEED)


def load_evaluation_data(
    config: EvaluationConfig, models_dir: Path, cache_dir: Path, *, shape_context: int | None = None
) -> EvaluationData:
    """Read, check and render all rows for each model, and try the reward and the judge on the first one.

    Args:
        models_dir: folder of the models known by name.
        cache_dir: folder for the rows of procedural tasks.
        shape_context: context length of the training shape in tokens; None = there is none.

    Raises:
        ConfigError: the problems of models, rows, reward and judge, together. A row that is too long is one of them.
    """
    problems: list[Problem] = []

    def attempt(where: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (DataError, ModelError, RewardError) as error:
            problems.append(Problem(where, str(error), ""))
            return None

    limit_s = config.reward_timeout_s
    reward, judge, rows = config.reward, config.judge, {}
    loaded = None if reward is None else attempt("reward", lambda: load_reward(reward, timeout_s=limit_s))
    referee = None if judge is None else attempt("judge", lambda: load_judge(judge))
    file = attempt("dataset", lambda: open_evaluation_rows(config, cache_dir))
    renderers = {role: attempt(role, functools.partial(_renderer, config, role, models_dir)) for role in config.models}
    for role, renderer in renderers.items():
        if renderer is None or file is None:
            continue
        limit = attempt(role, functools.partial(_limit, config, role, models_dir, shape_context))
        read = functools.partial(_read, file, config, renderer, limit, loaded)
        rows[role] = attempt("dataset", read) or []
    if not problems and file is not None:
        problems += _trials(config, next(iter(rows.values()))[0], loaded, referee)
    if problems or file is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    tokenizers = {role: renderer.fingerprint for role, renderer in renderers.items() if renderer is not None}
    data = EvaluationData(config.dataset, file.fingerprint, rows, loaded, referee, tokenizers)
    if loaded is None and referee is None and not data.references(next(iter(rows))):
        what = "is not set, and no row ends with a reference answer: there is nothing to measure."
        raise ConfigError([Problem("reward", what, "Set it, or give rows with an assistant message at the end.")])
    return data


def _read(
    file: JsonlFile, config: EvaluationConfig, renderer: Renderer, limit: int | None, reward: LoadedReward | None
) -> list[EvaluationRow]:
    """Every row; all that cannot be used are in one error."""
    rows: list[EvaluationRow] = []
    problems: list[str] = []
    num_rows = len(file) if config.max_rows is None else min(config.max_rows, len(file))
    room = config.max_completion_tokens if config.wants_answers else None
    for index, fields in file.rows(num_rows):
        where = file.where(index)
        try:
            if isinstance(fields, DataError):
                raise fields
            row = EvaluationRow.of(index, fields, renderer, where)
            problem = None if limit is None else row.length_problem(limit, room, where)
            if problem is None and reward is not None and reward.check is not None:
                unscored = reward.check(fields)
                problem = None if unscored is None else f"{where} {unscored}"
            if problem is not None:
                raise DataError(problem)
            rows.append(row)
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - MAX_NAMED_ROWS
        lines = [f"{len(problems)} of {num_rows} rows of {file.path} cannot be used:"]
        lines += [f"  - {problem}" for problem in problems[:MAX_NAMED_ROWS]]
        raise DataError("\n".join([*lines, f"  - and {more} more"] if more > 0 else lines))
    return rows


def _trials(
    config: EvaluationConfig, row: EvaluationRow, reward: LoadedReward | None, judge: Judge | None
) -> list[Problem]:
    """Problems of the reward and the judge with an empty answer to the first row."""
    where, problems = f"row {row.index}", []
    try:
        if reward is not None:
            dry_run(reward, row.fields, config.reward_timeout_s, where=where)
    except RewardError as error:
        problems.append(Problem("reward", str(error), ""))
    try:
        if judge is not None:
            try_judge(judge, row.fields, config.reward_timeout_s, where=where)
    except RewardError as error:
        problems.append(Problem("judge", str(error), ""))
    return problems


# Models -------------------------------------------------------------------------------------------------------------


def _renderer(config: EvaluationConfig, role: str, models_dir: Path) -> Renderer:
    name = config.tokenizer_of(role)
    if name == config.models[role]:
        name = str(_whole_model(name, models_dir))
    return Renderer(load_tokenizer(name, models_dir), "last_assistant_message")


def _limit(config: EvaluationConfig, role: str, models_dir: Path, shape_context: int | None) -> int | None:
    """The most tokens that a row and its answer may have; None = the deployment tells when it is asked.

    Raises:
        DataError: max_seq_len is above the context length.
    """
    limits = [] if shape_context is None else [shape_context]
    if config.backend == "embedded":
        limits.append(context_length(_whole_model(config.models[role], models_dir)))
    if config.max_seq_len is None or not limits:
        return min(limits) if limits else config.max_seq_len
    if config.max_seq_len > min(limits):
        raise DataError(
            f"max_seq_len={config.max_seq_len} is above its context length, {min(limits)} tokens. Lower it."
        )
    return config.max_seq_len


def _whole_model(name: str, models_dir: Path) -> Path:
    """The folder with the config and the tokenizer of a model: of a LoRA adapter, its base model's."""
    folder = find_folder(name, models_dir, hub_patterns=("*.json", "tokenizer*", "chat_template*"))
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return folder
    try:
        base = orjson.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, orjson.JSONDecodeError, KeyError) as error:
        what = f"{folder / 'adapter_config.json'} does not name its base model: {error}."
        raise ModelError(f"{what} Export the adapter anew.") from error
    return _whole_model(str(base), models_dir)
