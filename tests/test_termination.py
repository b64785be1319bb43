"""Work that an interrupt does not break off, and signals as the end of a block."""

import contextvars
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from cookbook.termination import Unbroken, ending_on_signals, is_interrupt, undisturbed


class Told(BaseException):
    """What a signal raises."""


@contextmanager
def told_after(seconds):
    """This thread is told to stop after some seconds, wherever it is."""

    def tell(*_):
        raise Told

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_was_begun_goes_on_to_its_end_when_the_wait_is_interrupted():
    go_on, done, work = threading.Event(), [], Unbroken()
    with told_after(0.05), pytest.raises(Told):
        work.call(lambda: (go_on.wait(5), done.append("stepped, and written down")))
    assert done == []
    assert not work.settle(0.01)
    go_on.set()
    assert work.settle(5)
    assert done == ["stepped, and written down"]


def test_its_result_its_error_and_the_callers_context_are_those_of_a_plain_call():
    variable = contextvars.ContextVar("variable")
    variable.set("the caller's")
    work = Unbroken()
    assert work.settle(0)
    assert work.call(variable.get) == "the caller's"
    with pytest.raises(ZeroDivisionError):
        work.call(lambda: 1 / 0)
    assert work.settle(0)


def test_wherever_the_interrupt_lands_the_work_is_done_whole_or_not_begun():
    landed, work = Counter(), Unbroken()
    work.call(lambda: None)
    for n in range(400):
        events = []
        try:
            with told_after(1e-5 + n * 5e-7):
                work.call(lambda events=events: events.extend(["begun", "done"]))
                time.sleep(0.001)
        except Told:
            landed[len(events)] += 1
        assert work.settle(5)
        assert events in ([], ["begun", "done"])
    assert landed.total() > 300
    work.close()


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), True), (SystemExit(143), True), (Told(), True), (ValueError(), False)]
)
def test_a_signal_is_told_from_an_error(error, told):
    assert is_interrupt(error) is told


def test_a_block_ends_on_signals_that_nobody_handles_and_leaves_the_others_alone():
    def theirs(*_):
        raise Told

    def tell_a_block():
        with ending_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            tell_a_block()
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGTERM, theirs)
        with pytest.raises(Told):
            tell_a_block()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_clean_up_is_not_broken_off():
    with undisturbed():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        time.sleep(0.01)


def test_outside_the_main_thread_signals_are_left_alone():
    def work():
        with ending_on_signals(), undisturbed():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
