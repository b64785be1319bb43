"""Files that survive a crash. The disk that is full is a real one: a limit on the file size of a child process."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from cookbook.errors import CheckpointError
from cookbook.files import append_jsonl, cut_torn_line, file_lock, read_json, read_jsonl, try_lock, write_json


def test_rows_come_back_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    for n in range(3):
        append_jsonl(path, {"n": n, "text": "a\nb \u00e9"})
    assert read_jsonl(path) == [{"n": n, "text": "a\nb \u00e9"} for n in range(3)]


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []
    assert read_json(tmp_path / "none.json") is None
    assert cut_torn_line(tmp_path / "none.jsonl") == 0


@pytest.mark.parametrize("torn", [b'{"n": 2, "te', b"{", b"\x00\x00\x00", b'{"n": "\xff'])
def test_a_torn_last_line_is_left_out_then_cut_by_the_next_write(tmp_path, caplog, torn):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"n": 1})
    with path.open("ab") as file:
        file.write(torn)
    assert read_jsonl(path) == [{"n": 1}]
    assert "torn" in caplog.text
    assert str(path) in caplog.text
    append_jsonl(path, {"n": 2})
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'


def test_a_whole_last_line_without_line_end_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}]
    append_jsonl(path, {"n": 3})
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize("bad", [b"not json", b"[1, 2]", b"\x00\x00"])
def test_a_bad_line_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + bad + b'\n{"n": 3}\n')
    with pytest.raises(CheckpointError, match=r"rows\.jsonl, line 2 "):
        read_jsonl(path)


def test_a_bad_last_line_with_a_line_end_is_not_torn(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_jsonl(path)


def test_what_is_not_json_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"n": 1})
    with pytest.raises(CheckpointError, match=r"rows\.jsonl"):
        append_jsonl(path, {"n": float("nan")})
    with pytest.raises(CheckpointError, match="object"):
        write_json(tmp_path / "x.json", {"n": object()})
    assert read_jsonl(path) == [{"n": 1}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def run_python(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options)


def allow_only_64_bytes():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))


def test_a_full_disk_keeps_what_was_there(tmp_path):
    rows, state = tmp_path / "rows.jsonl", tmp_path / "state.json"
    append_jsonl(rows, {"n": 1})
    write_json(state, {"n": 1})
    code = """
import sys
from pathlib import Path
from cookbook.errors import CheckpointError
from cookbook.files import append_jsonl, write_json
for write, path in ((append_jsonl, sys.argv[1]), (write_json, sys.argv[2])):
    try:
        write(Path(path), {"text": "x" * 200})
    except CheckpointError as error:
        print(error)
"""
    done = run_python(code, rows, state, preexec_fn=allow_only_64_bytes)
    first, second = done.stdout.splitlines()
    assert str(rows) in first
    assert f"{state} cannot be written" in second
    assert rows.read_bytes() == b'{"n": 1}\n'
    assert read_json(state) == {"n": 1}
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "state.json"]


def test_a_file_where_a_folder_should_be_is_an_error_with_the_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x\.json cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(CheckpointError, match=r"file/x\.jsonl cannot be"):
        append_jsonl(tmp_path / "file" / "x.jsonl", {})


def test_json_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"x\.json is damaged"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_json(path)


def test_readers_never_see_half_of_a_replaced_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"n": 0, "pad": "x" * 100_000})
    code = """
import sys
from pathlib import Path
from cookbook.files import write_json
for n in range(60):
    write_json(Path(sys.argv[1]), {"n": n, "pad": "x" * 100_000})
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while writer.poll() is None:
        assert len(json.loads(path.read_bytes())["pad"]) == 100_000
        time.sleep(0.001)
    assert writer.returncode == 0


def test_a_lock_excludes_until_its_process_is_killed(tmp_path):
    path = tmp_path / "lock"
    code = """
import sys, time
from pathlib import Path
from cookbook.files import try_lock
assert try_lock(Path(sys.argv[1])) is not None
print("locked", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    assert try_lock(path) is None
    with pytest.raises(CheckpointError, match=r"locked by another process for 0\.1 s"), file_lock(path, 0.1):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with file_lock(path, 1):
        assert try_lock(path) is None
    os.close(try_lock(path))
