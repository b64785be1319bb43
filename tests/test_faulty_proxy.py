"""The faulty proxy itself: what it passes, and what it spoils."""

from __future__ import annotations

import httpx
import pytest

from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.rollouts.completions_server import CompletionsServer

BODY = {"prompt": [97], "seed": 1, "max_tokens": 9, "temperature": 1.0, "n": 1}


@pytest.fixture(scope="module")
def server():
    with CompletionsServer() as server:
        yield server


def ask(proxy, count=1, timeout=0.5):
    """What came of each request: its status, or the name of its error."""
    outcomes = []
    with httpx.Client(base_url=proxy.url, trust_env=False, timeout=timeout) as client:
        for _ in range(count):
            try:
                outcomes.append(str(client.post("/inference/v1/completions", json=BODY).status_code))
            except httpx.HTTPError as error:
                outcomes.append(type(error).__name__)
    return outcomes


def test_without_a_fault_the_answer_is_the_backends_own(server):
    with FaultyProxy(server.url, rate=0.0) as proxy:
        through = httpx.post(f"{proxy.url}/inference/v1/completions", json=BODY, trust_env=False).text
    direct = httpx.post(f"{server.url}/inference/v1/completions", json=BODY, trust_env=False).text
    assert through.partition("choices")[2] == direct.partition("choices")[2] != ""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_shows_as_what_it_is_and_is_counted(server, fault):
    before = len(server.bodies)
    with FaultyProxy(server.url, rate=1.0, faults=[fault]) as proxy:
        (outcome,) = ask(proxy)
        assert proxy.counts == {fault: 1}
    expected = {"reset": "ReadError", "lost": "ReadError", "cut": "RemoteProtocolError", "hang": "ReadTimeout"}
    assert outcome in (expected.get(fault, fault), "ReadError")
    assert len(server.bodies) - before == (1 if fault in ("lost", "cut") else 0)


def test_the_same_seed_gives_the_same_faults(server):
    def outcomes(seed):
        with FaultyProxy(server.url, rate=0.5, faults=["425", "503"], seed=seed) as proxy:
            return ask(proxy, 20)

    assert outcomes(1) == outcomes(1) != outcomes(2)
    assert {"425", "503", "200"} == set(outcomes(1))


def test_other_paths_are_left_alone(server):
    with FaultyProxy(server.url, rate=1.0, paths=["/hot_load"]) as proxy:
        assert ask(proxy, 3) == ["200"] * 3
        assert proxy.num_faults == 0
