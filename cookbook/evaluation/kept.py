"""Lines of JSON that are kept as they come, with what they follow from: nobody pays twice, and nothing is mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import orjson

from cookbook.errors import CheckpointError, ConfigError, Problem
from cookbook.files import cut_torn_line, read_jsonl

__all__ = ["Guard", "KeptLines", "check_identity"]

Guard: TypeAlias = Callable[[], AbstractContextManager[None]]
"""What is held while a line is appended: `RunDirectory.guard`."""


class KeptLines:
    """A file of JSON objects, appended to one by one. Its first line says what the others follow from: the identity."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        guard: Guard = nullcontext,
    ) -> None:
        """Open the file, and read what is there.

        Args:
            identity: all that the lines follow from, as JSON data.
            guard: held while a line is appended.

        Raises:
            ConfigError: there are lines already, and they follow from something else. They stay as they are.
            CheckpointError: it is damaged, or cannot be written.
        """
        self._path = path
        self._guard = guard
        identity = json.loads(json.dumps(identity))
        header, *self.lines = read_jsonl(path) or [{}]
        if self.lines:
            check_identity(path, header.get("identity") or {}, identity)
        elif header and header.get("identity") != identity:
            path.unlink()  # nothing is lost with it
        cut_torn_line(path)
        self._file = path.open("ab")
        if self._file.tell() == 0:
            self.append({"identity": identity})

    def append(self, line: Mapping[str, Any]) -> None:
        """Keep a line. One that is lost in a crash is made again, so this does not wait for the disk.

        Raises:
            CheckpointError: the file cannot be written.
            LeaseLost: from the guard.
        """
        try:
            with self._guard():
                self._file.write(orjson.dumps(line) + b"\n")
                self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error.strerror}. Free space.") from error

    def close(self) -> None:
        """Close the file, when everything is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_identity(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that what is kept in `path` follows from what is wanted now; both as JSON data.

    Raises:
        ConfigError: it does not; names everything that differs.
    """
    problems = [
        Problem(name, f"is {_short(wanted.get(name))}, but {path} was made with {_short(kept.get(name))}.", "")
        for name in sorted(kept.keys() | wanted.keys())
        if kept.get(name) != wanted.get(name)
    ]
    if problems:
        remedy = "Use another one, or restore the above; to begin anew here, delete that file."
        raise ConfigError([*problems, Problem("log_path", "holds what belongs to other settings.", remedy)])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
