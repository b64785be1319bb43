"""The process that owns a run: which one it is, that it is told to stop once, and that nobody else is."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cookbook import stopping
from cookbook.errors import CheckpointError
from cookbook.files import write_json
from cookbook.run import RunDirectory
from cookbook.stopping import process_of

FLOW_RUN = "a-flow-run"

OWNER = """
import signal, sys, time
from pathlib import Path
from cookbook.run import RunDirectory
home, path = sys.argv[1:]
def told(*_):
    with open(path + ".told", "a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, told)
config = {"sigterm_grace_s": 1000.0}
run = RunDirectory.open(path, recipe="sft", config=config, home=Path(home), started_by="a-flow-run")
print("owned", flush=True)
while not Path(path + ".end").exists():
    time.sleep(0.05)
run.close()
time.sleep(0.5)
"""


class Owner:
    """A process that owns a run, counts how often it is told to stop, and ends when it is allowed to."""

    def __init__(self, folder):
        self.path = folder / "run"
        command = [sys.executable, "-c", OWNER, str(folder / "home"), str(self.path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        with self.process.stdout as output:
            assert output.readline() == b"owned\n"
        threading.Thread(target=self.process.wait, daemon=True).start()

    def told(self):
        """How often; a signal takes a moment to arrive."""
        time.sleep(0.2)
        note = Path(f"{self.path}.told")
        return len(note.read_text()) if note.exists() else 0

    def end(self):
        Path(f"{self.path}.end").touch()


@pytest.fixture
def owner(tmp_path):
    owner = Owner(tmp_path)
    yield owner
    owner.process.kill()
    owner.process.wait()


def age(path, seconds):
    """As if the process had been told so long ago."""
    told = json.loads((path / ".stop.json").read_text())
    past = datetime.now(UTC) - timedelta(seconds=seconds)
    write_json(path / ".stop.json", {**told, "time": past.isoformat(timespec="seconds")})


def test_only_the_process_of_this_flow_run_and_this_machine_is_found(owner, tmp_path):
    assert process_of(owner.path, FLOW_RUN).pid == owner.process.pid
    assert process_of(owner.path, "another-flow-run") is None
    lock = owner.path / ".lock"
    written = json.loads(lock.read_text())
    for unknown in (json.dumps({**written, "host": "elsewhere"}), ""):  # "": the lock taken, and not yet written
        lock.write_text(unknown)
        with pytest.raises(ProcessLookupError, match="on another machine"):
            process_of(owner.path, FLOW_RUN)
    with pytest.raises(ProcessLookupError, match="on another machine"):
        process_of(tmp_path / "nowhere", FLOW_RUN)
    RunDirectory.open(tmp_path / "dead", recipe="sft", config={}, home=tmp_path, started_by=FLOW_RUN).close()
    assert process_of(tmp_path / "dead", FLOW_RUN) is None


def test_of_all_who_tell_it_to_stop_at_once_one_does(owner):
    process = process_of(owner.path, FLOW_RUN)
    with ThreadPoolExecutor(8) as janitors:
        told = list(janitors.map(lambda _: process.tell_to_stop(), range(8)))
    assert sorted(told) == [*[False] * 7, True]
    assert owner.told() == 1


def test_it_is_told_again_only_when_its_grace_is_long_over(owner):
    """Whoever wrote down that it tells it may have been killed before it did."""
    process = process_of(owner.path, FLOW_RUN)
    assert process.tell_to_stop()
    age(owner.path, 1000 + stopping.TELL_AGAIN_S - 60)
    assert not process.tell_to_stop()
    assert owner.told() == 1
    age(owner.path, 1000 + stopping.TELL_AGAIN_S + 1)
    assert process.tell_to_stop()
    assert owner.told() == 2


def test_what_an_earlier_process_of_the_run_was_told_does_not_count(owner):
    process = process_of(owner.path, FLOW_RUN)
    earlier = {**process.owner, "started": "2026-01-01T00:00:00+00:00"}
    write_json(owner.path / ".stop.json", {"owner": earlier, "time": datetime.now(UTC).isoformat()})
    assert process.tell_to_stop()
    assert owner.told() == 1


def test_it_is_not_told_where_that_cannot_be_written_down(owner):
    (owner.path / ".stop.json").mkdir()
    with pytest.raises(CheckpointError):
        process_of(owner.path, FLOW_RUN).tell_to_stop()
    assert owner.told() == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="whose the lock is can be told on Linux only")
def test_a_process_that_does_not_hold_the_lock_is_not_told(owner):
    innocent, ended = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["true"])
    ended.wait()
    lock = owner.path / ".lock"
    written = json.loads(lock.read_text())
    try:
        for pid in (innocent.pid, ended.pid):
            lock.write_text(json.dumps({**written, "pid": pid}))
            with pytest.raises(ProcessLookupError, match=f"process {pid} of this machine does not hold"):
                process_of(owner.path, FLOW_RUN).tell_to_stop()
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()
    assert not (owner.path / ".stop.json").exists(), "it counts as told, and was not"
    lock.write_text(json.dumps(written))
    assert process_of(owner.path, FLOW_RUN).tell_to_stop()


def test_it_has_ended_when_it_has_let_go_of_its_run_and_is_gone(owner):
    process = process_of(owner.path, FLOW_RUN)
    assert not process.wait_until_ended(0.3)
    owner.end()
    assert process.wait_until_ended(10)
    assert owner.process.poll() == 0
    assert process_of(owner.path, FLOW_RUN) is None
    assert not process.tell_to_stop()
