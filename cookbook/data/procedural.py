"""First tasks with answers that can be checked: adding two numbers (SFT), finding the largest of four (RL, pairs).

Made here in a few lines, so that held-out problems never occur in training, in any order of their numbers: what rises
there is ability. A model of 135 million parameters learns each within minutes on two cores.

Reinforcement learning needs right answers to begin with: asked freely at temperature 1, that model hardly ever adds two
such numbers rightly, but it names the largest of four in about one answer of ten. Picking any of the four, which is all
that the form of an answer asks for, is right in 25%.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from cookbook.errors import DataError

__all__ = ["NUM_PROBLEMS", "NUM_RL_PROBLEMS", "make_preference_task", "make_rl_task", "make_task"]

_LOW, _HIGH = 10, 99
_PAIRS = [(larger, smaller) for larger in range(_LOW, _HIGH + 1) for smaller in range(_LOW, larger + 1)]
NUM_PROBLEMS = len(_PAIRS)
"""4,095: the unordered pairs of the numbers 10 to 99."""
_CHOICES = 4
NUM_RL_PROBLEMS = math.comb(_HIGH - _LOW + 1, _CHOICES)
"""2,555,190: the sets of four different numbers from 10 to 99."""


def make_task(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> tuple[Path, Path]:
    """Write `folder`/train.jsonl and `folder`/held_out.jsonl and return their paths.

    Rows are SFT rows of one question and one answer, the number alone. No problem is in both files. The same arguments
    give the same bytes.

    Raises:
        DataError: a count is not positive, more problems are asked for than there are, or the folder cannot be written.
    """

    def make_rows(count: int, generator: random.Random) -> list[dict[str, object]]:
        pairs = generator.sample(_PAIRS, count)
        return [_sum_row(*generator.sample(pair, 2)) for pair in pairs]

    names = ("train.jsonl", "held_out.jsonl")
    return _write_both(folder, names, make_rows, NUM_PROBLEMS, (num_train, num_held_out), seed)


def make_rl_task(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> tuple[Path, Path]:
    """Write `folder`/rl_train.jsonl and `folder`/rl_held_out.jsonl and return their paths.

    Rows are RL rows, for the reward `numeric`: a question, and the number that answers it as `ground_truth`. No problem
    is in both files. The same arguments give the same bytes.

    Raises:
        DataError: as `make_task`.
    """

    def make_rows(count: int, generator: random.Random) -> list[dict[str, object]]:
        problems = _choices(count, generator)
        return [_largest_row(generator.sample(sorted(numbers), _CHOICES)) for numbers in problems]

    names = ("rl_train.jsonl", "rl_held_out.jsonl")
    return _write_both(folder, names, make_rows, NUM_RL_PROBLEMS, (num_train, num_held_out), seed)


def make_preference_task(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> tuple[Path, Path]:
    """Write `folder`/preference_train.jsonl and `folder`/preference_held_out.jsonl and return their paths.

    Rows are pairs of answers to the question of `make_rl_task`, here for a short sentence: the chosen one names the
    largest number, the rejected one another of the four, both in the words that SmolLM2 uses by itself. (Of answers
    that it hardly ever gives DPO lowers both probabilities, and what the model says by itself falls apart.)
    No problem is in both files, nor in those that `make_rl_task` writes from the same arguments, so that a model can be
    trained on one and then on the other. The same arguments give the same bytes.

    Raises:
        DataError: as `make_task`.
    """

    def make_rows(count: int, generator: random.Random) -> list[dict[str, object]]:
        problems = _choices(2 * count, generator)[count:]  # the first half are those of make_rl_task
        return [_preference_row(generator.sample(sorted(numbers), _CHOICES), generator) for numbers in problems]

    names = ("preference_train.jsonl", "preference_held_out.jsonl")
    return _write_both(folder, names, make_rows, NUM_RL_PROBLEMS // 2, (num_train, num_held_out), seed)


def _choices(count: int, generator: random.Random) -> list[frozenset[int]]:
    """So many different sets of four numbers; a larger count goes on where a smaller one ends."""
    problems: dict[frozenset[int], None] = {}  # a set that keeps its order
    while len(problems) < count:
        problems[frozenset(generator.sample(range(_LOW, _HIGH + 1), _CHOICES))] = None
    return list(problems)


def _write_both(
    folder: Path,
    names: tuple[str, str],
    make_rows: Callable[[int, random.Random], list[dict[str, object]]],
    num_problems: int,
    counts: tuple[int, int],
    seed: int,
) -> tuple[Path, Path]:
    num_train, num_held_out = counts
    if num_train < 1 or num_held_out < 1 or num_train + num_held_out > num_problems:
        raise DataError(
            f"num_train={num_train} and num_held_out={num_held_out} cannot be had: there are {num_problems:,} problems "
            "for both. Ask for at least one of each and for fewer in all."
        )
    rows = make_rows(num_train + num_held_out, random.Random(seed))
    train, held_out = folder / names[0], folder / names[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(train, rows[:num_train])
        _write(held_out, rows[num_train:])
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Choose a folder that can.") from error
    return train, held_out


def _sum_row(left: int, right: int) -> dict[str, object]:
    prompt = f"What is {left} + {right}? Answer with the number only."
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(left + right)}]}


def _largest_row(numbers: Sequence[int]) -> dict[str, object]:
    question = _largest_question(numbers) + " Answer with the number only."
    return {"messages": [{"role": "user", "content": question}], "ground_truth": str(max(numbers))}


def _largest_question(numbers: Sequence[int]) -> str:
    return f"Numbers: {', '.join(map(str, numbers))}. Which one is the largest?"


def _preference_row(numbers: Sequence[int], generator: random.Random) -> dict[str, object]:
    right = max(numbers)
    wrong = generator.choice([number for number in numbers if number != right])
    question = {"role": "user", "content": _largest_question(numbers) + " Answer in one short sentence."}

    def answered(number: int) -> dict[str, object]:
        return {"messages": [question, {"role": "assistant", "content": f"The largest number is {number}."}]}

    return {"chosen": answered(right), "rejected": answered(wrong)}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
