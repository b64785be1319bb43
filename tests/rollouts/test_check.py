"""The self-test of a deployment, against the trainer of the real backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from cookbook.client import ReconnectableClient
from cookbook.data.rollout_datums import completion_logprobs, forward_datums
from cookbook.errors import LogprobMismatch, SamplingError
from cookbook.rollouts.check import agreement, check_logprobs
from cookbook.rollouts.records import PromptGroup
from tests.rollouts.groups import make_completion
from tests.running_backend import MODEL


@dataclass(frozen=True)
class Row:
    index: int
    messages: list = field(default_factory=list)
    fields: dict = field(default_factory=dict)

    @property
    def prompt_tokens(self):
        return list(f"prompt {self.index}".encode())


ROWS = [Row(0), Row(1)]


@pytest.fixture(scope="module")
def client(manager, trainer):
    with ReconnectableClient(manager, trainer, MODEL, lora_rank=4) as client:
        yield client


def answer_as(server, client, shift):
    """Let the server give the trainer's own logprobs of what it samples, changed by `shift`."""

    def edit(choice):
        tokens = choice["raw_output"]["completion_token_ids"]
        count = len(tokens)
        completion = make_completion(
            tokens=tuple(tokens),
            is_sampled=(True,) * count,
            rollout_logprobs=(0.0,) * count,
            sampling_logprobs=(0.0,) * count,
        )
        groups = [PromptGroup(0, 0, tuple(choice["raw_output"]["prompt_token_ids"]), (completion,))]
        output = client.forward(forward_datums(groups), "cross_entropy").loss_fn_outputs[0]["logprobs"].to_torch()
        for place, value in enumerate(completion_logprobs(groups, [output])[0]):
            choice["logprobs"]["content"][place]["logprob"] = shift(place, value)

    server.edit = edit


def check(sampler, client, **options):
    return check_logprobs(sampler, client, ROWS, **{"version": "", "limit": 0.5, "completions": 1} | options)


def test_a_sampler_that_agrees_with_the_trainer_passes(server, start_sampler, client):
    answer_as(server, client, lambda place, value: value)
    found = check(start_sampler(window=1), client)
    assert found.num_tokens >= 4
    assert found.max < 1e-4
    assert found.outside == 0.0


def test_a_sampler_whose_logprobs_are_shifted_by_one_token_stops_the_run(server, start_sampler, client):
    answer_as(server, client, lambda place, value: value - 0.7 * (place % 2))
    with pytest.raises(LogprobMismatch, match=r"more than 0\.7 nats in 1% .* logprob_check_limit=0\.5"):
        check(start_sampler(window=1), client)


def test_another_version_is_no_basis_for_a_check(server, start_sampler, client):
    server.version = "step-2"
    with pytest.raises(SamplingError, match="serves 'step-2', but 'step-3' is synced"):
        check(start_sampler(), client, version="step-3")


def test_agreement_is_counted_over_the_tokens():
    found = agreement([-1.0] * 100, [-1.0] * 97 + [-1.2, -1.05, -3.0])
    assert (found.num_tokens, found.p50) == (100, 0.0)
    assert found.p99 == pytest.approx(2.0)  # the worst of 100
    assert found.max == pytest.approx(2.0)
    assert found.outside == pytest.approx(0.02)
    assert set(found.metrics()) == {f"logprob_check/{name}" for name in ("p50", "p99", "max", "ratio_outside")}


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_logprob_that_is_not_finite_is_infinitely_apart(broken):
    assert agreement([-1.0, broken], [-1.0, broken]).max == math.inf
    assert agreement([-1.0, broken], [-1.0, -1.0]).outside == 0.5
