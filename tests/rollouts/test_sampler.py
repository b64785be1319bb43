"""RolloutSampler against a real HTTP server, with the real SDK between them."""

from __future__ import annotations

import asyncio
import threading

import pytest
from starlette.responses import JSONResponse

from cookbook.config import ConcurrencyConfig, RetryConfig
from cookbook.errors import SamplingError
from cookbook.rollouts.sampler import RolloutSampler, make_controller, served_version
from tests.faulty_proxy import FaultyProxy
from tests.rollouts.completions_server import END_OF_TURN, MODEL
from tests.rollouts.waiting import interrupt, wait_until, when

PROMPT = list(b"a prompt")


def complete(sampler, **options):
    return sampler.complete(PROMPT, **{"max_tokens": 20, "temperature": 1.0, "seed": 1} | options)


async def many(sampler, count):
    return await asyncio.gather(*[complete(sampler, seed=seed) for seed in range(count)])


def test_a_completion_comes_back_token_by_token_with_both_logprobs_and_its_version(server, start_sampler):
    server.answer, server.version = lambda body: "xyz", "step-3-ab"
    sampler = start_sampler()
    sampled = sampler.run(complete(sampler, temperature=0.5))
    assert sampled.tokens == (*b"xyz", END_OF_TURN)
    assert sampled.text == "xyz"
    assert sampled.finish_reason == "stop"
    assert sampled.version == "step-3-ab"
    assert len(sampled.rollout_logprobs) == 4
    assert sampled.sampling_logprobs == tuple(2 * value for value in sampled.rollout_logprobs)


