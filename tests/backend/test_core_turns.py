"""Turns at the cores: one worker at a time, in alternation, and never for ever."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from cookbook.backend import core_turns
from cookbook.backend.core_turns import CoreTurns

CORES = len(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(CORES < 2, reason="one core has nothing to share")


def wide(folder):
    return CoreTurns(folder, threads=CORES)


def hold(folder, held, seconds):
    with wide(folder).turn():
        held.set()
        time.sleep(seconds)


def holder(folder, seconds):
    """A process that has the turn."""
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(folder, held, seconds), daemon=True)
    process.start()
    assert held.wait(30)
    return process


def test_a_worker_waits_until_the_other_has_finished(tmp_path):
    inside = []

    def work():
        for _ in range(3):
            with wide(tmp_path).turn():
                inside.append("in")
                time.sleep(0.02)
                inside.append("out")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == ["in", "out"] * 9


def test_one_that_waits_is_next_whoever_else_comes(tmp_path):
    order = []
    second = threading.Thread(target=lambda: take("second"))

    def take(name):
        with wide(tmp_path).turn():
            order.append(name)

    with wide(tmp_path).turn():
        second.start()
        time.sleep(0.1)  # the second is in the queue now
    take("first again")
    second.join()
    assert order == ["second", "first again"]


def test_the_turn_of_a_killed_worker_is_free(tmp_path):
    process = holder(tmp_path, 60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    with wide(tmp_path).turn():
        assert time.monotonic() - started < 5


def test_a_stopped_worker_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(core_turns, "_LONGEST_WAIT_S", 0.3)
    process = holder(tmp_path, 60)
    os.kill(process.pid, signal.SIGSTOP)
    worker = wide(tmp_path)
    started = time.monotonic()
    with worker.turn():
        assert 0.25 < time.monotonic() - started < 10
    started = time.monotonic()
    for _ in range(20):  # not 0.3 s each: it is known to be stopped
        with worker.turn():
            pass
    assert time.monotonic() - started < 3
    process.kill()
    process.join()
    monkeypatch.setattr(core_turns, "_LONGEST_WAIT_S", 60)
    with worker.turn():  # it was free once, so it is waited for again
        assert worker._wait_s == 60


def test_a_worker_that_leaves_cores_to_others_takes_no_turns(tmp_path):
    process = holder(tmp_path, 60)
    started = time.monotonic()
    with CoreTurns(tmp_path, threads=CORES // 2).turn():
        assert time.monotonic() - started < 5
    process.kill()


def test_a_folder_that_is_gone_ends_no_operation(tmp_path):
    with wide(tmp_path / "gone").turn():
        pass
