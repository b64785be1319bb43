"""A save that is waited for in another thread while training goes on: what it holds, and what its failure does."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fireworks.training.sdk import AdamParams, TrainerJobManager

from cookbook.client import ReconnectableClient
from cookbook.data.datums import datum_from_row
from cookbook.errors import RequestRejected, TrainerLost
from tests.hostile import HeldSaves, HostileTrainer
from tests.running_backend import MODEL

ADAM = AdamParams(learning_rate=1e-2)


def rows(seed=0):
    return [datum_from_row([(seed + 7 * n + 3 * t) % 250 for t in range(6)], [0, 0, 1, 1, 1, 1]) for n in range(3)]


def step(client):
    return client.train_step(rows(client.step), "cross_entropy", ADAM).loss_sum


@pytest.fixture
def hostile():
    trainer = HostileTrainer()
    yield trainer
    trainer.close()


@pytest.fixture
def client(hostile):
    manager = TrainerJobManager(api_key="key", base_url=hostile.base_url)
    with ReconnectableClient(manager, "job", MODEL, default_timeout_s=20, state_timeout_s=20) as client:
        yield client
    manager.close()


@pytest.fixture
def saves(hostile, client):
    return HeldSaves(hostile)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_what_is_saved_is_what_was_trained_before_and_training_goes_on(manager, trainer):
    with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as client, ThreadPoolExecutor(1) as pool:
        step(client)
        client.save_state("client-at-once")
        pending = client.begin_save_state("client-pending")
        waiting = pool.submit(pending.result)
        after = [step(client) for _ in range(3)]
        assert (waiting.result(30), pending.result()) == ("client-pending", "client-pending")
        for name in ("client-at-once", "client-pending"):
            client.load_state_with_optimizer(name, step=1)
            assert [step(client) for _ in range(3)] == after
        path = client.resolve_checkpoint_path("client-pending", trainer)
        assert (client.saved_step(path), client.saved_step("client-pending")) == (1, 1)
        assert client.saved_step("never-saved") is None
        with pytest.raises(RequestRejected, match=r"client-pending.*exists already"):
            client.begin_save_state("client-pending").result()
        step(client)


def test_steps_are_taken_while_a_save_is_under_way(client, saves, pool):
    pending = client.begin_save_state("a")
    waiting = pool.submit(pending.result)
    assert [step(client) for _ in range(2)] == [1.0, 1.0]
    assert (client.step, waiting.done()) == (2, False)
    saves.answer.set()
    assert waiting.result(10) == "saved"


def test_a_save_that_fails_in_the_background_ends_what_the_main_thread_waits_for(client, hostile, saves, pool):
    saves.result = {"error": "disk on fire", "category": "server"}
    waiting = pool.submit(client.begin_save_state("a").result)
    saves.never.add("save_weights-2")  # the session waits for this one before it ends
    client.begin_save_state("b")
    hostile.behave["forward_backward"] = hostile.hang
    training = pool.submit(step, client)
    assert saves.asked.wait(10)
    started = time.monotonic()
    saves.answer.set()
    for failed in (waiting, training):
        with pytest.raises(TrainerLost, match="disk on fire"):
            failed.result(10)
    assert time.monotonic() - started < 5
    assert client.is_lost
    with pytest.raises(TrainerLost, match=r"was not sent: trainer job is lost: save_state.*disk on fire"):
        step(client)


def test_a_save_that_is_refused_leaves_the_session_usable(client, saves):
    saves.result = {"error": "no room", "category": "user"}
    pending = client.begin_save_state("a")
    saves.answer.set()
    for _ in range(2):
        with pytest.raises(RequestRejected, match=r"save_state\('a'\) was refused.*no room"):
            pending.result()
    assert step(client) == 1.0


def test_a_late_save_loses_its_session_but_not_the_one_after_it(client, saves):
    first, second = client.begin_save_state("a"), client.begin_save_state("b")
    with pytest.raises(TrainerLost, match=r"save_state\('a'\) was not answered within 0.2 s"):
        first.result(0.2)
    assert client.is_lost
    client.reconnect()
    with pytest.raises(TrainerLost, match="its session was given up"):
        second.result(10)
    assert not client.is_lost


def test_a_save_is_confirmed_although_its_session_was_lost_after_it(client, hostile, saves, pool):
    waiting = pool.submit(client.begin_save_state("a").result)
    hostile.results["optim_step-2"] = {"error": "out of memory", "category": "server"}
    with pytest.raises(TrainerLost, match="out of memory"):
        client.optim_step(ADAM)
    time.sleep(0.3)
    assert not waiting.done()
    saves.answer.set()
    assert waiting.result(10) == "saved"


def test_closing_ends_the_wait_for_a_save_at_once(client, saves, pool):
    waiting = pool.submit(client.begin_save_state("a").result)
    assert saves.asked.wait(10)
    client.close()
    with pytest.raises(TrainerLost, match="its session was given up: it was closed"):
        waiting.result(1)


def test_nothing_is_saved_in_the_middle_of_a_step(client, hostile, pool):
    hostile.behave["forward_backward"] = hostile.hang
    training = pool.submit(step, client)
    while "forward_backward" not in hostile.names():
        time.sleep(0.01)
    for save in (client.save_state, client.begin_save_state, client.save_weights_for_sampler_ext):
        with pytest.raises(RequestRejected, match="was not sent: train_step is under way"):
            save("a")
    assert "save_weights" not in hostile.names()
    client.close()
    with pytest.raises(TrainerLost):
        training.result(10)
