"""A first task with answers that can be checked: adding two numbers of two digits.

Made here in a few lines rather than by a library of such tasks, which would bring a plotting stack along. A model of
135 million parameters that answers few of these learns most of them within minutes on two cores, and as held-out
problems never occur in training, in either order of the operands, what rises there is ability.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import orjson

from cookbook.errors import DataError

__all__ = ["NUM_PROBLEMS", "make_task"]

_LOW, _HIGH = 10, 99
_PAIRS = [(larger, smaller) for larger in range(_LOW, _HIGH + 1) for smaller in range(_LOW, larger + 1)]
NUM_PROBLEMS = len(_PAIRS)
"""4,095: the unordered pairs of the numbers 10 to 99."""


def make_task(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> tuple[Path, Path]:
    """Write `folder`/train.jsonl and `folder`/held_out.jsonl and return their paths.

    Rows are SFT rows of one question and one answer, the number alone. No problem is in both files. The same arguments
    give the same bytes.

    Raises:
        DataError: a count is not positive, more problems are asked for than there are, or the folder cannot be written.
    """
    if num_train < 1 or num_held_out < 1 or num_train + num_held_out > NUM_PROBLEMS:
        raise DataError(
            f"num_train={num_train} and num_held_out={num_held_out} cannot be had: there are {NUM_PROBLEMS:,} problems "
            "for both. Ask for at least one of each and for fewer in all."
        )
    generator = random.Random(seed)
    chosen = generator.sample(_PAIRS, num_train + num_held_out)
    rows = [_row(pair, generator) for pair in chosen]
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(train, rows[:num_train])
        _write(held_out, rows[num_train:])
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Choose a folder that can.") from error
    return train, held_out


def _row(pair: tuple[int, int], generator: random.Random) -> dict[str, object]:
    left, right = generator.sample(pair, 2)
    prompt = f"What is {left} + {right}? Answer with the number only."
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(left + right)}]}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
