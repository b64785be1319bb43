"""What a run shows on its page is sent beside training, not in its way."""

import threading
import time

from tasks.page import Poster


def test_nothing_waits_for_a_server_that_does_not_answer():
    poster, answers = Poster(), threading.Event()
    began = time.monotonic()
    poster.post("progress", answers.wait)
    poster.post("table", lambda: None)
    assert not poster.settle(0.05)
    assert time.monotonic() - began < 1
    answers.set()
    assert poster.settle(5)


def test_of_what_waits_only_the_newest_of_each_key_is_sent():
    poster, answers, sent = Poster(), threading.Event(), []
    poster.post("first", answers.wait)
    while poster._waiting:
        time.sleep(0.001)
    for step in range(5):
        poster.post("progress", lambda step=step: sent.append(step))
    poster.post("table", lambda: sent.append("table"))
    answers.set()
    assert poster.settle(5)
    assert sent == [4, "table"]


def test_what_cannot_be_sent_is_logged_and_the_next_is_sent(caplog):
    poster, sent = Poster(), []
    poster.post("progress", lambda: 1 / 0)
    poster.post("table", lambda: sent.append("table"))
    assert poster.settle(5)
    assert sent == ["table"]
    assert "progress is not shown on the run's page: division by zero" in caplog.text