def test_what_is_sent_draws_from_the_full_distribution_with_the_seed_and_the_cache_key(server, start_sampler):
    sampler = start_sampler()
    sampler.run(complete(sampler, seed=77, cache_key="row-5", stop=["\n"], temperature=0.7, max_tokens=9))
    (body,) = server.bodies
    expected = {"seed": 77, "prompt_cache_key": "row-5", "stop": ["\n"], "temperature": 0.7, "max_tokens": 9}
    expected |= {"top_p": 1.0, "top_k": 0, "n": 1, "logprobs": True, "raw_output": True, "prompt": PROMPT}
    assert {name: body[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("response_id", "version"),
    [
        ("cmpl-0af3.step-12-7f", "step-12-7f"),
        ("cmpl-0af3.", ""),
        ("cmpl-0af3.a.b", "a.b"),
        ("cmpl-0af3", "synced"),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", "synced"),
        (None, "synced"),
    ],
)
def test_the_version_is_the_one_of_the_id_or_else_the_one_that_was_synced(response_id, version):
    assert served_version(response_id, "synced") == version


def test_an_answer_without_a_version_has_the_one_that_was_synced(server, start_sampler):
    server.version = None
    sampler = start_sampler()
    assert sampler.run(complete(sampler, version="step-1")).version == "step-1"


def test_fixed_concurrency_is_exactly_so_many_in_flight(server, start_sampler):
    server.delay_s = lambda body: 0.02
    sampler = start_sampler(window=5)
    sampler.run(many(sampler, 40))
    assert server.most_in_flight == 5
    assert len(server.bodies) == 40


def test_more_than_256_can_be_in_flight(server, start_sampler):
    server.hold = lambda body: True
    sampler = start_sampler(window=300)
    when(lambda: server.in_flight >= 300, server.resume)
    sampler.run(many(sampler, 310))
    assert server.most_in_flight == 300


def test_the_adaptive_mode_keeps_to_its_window(server):
    server.delay_s = lambda body: 0.01
    config = ConcurrencyConfig(initial_window=3, max_window=4)
    with RolloutSampler(server.url, MODEL, "key", None, config, 1, 20.0, RetryConfig()) as sampler:
        sampler.run(many(sampler, 40))
        assert sampler.step_completed()["sampling/requests"] == 40
    assert server.most_in_flight in (3, 4)


def test_the_adaptive_window_starts_at_8_a_replica_and_keeps_to_its_bounds():
    config = ConcurrencyConfig(max_window=20, prefill_queue_target=0.25)
    assert make_controller(config, 2).window_size == 16
    assert make_controller(config, 3).window_size == 20
    assert make_controller(ConcurrencyConfig(initial_window=5), 2).window_size == 5


@pytest.mark.parametrize("fault", ["425", "429", "503", "reset", "lost", "cut", "stream-empty", "stream-error"])
@pytest.mark.usefixtures("fast_sdk")
def test_a_transient_failure_is_retried_with_the_same_seed_and_gives_the_same_tokens(server, start_sampler, fault):
    direct = start_sampler()
    expected = direct.run(many(direct, 12))
    with FaultyProxy.everywhere(server.url, fault, rate=0.5, seed=3, in_a_row=2) as proxy:
        sampler = start_sampler(proxy.url)
        got = sampler.run(many(sampler, 12))
        assert proxy.counts[fault] > 2
    assert got == expected


@pytest.mark.usefixtures("fast_sdk")
def test_a_hanging_request_is_given_up_after_the_read_timeout_and_retried(server, start_sampler):
    with FaultyProxy.everywhere(server.url, "hang", rate=0.5, seed=3, hang_s=3600.0) as proxy:
        sampler = start_sampler(proxy.url, timeout_s=0.3)
        assert len(sampler.run(many(sampler, 6))) == 6
        assert proxy.counts["hang"] > 0


@pytest.mark.parametrize(("status", "requests_each"), [(503, 7), (425, 11)])
@pytest.mark.usefixtures("fast_sdk")
def test_what_the_sdk_gives_up_on_is_tried_again_here_so_often_and_no_more(
    server, start_sampler, status, requests_each
):
    server.intercept = lambda body: JSONResponse({"error": {"message": "not today"}}, status)
    sampler = start_sampler()
    with pytest.raises(SamplingError, match=rf"row 9 .* 3 attempts.*{status}.*row stays"):
        sampler.run(complete(sampler, where="row 9"))
    assert len(server.bodies) == 3 * requests_each
    assert len({body["seed"] for body in server.bodies}) == 1


@pytest.mark.usefixtures("fast_sdk")
def test_the_deadline_of_the_retries_ends_them(server, start_sampler):
    server.intercept = lambda body: JSONResponse({}, 503)
    sampler = start_sampler(retry=RetryConfig(attempts=20, initial_delay_s=0.1, deadline_s=0.25))
    with pytest.raises(SamplingError, match=r": [1-9] attempts?,"):
        sampler.run(complete(sampler))


def test_a_refused_request_is_not_tried_again_and_the_error_says_why_without_the_key(server, start_sampler):
    server.intercept = lambda body: JSONResponse({"error": {"message": "prompt too long: 900 tokens"}}, 400)
    sampler = start_sampler()
    with pytest.raises(SamplingError, match=r"row 4.*HTTP 400.*prompt too long: 900") as raised:
        sampler.run(complete(sampler, where="row 4"))
    assert len(server.bodies) == 1
    assert "key-of-the-test" not in str(raised.value) + repr(sampler)


@pytest.mark.parametrize("name", ["logprob", "sampling_logprob"])
def test_an_answer_that_lacks_a_logprob_is_an_error_that_names_the_row(server, start_sampler, name):
    server.edit = lambda choice: choice["logprobs"]["content"][0].pop(name)
    sampler = start_sampler()
    with pytest.raises(SamplingError, match=rf"row 6: .*content\[\]\.{name}\."):
        sampler.run(complete(sampler, temperature=0.5, where="row 6"))


@pytest.mark.usefixtures("fast_sdk")
def test_an_answer_that_the_deployment_gave_up_on_is_asked_for_again(server, start_sampler):
    def abort_the_first(choice):
        if len(server.bodies) == 1:
            choice["finish_reason"] = "abort"

    server.edit = abort_the_first
    sampler = start_sampler()
    assert sampler.run(complete(sampler)).finish_reason == "stop"
    assert len(server.bodies) == 2


@pytest.mark.usefixtures("fast_sdk")
def test_a_deployment_that_never_tells_tokens_ends_the_run_and_is_not_taken_for_a_lost_one(server, start_sampler):
    server.edit = lambda choice: choice.pop("raw_output")
    sampler = start_sampler()
    with pytest.raises(SamplingError, match=r"3 attempts.*raw_output") as raised:
        sampler.run(complete(sampler))
    assert type(raised.value) is SamplingError


def test_a_cut_completion_ends_with_length(server, start_sampler):
    server.answer = lambda body: "0123456789"
    sampler = start_sampler()
    sampled = sampler.run(complete(sampler, max_tokens=4))
    assert (sampled.tokens, sampled.finish_reason) == (tuple(b"0123"), "length")


def test_ctrl_c_cancels_everything_in_flight(server, start_sampler):
    server.hold = lambda body: True
    sampler = start_sampler()
    when(lambda: server.in_flight == 8, interrupt)
    with pytest.raises(KeyboardInterrupt):
        sampler.run(many(sampler, 8))
    wait_until(lambda: server.hung_up == 8)
    assert server.in_flight == 0
    server.resume()
    assert sampler.run(complete(sampler)).tokens  # it is still usable


def test_a_run_that_is_late_is_cancelled(server, start_sampler):
    server.hold = lambda body: True
    sampler = start_sampler()
    with pytest.raises(SamplingError, match=r"not done within 0\.3 s"):
        sampler.run(many(sampler, 3), timeout_s=0.3)
    wait_until(lambda: server.hung_up == 3)


def test_closing_cancels_what_is_in_flight_and_a_closed_sampler_says_so(server, start_sampler):
    server.hold = lambda body: True
    sampler = start_sampler()
    failed = []

    def run():
        try:
            sampler.run(complete(sampler))
        except SamplingError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: server.in_flight == 1)
    sampler.close()
    thread.join(5)
    assert len(failed) == 1
    with pytest.raises(SamplingError, match="is closed"):
        sampler.run(complete(sampler))


@pytest.mark.usefixtures("fast_sdk")
def test_the_metrics_of_a_step_count_requests_failures_and_the_servers_queue(server, start_sampler):
    with FaultyProxy.everywhere(server.url, "503", rate=0.5, seed=3) as proxy:
        sampler = start_sampler(proxy.url)
        sampler.run(many(sampler, 6))
        metrics = sampler.step_completed()
        assert metrics["sampling/requests"] == 6
        assert metrics["sampling/failed_attempts"] == proxy.counts["503"]
        assert metrics["sampling/prefill_queue_s"] == pytest.approx(0.01)
    assert sampler.step_completed()["sampling/requests"] == 0
