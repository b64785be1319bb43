"""Tasks of reasoning-gym: `reasoning_gym:NAME?option=value` as rows of a data set and as their reward.

The library is used in a worker process only (isolation.py): some of its scorers evaluate a model's text.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import orjson
import yaml

from cookbook.errors import DataError, RewardError
from cookbook.rewards.answers import after_reasoning, tagged
from cookbook.rewards.isolation import Late, call_isolated
from cookbook.rewards.records import LoadedReward, Reward

__all__ = [
    "HELD_OUT_SEED",
    "PREFIX",
    "ReasoningSpec",
    "entry_problem",
    "make_rows",
    "parse_spec",
    "reasoning_reward",
    "score_entry",
    "write_rows",
]

PREFIX = "reasoning_gym:"
HELD_OUT_SEED = 1_000_000_000
"""Default of held-out rows. The library makes row i from seed + i: seeds must lie further apart than there are rows."""
DEFAULT_SIZE = 500
INSTRUCTION = "Give your final answer between <answer> and </answer>."
ROWS_LIMIT_S = 600.0
TRUTH_LIMIT_S = 60.0


@dataclass(frozen=True)
class ReasoningSpec:
    """A task of reasoning-gym by name, with the fields of its config that are set."""

    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        options = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"{PREFIX}{self.name}" + (f"?{options}" if options else "")


def parse_spec(text: str) -> ReasoningSpec:
    """Read `reasoning_gym:NAME?option=value&option=value`, values in YAML. Whether there is such a task: `make_rows`.

    Raises:
        DataError: the text is not of that form.
    """
    name, _, query = text.removeprefix(PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        options = {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError):
        pairs, options = [], {"": None}
    if not text.startswith(PREFIX) or not re.fullmatch(r"\w+", name) or "" in options or len(pairs) != len(options):
        raise DataError(f"{text!r} is not a task. Write {PREFIX}NAME or {PREFIX}NAME?option=value&option=value.")
    return ReasoningSpec(name, options)


# Rows ---------------------------------------------------------------------------------------------------------------


def make_rows(spec: ReasoningSpec, path: Path, max_rows: int | None, default_seed: int) -> None:
    """Write the task's rows to the JSONL file at `path`: messages, ground_truth, and the library's entry.

    Rows follow from the name, the options (`seed`: `default_seed`, `size`: 500 unless given) and `max_rows` alone.

    Raises:
        DataError: no such task or option, a value that the task refuses, or rows that are not there in ten minutes.
    """
    options = {"seed": default_seed, "size": DEFAULT_SIZE, **spec.options}
    arguments = {"name": spec.name, "options": options, "path": str(path), "max_rows": max_rows}
    try:
        problem = call_isolated("reasoning_gym_rows", arguments, ROWS_LIMIT_S)
    except Late:
        problem = f"did not give its rows within {ROWS_LIMIT_S:g} s, or ran out of memory. Ask for fewer or easier ones"
    except RewardError as error:
        problem = f"failed: {error}"
    if problem is not None:
        raise DataError(f"{spec}: {problem}.")


def write_rows(name: str, options: dict[str, Any], path: str, max_rows: int | None) -> str | None:
    """In the worker: write the rows, or say why not."""
    try:
        dataset = _dataset(name, orjson.dumps(options))
    except ValueError as error:
        return str(error)
    count = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    temporary = Path(path).with_name(f".{Path(path).name}")
    with temporary.open("wb") as file:
        for index in range(count):
            file.write(_json(_row(dataset[index], {"name": name, "options": options, "index": index})))
    temporary.replace(path)
    return None


def _row(entry: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    prompt = f"{entry['question']}\n\n{INSTRUCTION}"
    return {
        "messages": [{"role": "user", "content": prompt}],
        "ground_truth": entry["answer"],
        "question": entry["question"],
        "metadata": entry["metadata"],
        "reasoning_gym": source,
    }


def _json(row: dict[str, Any]) -> bytes:
    return orjson.dumps(
        row, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    )


# Reward -------------------------------------------------------------------------------------------------------------


def reasoning_reward(text: str, limit_s: float) -> LoadedReward:
    """The task's own scorer, from 0 to 1, on what is in <answer>...</answer>, or on the whole text without the tags.

    Rows are those of `make_rows`, or any with the library's `question`, `metadata` and the answer as `ground_truth`.
    A text that takes longer than `limit_s` seconds gets 0. Parts: `answered` (in tags), `late` where time ran out.

    Raises:
        RewardError: the text is not of the form of a task.
    """
    try:
        spec = parse_spec(text)
    except DataError as error:
        raise RewardError(str(error)) from error
    task = {"name": spec.name, "options": dict(spec.options)}

    def reward(completion: str, row: Mapping[str, Any]) -> Reward:
        after = after_reasoning(completion)
        inside = tagged(after)
        answer = after.strip() if inside is None else inside
        answered = float(inside is not None)
        try:
            value = call_isolated("reasoning_gym_score", {**task, "answer": answer, "row": _entry_fields(row)}, limit_s)
        except Late:
            return Reward(0.0, {"answered": answered, "late": 1.0})
        return Reward(float(value), {"answered": answered})

    def check(row: Mapping[str, Any]) -> str | None:
        if "ground_truth" not in row:
            return f"has no ground_truth (keys: {sorted(row)}). Take rows of dataset: {spec}."
        try:
            problem = call_isolated("reasoning_gym_truth", {**task, "row": _entry_fields(row)}, TRUTH_LIMIT_S)
        except Late:
            problem = f"cannot be scored within {TRUTH_LIMIT_S:g} s"
        return f"{problem}. Take rows of dataset: {spec}." if problem else None

    return LoadedReward(text, reward, check, limits_itself=True)


def score_entry(name: str, options: dict[str, Any], answer: str, row: dict[str, Any]) -> float:
    """In the worker: the scorer's number for an answer."""
    dataset, entry = _dataset(name, orjson.dumps(options)), _entry(row)
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # scorers parse a model's text in a hundred ways; one that cannot be parsed is no answer
        return 0.0


