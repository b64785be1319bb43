"""First tasks with answers that can be checked: adding two numbers of two digits (SFT), telling the larger one (RL).

Made here in a few lines rather than by a library of such tasks, which would bring a plotting stack along. A model of
135 million parameters that answers few of these learns most of them within minutes on two cores, and as held-out
problems never occur in training, in either order of the operands, what rises there is ability.

Reinforcement learning needs right answers to begin with: at temperature 1 that model adds two such numbers in 3% of its
answers, and tells the larger one in 16%, so that most groups of eight hold both right and wrong ones.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from cookbook.errors import DataError

__all__ = ["NUM_PROBLEMS", "NUM_RL_PROBLEMS", "make_rl_task", "make_task"]

_LOW, _HIGH = 10, 99
_PAIRS = [(larger, smaller) for larger in range(_LOW, _HIGH + 1) for smaller in range(_LOW, larger + 1)]
_UNEQUAL_PAIRS = [(larger, smaller) for larger, smaller in _PAIRS if larger != smaller]
NUM_PROBLEMS = len(_PAIRS)
"""4,095: the unordered pairs of the numbers 10 to 99."""
NUM_RL_PROBLEMS = len(_UNEQUAL_PAIRS)
"""4,005: those of two different numbers."""


def make_task(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> tuple[Path, Path]:
    """Write `folder`/train.jsonl and `folder`/held_out.jsonl and return their paths.

    Rows are SFT rows of one question and one answer, the number alone. No problem is in both files. The same arguments
    give the same bytes.

    Raises:
        DataError: a count is not positive, more problems are asked for than there are, or the folder cannot be written.
    """
    return _make(folder, ("train.jsonl", "held_out.jsonl"), _PAIRS, _sum_row, (num_train, num_held_out), seed)


def make_rl_task(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> tuple[Path, Path]:
    """Write `folder`/rl_train.jsonl and `folder`/rl_held_out.jsonl and return their paths.

    Rows are RL rows, for the reward `numeric`: a question, and the number that answers it as `ground_truth`. No problem
    is in both files. The same arguments give the same bytes.

    Raises:
        DataError: as `make_task`.
    """
    names = ("rl_train.jsonl", "rl_held_out.jsonl")
    return _make(folder, names, _UNEQUAL_PAIRS, _larger_row, (num_train, num_held_out), seed)


def _make(
    folder: Path,
    names: tuple[str, str],
    pairs: Sequence[tuple[int, int]],
    make_row: Callable[[int, int], dict[str, object]],
    counts: tuple[int, int],
    seed: int,
) -> tuple[Path, Path]:
    num_train, num_held_out = counts
    if num_train < 1 or num_held_out < 1 or num_train + num_held_out > len(pairs):
        raise DataError(
            f"num_train={num_train} and num_held_out={num_held_out} cannot be had: there are {len(pairs):,} problems "
            "for both. Ask for at least one of each and for fewer in all."
        )
    generator = random.Random(seed)
    chosen = generator.sample(pairs, num_train + num_held_out)
    rows = [make_row(*generator.sample(pair, 2)) for pair in chosen]
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


def _larger_row(left: int, right: int) -> dict[str, object]:
    prompt = f"Which number is larger, {left} or {right}? Answer with the number only."
    return {"messages": [{"role": "user", "content": prompt}], "ground_truth": str(max(left, right))}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
