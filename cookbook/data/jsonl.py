"""A JSON-lines file as rows that are read on demand: one pass finds where lines start, nothing else stays in memory.

What the rows mean is not known here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from cookbook.errors import DataError

__all__ = ["JsonlFile"]

_CHUNK_BYTES = 1 << 20
_NEWLINE = 10


@dataclass(frozen=True, eq=False)
class JsonlFile:
    """Rows of a JSON-lines file: `len(file)`, `file[ordinal]`, `for ordinal, row in file.rows()`.

    A row is one JSON object on one line. Blank lines are allowed at the end of the file only, so row `ordinal` is
    line `ordinal + 1`; elsewhere a blank line is an error that names it. Memory: 8 bytes a row.

    >>> file = JsonlFile.open(Path("train.jsonl"))  # doctest: +SKIP
    >>> file[17]["messages"]  # doctest: +SKIP
    """

    path: Path
    fingerprint: str
    """sha256 (hex) of the file's bytes."""
    offsets: NDArray[np.int64] = field(repr=False)
    """int64 (rows + 1,): where each row's line starts, in bytes, and where the last one ends."""
    stamp: tuple[int, int] = field(repr=False)
    """Size in bytes and modification time in ns when the file was indexed."""

    @classmethod
    def open(cls, path: str | Path) -> JsonlFile:
        """Index the file at `path`. Rows are not parsed yet.

        Raises:
            DataError: no such file, not readable, or no rows in it.
        """
        path = Path(path).expanduser().absolute()
        if path.is_dir():
            raise DataError(f"data file {path} is a folder. Give a file with one JSON object a line.")
        try:
            with path.open("rb") as file:
                stamp = _stamp(file)
                fingerprint, offsets = _index(file)
        except FileNotFoundError as error:
            raise DataError(f"data file {path} does not exist. Correct the path.") from error
        except OSError as error:
            raise DataError(f"data file {path} cannot be read: {error.strerror}. Make it readable.") from error
        if len(offsets) < 2:
            raise DataError(f"data file {path} has no rows ({stamp[0]} bytes). Write one JSON object a line.")
        return cls(path, fingerprint, offsets, stamp)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, ordinal: int) -> dict[str, Any]:
        """Row `ordinal`, 0-based.

        Raises:
            DataError: the line is not a JSON object, or the file changed since it was indexed.
        """
        if not 0 <= ordinal < len(self):
            raise IndexError(f"row {ordinal} of {len(self)}")
        start, end = int(self.offsets[ordinal]), int(self.offsets[ordinal + 1])
        with self._unchanged() as file:
            file.seek(start)
            return self._parse(ordinal, file.read(end - start))

    def rows(self, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        """Every row below `stop` (None = all) with its ordinal, in file order.

        A line that is not a JSON object comes as the error that `file[ordinal]` would raise, so that the caller can
        go on and name all of them.
        """
        count = len(self) if stop is None else min(stop, len(self))
        with self._unchanged() as file:
            for ordinal in range(count):
                line = file.readline()
                try:
                    yield ordinal, self._parse(ordinal, line)
                except DataError as error:
                    yield ordinal, error

    def where(self, ordinal: int) -> str:
        """How messages name a row."""
        return f"row {ordinal} ({self.path.name}, line {ordinal + 1})"

    def _parse(self, ordinal: int, line: bytes) -> dict[str, Any]:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                raise DataError(f"{self.where(ordinal)} is blank. Remove the line.") from None
            raise DataError(f"{self.where(ordinal)} is not JSON: {error}. Correct the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.where(ordinal)} is {_kind(row)}, not an object. Write {{...}} on every line.")
        return row

    def _unchanged(self) -> BinaryIO:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise DataError(f"data file {self.path} cannot be read any more: {error.strerror}. Restore it.") from error
        if _stamp(file) != self.stamp:
            file.close()
            raise DataError(f"data file {self.path} changed while it was in use. Restore it, or start a new run.")
        return file


def _stamp(file: BinaryIO) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def _index(file: BinaryIO) -> tuple[str, NDArray[np.int64]]:
    """sha256 of the file, and the offsets of its lines without the blank ones at the end."""
    digest = hashlib.sha256()
    parts = [np.zeros(1, np.int64)]
    position = 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        parts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + (position + 1))
        position += len(chunk)
    offsets = np.concatenate(parts)
    if offsets[-1] != position:  # the last line has no newline
        offsets = np.append(offsets, position)
    while len(offsets) > 1 and _is_blank(file, int(offsets[-2]), int(offsets[-1])):
        offsets = offsets[:-1]
    return digest.hexdigest(), offsets


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    return not file.read(end - start).strip()


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")