def entry_problem(name: str, options: dict[str, Any], row: dict[str, Any]) -> str | None:
    """In the worker: why a row cannot be scored; None = its true answer can."""
    dataset = _dataset(name, orjson.dumps(options))
    source = (row.get("metadata") or {}).get("source_dataset", name)
    if source != name:
        return f"is of the task {source!r}, not of {name!r}"
    try:
        entry = _entry(row)
        if entry["answer"] is not None:
            dataset.score_answer(str(entry["answer"]), entry)
    except Exception as error:
        return f"cannot be scored ({type(error).__name__}: {error})"
    return None


def _entry_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("question", "ground_truth", "metadata", "reasoning_gym") if key in row}


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    """The library's entry of a row: made again, as JSON turns tuples into lists, which some scorers tell apart."""
    source = row.get("reasoning_gym")
    if source is not None:
        entry: dict[str, Any] = _dataset(source["name"], orjson.dumps(source["options"]))[source["index"]]
        if entry["question"] == row.get("question"):
            return entry
    return {"question": row.get("question"), "answer": row["ground_truth"], "metadata": row.get("metadata") or {}}


@functools.lru_cache(maxsize=8)
def _dataset(name: str, options_json: bytes) -> Any:
    """The library's data set.

    Raises:
        ValueError: no such task or option, or a value that the task refuses.
    """
    import difflib

    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        raise ValueError(f"there is no task {name!r}. " + (f"Near: {', '.join(near)}" if near else "Correct the name"))
    options = orjson.loads(options_json)
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"there is no option {', '.join(unknown)}. Known: {', '.join(sorted(known))}")
    try:
        return create_dataset(name, **options)
    except Exception as error:  # the library checks with assertions and with whatever a wrong type leads to
        raise ValueError(f"options {options} are refused: {type(error).__name__} {error}".rstrip()) from error
