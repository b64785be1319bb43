"""Files that survive a crash: JSON replaced whole, JSON lines appended and synced, and short locks between processes.

Whoever reads one of these files sees the old state or the new one, never half of it. What the files mean is elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cookbook.errors import CheckpointError

__all__ = ["append_jsonl", "cut_torn_line", "file_lock", "read_json", "read_jsonl", "try_lock", "write_json"]
__all__ += ["append_whole", "replace_jsonl"]

_LOCK_POLL_S = 0.02

logger = logging.getLogger(__name__)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON: temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission), or `value` is not JSON.
    """
    _replace(path, _dump(path, value, indent=2) + "\n")


def replace_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines by these rows, as `write_json` replaces a value.

    Raises:
        CheckpointError: as for `write_json`; the old rows are kept.
    """
    _replace(path, "".join(_dump(path, row) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise _unwritable(path, error) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None when there is no such file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Restore it from a backup, or use a new folder.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object. Restore it from a backup.")
    return value


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row and wait until it is on the disk. A torn last line is cut first.

    A row that does not fit (disk full) leaves the file as it was.

    Raises:
        CheckpointError: the file cannot be written, or the row is not JSON (NaN and infinity are not).
    """
    line = (_dump(path, row) + "\n").encode()
    try:
        cut_torn_line(path)
        is_new = not path.exists()
        append_whole(path, line, is_synced=True)
        if is_new:
            _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def append_whole(path: Path, content: bytes, *, is_synced: bool = False) -> None:
    """Append all of it, or nothing: what does not fit leaves the file as it was.

    Raises:
        OSError: disk full or the like.
    """
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            _write_all(file.fileno(), content)
            if is_synced:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of JSON objects, oldest first; [] when there is no such file.

    A torn last line (no line end, and not a whole object: the writer died in the middle) is left out and logged; the
    next write cuts it.

    Raises:
        CheckpointError: any other line that is not a JSON object; the error names file and line.
    """
    whole, torn = _split(path)
    if torn:
        logger.warning("%s: the last line is torn (%d bytes) and left out: %r", path, len(torn), torn[:80])
    rows = []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _object(line)
        if row is None:
            raise CheckpointError(
                f"{path}, line {number} is not a JSON object: {line[:80]!r}. Nothing after it can be trusted: "
                "restore the file from a backup, or remove the line if you know what it was."
            )
        rows.append(row)
    return rows


def cut_torn_line(path: Path) -> int:
    """Cut a torn last line off a file of JSON lines, and log it. Only the file's one writer may call this.

    Returns:
        Bytes that were cut; 0 when the file was whole or absent.
    """
    whole, torn = _split(path)
    try:
        if torn:
            os.truncate(path, len(whole))
            logger.warning("%s: cut a torn last line of %d bytes: %r", path, len(torn), torn[:80])
        elif whole and not whole.endswith(b"\n"):
            with path.open("ab") as file:  # a whole row whose line end is missing
                file.write(b"\n")
    except OSError as error:
        raise _unwritable(path, error) from error
    return len(torn)


@contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made when absent) for the length of a with block.

    Raises:
        CheckpointError: the file cannot be opened, or another process has held it for `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise CheckpointError(
                f"{path} has been locked by another process for {timeout_s:g} s. Is that one hanging?"
            )
        time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Lock `path` (made when absent) without waiting: the open descriptor that holds the lock, or None.

    The lock ends with `os.close`, or with the process, however it dies.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(f"{path} cannot be locked: {error.strerror}. Use a file system with locks.") from error
    return descriptor


def _split(path: Path) -> tuple[bytes, bytes]:
    """The whole lines of a file, and its torn last line (b"" when there is none)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b"", b""
    except OSError as error:
        raise _unreadable(path, error) from error
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if not last or _object(last) is not None:
        return content, b""
    return content[:end], last


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _dump(path: Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot write {value!r:.200} as JSON: {error}.") from error


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error.strerror or error}. Free space or fix the permissions; "
        "what was there is kept."
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}.")
