"""A completions server, and what samples it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cookbook.config import ConcurrencyConfig, RetryConfig
from cookbook.rollouts.sampler import RolloutSampler
from tests.rollouts.completions_server import MODEL, CompletionsServer
from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUICK = RetryConfig(attempts=3, initial_delay_s=0.01, max_delay_s=0.02)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompletionsServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with CompletionsServer() as server:
        yield server


@pytest.fixture
def start_sampler(server: CompletionsServer) -> Iterator[Callable[..., RolloutSampler]]:
    """Starts samplers of the server; closes them."""
    started = []

    def start(url: str | None = None, *, window: int = 64, timeout_s: float = 20.0, retry: RetryConfig = QUICK):
        fixed = ConcurrencyConfig(mode="fixed", max_concurrency=window)
        started.append(RolloutSampler(url or server.url, MODEL, "key-of-the-test", None, fixed, 1, timeout_s, retry))
        return started[-1]

    yield start
    for sampler in started:
        sampler.close()


@pytest.fixture
def fast_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's pauses and ours for a hot load, shorter, and fewer for a hot load."""
    from fireworks.training.sdk import DeploymentSampler

    from cookbook.rollouts import sampler

    monkeypatch.setattr(DeploymentSampler, "_RETRY_BASE_BACKOFF_S", 0.01)
    monkeypatch.setattr(DeploymentSampler, "_RETRY_MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr(sampler, "_HOT_LOAD_POLL_S", 0.005)
    monkeypatch.setattr(sampler, "_HOT_LOAD_POLLS", 10)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from cookbook.models import load_tokenizer

    folder = make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "tiny")
    return load_tokenizer(str(folder), Path("/nonexistent"))
