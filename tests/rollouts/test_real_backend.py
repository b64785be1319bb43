"""The collector and the self-test on a real deployment of the embedded backend, through a faulty network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fireworks.training.sdk import DeploymentConfig, DeploymentManager

from cookbook.client import ReconnectableClient
from cookbook.config import ConcurrencyConfig
from cookbook.rollouts.check import check_logprobs
from cookbook.rollouts.collect import RolloutCollector
from cookbook.rollouts.ledger import RowLedger
from cookbook.rollouts.sampler import RolloutSampler
from tests.faulty_proxy import FaultyProxy
from tests.rollouts.test_collect import QUICK, Rows, by_length, make_config
from tests.running_backend import MODEL, WireBackend

DEPLOYMENT = "rollouts-real"


@pytest.fixture(scope="module")
def deployment(backend: WireBackend) -> Iterator[str]:
    """A deployment of the tiny model."""
    with DeploymentManager(api_key=backend.api_key, base_url=backend.base_url) as manager:
        config = DeploymentConfig(
            deployment_id=DEPLOYMENT,
            base_model=MODEL,
            deployment_shape="accounts/local/deploymentShapes/cpu/versions/v1",
            extra_args=["--threads=1", "--compute-dtype=float32"],
        )
        manager.create_or_get(config)
        yield str(manager.wait_for_ready(DEPLOYMENT).inference_model)
        manager.delete(DEPLOYMENT)


def open_sampler(backend: WireBackend, model: str, window: int, url: str | None = None) -> RolloutSampler:
    fixed = ConcurrencyConfig(mode="fixed", max_concurrency=window)
    return RolloutSampler(url or backend.base_url, model, backend.api_key, None, fixed, 1, 30.0, QUICK)


@pytest.mark.usefixtures("fast_sdk")
def test_what_is_collected_depends_on_the_seed_and_not_on_the_network_or_the_load(backend, deployment):
    config = make_config(max_completion_tokens=12)

    def collect(window, url=None):
        with (
            open_sampler(backend, deployment, window, url) as sampler,
            RolloutCollector(sampler, Rows(6), by_length, config) as collector,
        ):
            return collector.collect(RowLedger(total=6), step=0, version="")

    alone = collect(1)
    with FaultyProxy.everywhere(backend.base_url, rate=0.3, path=".*/completions", seed=2) as proxy:
        together = collect(16, proxy.url)
        assert proxy.num_faults > 0
    assert [group.row for group in together.groups] == [group.row for group in alone.groups]
    for one, other in zip(alone.groups, together.groups, strict=True):
        assert one.version == other.version == ""
        for left, right in zip(one.completions, other.completions, strict=True):
            assert left.tokens == right.tokens
            assert left.rollout_logprobs == pytest.approx(right.rollout_logprobs, abs=1e-4)


def test_a_deployment_of_the_base_model_agrees_with_a_fresh_adapter(backend, deployment, manager, trainer):
    rows = [Rows(2).row(0), Rows(2).row(1)]
    with (
        ReconnectableClient(manager, trainer, MODEL, lora_rank=4) as client,
        open_sampler(backend, deployment, 4) as sampler,
    ):
        found = check_logprobs(sampler, client, rows, version="", limit=0.01, max_tokens=16)
    assert found.num_tokens > 30
    assert found.max < 1e-3
