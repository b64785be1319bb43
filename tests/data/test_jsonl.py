"""Reading JSON-lines files."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from pathlib import Path

import pytest

from cookbook.data import JsonlFile
from cookbook.errors import DataError


def written(folder: Path, content: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [b'{"n":0}\n{"n":1}\n{"n":2}\n', b'{"n":0}\n{"n":1}\n{"n":2}', b'{"n":0}\r\n{"n":1}\r\n{"n":2}\r\n\r\n \n\n'],
    ids=["plain", "no_last_newline", "crlf_and_blank_lines_at_the_end"],
)
def test_rows_are_the_same_by_ordinal_and_in_order(tmp_path: Path, content: bytes) -> None:
    file = JsonlFile.open(written(tmp_path, content))
    assert len(file) == 3
    assert [file[i] for i in (2, 0, 1)] == [{"n": 2}, {"n": 0}, {"n": 1}]
    assert list(file.rows()) == [(0, {"n": 0}), (1, {"n": 1}), (2, {"n": 2})]
    assert list(file.rows(stop=1)) == [(0, {"n": 0})]
    assert file.fingerprint == hashlib.sha256(content).hexdigest()


def test_rows_that_cross_read_chunks_are_whole(tmp_path: Path) -> None:
    rows = [b'{"n":%d,"pad":"%s"}\n' % (n, b"x" * 90) for n in range(100_000)]
    file = JsonlFile.open(written(tmp_path, b"".join(rows)))
    assert len(file) == 100_000
    assert all(row["n"] == ordinal for ordinal, row in file.rows() if not isinstance(row, DataError))
    assert [file[n]["n"] for n in range(0, 100_000, 997)] == list(range(0, 100_000, 997))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": 1', r"row 1 \(rows.jsonl, line 2\) is not JSON"),
        (b"[1]", r"row 1 \(rows.jsonl, line 2\) is an array, not an object"),
        (b"null", r"line 2\) is null, not an object"),
        (b"", r"row 1 \(rows.jsonl, line 2\) is blank"),
        (b"  ", r"line 2\) is blank"),
        (b'{"n": "\xff"}', r"line 2\) is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    file = JsonlFile.open(written(tmp_path, b'{"n":0}\n' + line + b'\n{"n":2}\n'))
    with pytest.raises(DataError, match=reason):
        file[1]
    rows = dict(file.rows())
    assert isinstance(rows[1], DataError)
    assert rows[2] == {"n": 2}


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="has no rows"):
        JsonlFile.open(written(tmp_path, content))


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        JsonlFile.open(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        JsonlFile.open(tmp_path)


def test_a_file_that_changes_in_use_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"n":0}\n{"n":1}\n')
    file = JsonlFile.open(path)
    path.write_bytes(b'{"n":7}\n{"n":8}\n{"n":9}\n')
    with pytest.raises(DataError, match="changed while it was in use"):
        file[0]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        file[0]


def test_a_million_rows_take_eight_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "million.jsonl"
    block = b"".join(b'{"n":%d,"pad":"%s"}\n' % (n, b"x" * 100) for n in range(1000))
    with path.open("wb") as out:
        for _ in range(1000):
            out.write(block)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        file = JsonlFile.open(path)
        after_open, peak_open = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert [file[n]["n"] for n in (0, 123_456, 999_999)] == [0, 456, 999]
        peak_read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file) == 1_000_000
    assert path.stat().st_size > 100e6
    assert after_open < 9e6
    assert peak_open < 40e6
    assert peak_read - after_open < 1e6
    assert time.perf_counter() - started < 10
