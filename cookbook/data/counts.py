"""Counts over all rows of a data file, kept on disk, and how errors name many rows. Who counts: dataset.py, rl.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cookbook.data.jsonl import JsonlFile
from cookbook.errors import DataError

__all__ = ["MAX_NAMED_ROWS", "PROGRESS_ROWS", "invalid_rows", "load_counts", "write_counts"]

MAX_NAMED_ROWS = 20
"""So many rows are named one by one in an error or report; the others are counted."""
PROGRESS_ROWS = 10_000

T = TypeVar("T", bound=np.generic)


def load_counts(path: Path, shape: tuple[int, ...], dtype: type[T]) -> NDArray[T] | None:
    """The array at `path`, mapped; None when there is no usable file of this shape and dtype."""
    try:
        counts: NDArray[T] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # absent, or damaged: it is only a cache
        return None
    return counts if counts.shape == shape and counts.dtype == dtype else None


def write_counts(path: Path, counts: NDArray[Any]) -> None:
    """Write the array whole or not at all.

    Raises:
        DataError: the folder cannot be written.
    """
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


def invalid_rows(file: JsonlFile, problems: list[str], num_problems: int, num_rows: int) -> str:
    """The text of an error about rows, of which the first problems are named."""
    more = num_problems - len(problems)
    lines = [f"{num_problems} of {num_rows} rows of {file.path} cannot be used:", *(f"  - {p}" for p in problems)]
    return "\n".join([*lines, f"  - and {more} more"] if more else lines)
