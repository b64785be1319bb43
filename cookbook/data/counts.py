"""Counts over all rows of a data file, kept on disk, and one error for all its invalid rows.

What is counted of a row: dataset.py, preferences.py, rl.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cookbook.data.jsonl import JsonlFile
from cookbook.errors import DataError

__all__ = ["MAX_NAMED_ROWS", "cached_counts"]

MAX_NAMED_ROWS = 20
"""So many rows are named one by one in an error or report; the others are counted."""
PROGRESS_ROWS = 10_000

T = TypeVar("T", bound=np.generic)


def cached_counts(
    path: Path,
    file: JsonlFile,
    count: Callable[[int, dict[str, Any]], Sequence[int]],
    shape: tuple[int, int],
    dtype: type[T],
    progress: Callable[[int, int], None] | None,
) -> NDArray[T]:
    """The array (numbers, rows) at `path`; without a usable one there, `count(ordinal, row)` of every row, kept there.

    `progress` gets (rows done, rows) every 10,000 rows while counting.

    Raises:
        DataError: `count` raised it for some rows (up to 20 are named, all are counted), or the folder of `path` cannot
            be written.
    """
    counts = _load(path, shape, dtype)
    if counts is None:
        counts = _count(file, count, shape, dtype, progress)
        _write(path, counts)
    return counts


def _count(
    file: JsonlFile,
    count: Callable[[int, dict[str, Any]], Sequence[int]],
    shape: tuple[int, int],
    dtype: type[T],
    progress: Callable[[int, int], None] | None,
) -> NDArray[T]:
    num_rows = shape[1]
    counts = np.zeros(shape, dtype)
    problems: list[str] = []
    num_problems = 0
    for ordinal, row in file.rows(num_rows):
        try:
            if isinstance(row, DataError):
                raise row
            counts[:, ordinal] = count(ordinal, row)
        except DataError as error:
            num_problems += 1
            if len(problems) < MAX_NAMED_ROWS:
                problems.append(str(error))
        if progress is not None and (ordinal + 1) % PROGRESS_ROWS == 0:
            progress(ordinal + 1, num_rows)
    if num_problems:
        raise DataError(_invalid_rows(file, problems, num_problems, num_rows))
    return counts


def _load(path: Path, shape: tuple[int, ...], dtype: type[T]) -> NDArray[T] | None:
    """The array at `path`, mapped; None when there is no usable file of this shape and dtype."""
    try:
        counts: NDArray[T] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # absent, or damaged: it is only a cache
        return None
    return counts if counts.shape == shape and counts.dtype == dtype else None


def _write(path: Path, counts: NDArray[Any]) -> None:
    """Write the array whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".rows-") as temporary:
            with (Path(temporary) / path.name).open("wb") as file:
                np.save(file, counts)
                file.flush()
                os.fsync(file.fileno())
            (Path(temporary) / path.name).replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}. Free space or make the folder writable."
        ) from error


def _invalid_rows(file: JsonlFile, problems: list[str], num_problems: int, num_rows: int) -> str:
    """The text of an error about rows, of which the first problems are named."""
    more = num_problems - len(problems)
    lines = [f"{num_problems} of {num_rows} rows of {file.path} cannot be used:", *(f"  - {p}" for p in problems)]
    return "\n".join([*lines, f"  - and {more} more"] if more else lines)
