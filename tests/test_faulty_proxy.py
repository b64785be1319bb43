"""The faulty proxy itself: what it passes, what it spoils, and that the table of faults is within the wire protocol."""

from __future__ import annotations

import itertools
from collections import Counter

import httpx
import pytest

from tests.faults.proxy_table import LEGAL_FAULTS
from tests.faulty_proxy import FAULTS, Endpoint, FaultyProxy, Legal
from tests.rollouts.completions_server import CompletionsServer

BODY = {"prompt": [97], "seed": 1, "max_tokens": 9, "temperature": 1.0, "n": 1}
FUTURE = {"request_id": "r", "allow_metadata_only": True}
ASKED_TWICE = {"twice"}
ASKED_ONCE = {"lost", "cut", "slow", "504-done", "metadata"}


@pytest.fixture(scope="module")
def server():
    with CompletionsServer() as server:
        yield server


def ask(proxy, count=1, timeout=0.5, body=BODY):
    """What came of each request: its status, or the name of its error."""
    outcomes = []
    with httpx.Client(base_url=proxy.url, trust_env=False, timeout=timeout) as client:
        for _ in range(count):
            try:
                outcomes.append(str(client.post("/inference/v1/completions", json=body).status_code))
            except httpx.HTTPError as error:
                outcomes.append(type(error).__name__)
    return outcomes


def endpoint(*faults, rate=1.0, in_a_row=None, key=None):
    legal = tuple(Legal(fault, "", weight) for fault, weight in faults)
    return Endpoint("completions", "POST", ".*/completions", legal, rate, in_a_row, key)


def test_without_a_fault_the_answer_is_the_backends_own(server):
    with FaultyProxy(server.url, []) as proxy:
        through = httpx.post(f"{proxy.url}/inference/v1/completions", json=BODY, trust_env=False).text
        assert (proxy.num_faults, proxy.passed) == (0, {"unknown": 1})
    direct = httpx.post(f"{server.url}/inference/v1/completions", json=BODY, trust_env=False).text
    assert through.partition("choices")[2] == direct.partition("choices")[2] != ""


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"unfinished"}))
def test_each_fault_shows_as_what_it_is_and_is_counted(server, fault):
    before = len(server.bodies)
    with FaultyProxy.everywhere(server.url, fault, rate=1.0, hang_s=5.0, slow_s=0.1) as proxy:
        (outcome,) = ask(proxy, body=BODY | FUTURE)
        assert proxy.counts == {fault: 1}
    expected = {"reset": "ReadError", "lost": "ReadError", "cut": "RemoteProtocolError", "hang": "ReadTimeout"}
    status = fault[:3] if fault[:3].isdigit() else "200"
    assert outcome in (expected.get(fault, status), "ReadError")
    assert len(server.bodies) - before == 2 * (fault in ASKED_TWICE) + (fault in ASKED_ONCE)


def test_the_same_seed_gives_the_same_faults(server):
    def outcomes(seed):
        with FaultyProxy.everywhere(server.url, "425", "503", rate=0.5, seed=seed) as proxy:
            return ask(proxy, 20)

    assert outcomes(1) == outcomes(1) != outcomes(2)
    assert {"425", "503", "200"} == set(outcomes(1))


def test_every_fault_of_an_endpoint_comes_up_as_often_as_its_weight_says(server):
    with FaultyProxy(server.url, [endpoint(("425", 3), ("503", 1), ("429", 1))]) as proxy:
        ask(proxy, 10)
        assert proxy.counts == {"425": 6, "503": 2, "429": 2}


def test_a_logical_request_meets_a_bounded_number_of_faults(server):
    with FaultyProxy(server.url, [endpoint(("503", 1), in_a_row=3)]) as proxy:
        assert ask(proxy, 8) == (["503"] * 3 + ["200"]) * 2
        others = [ask(proxy, body=BODY | {"seed": seed}) for seed in range(4)]
        assert others == [["503"]] * 4  # each is one of its own


def test_other_paths_and_methods_are_left_alone(server):
    other = Endpoint("status", "GET", ".*/hot_load", (Legal("503"),), rate=1.0)
    with FaultyProxy(server.url, [other]) as proxy:
        assert ask(proxy, 3) == ["200"] * 3
        assert (proxy.num_faults, proxy.passed["unknown"]) == (0, 3)


def test_a_425_is_for_completions_only_and_each_fault_names_the_section_that_allows_it():
    for one in LEGAL_FAULTS:
        faults = Counter(legal.fault for legal in one.legal)
        assert max(faults.values()) == 1
        assert ("425" in faults) == (one.name == "completions")
        assert all(legal.section for legal in one.legal)
        assert one.in_a_row is not None
    with pytest.raises(AssertionError, match="unknown faults"):
        endpoint(("418", 1))


def test_no_request_is_two_endpoints():
    base = "/v1/accounts/local"
    paths = [
        "/v1/accounts",
        f"{base}/rlorTrainerJobs",
        f"{base}/rlorTrainerJobs/j",
        f"{base}/rlorTrainerJobs/j:resume",
        f"{base}/rlorTrainerJobs/j/checkpoints/c",
        f"{base}/deployments/d",
        "/training/v1/rlorTrainerJobs/local/j/api/v1/save_weights_for_sampler",
        "/hot_load/v1/models/hot_load",
    ]
    for method, path in itertools.product(("GET", "POST", "PATCH", "DELETE"), paths):
        assert len([one.name for one in LEGAL_FAULTS if one.matches(method, path)]) <= 1
