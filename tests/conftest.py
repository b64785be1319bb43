"""The one real backend of the test session, and trainers on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fireworks.training.sdk import TrainerJobConfig, TrainerJobManager

from tests.wire.conftest import MODEL, WireBackend, backend

__all__ = ["backend"]


@pytest.fixture(scope="session")
def manager(backend: WireBackend) -> Iterator[TrainerJobManager]:
    """The SDK's control-plane client of the backend."""
    with TrainerJobManager(api_key=backend.api_key, base_url=backend.base_url) as manager:
        yield manager


@pytest.fixture(scope="session")
def start_trainer(manager: TrainerJobManager) -> Callable[..., str]:
    """Starts a trainer of the tiny model and returns its job id when it is ready."""

    def start(job_id: str, lora_rank: int = 4) -> str:
        config = TrainerJobConfig(
            base_model=MODEL,
            lora_rank=lora_rank,
            requested_job_id=job_id,
            extra_args=["--compute-dtype=float32", "--threads=1"],
        )
        return str(manager.create_and_wait(config, poll_interval_s=0.1).job_id)

    return start


@pytest.fixture(scope="session")
def trainer(start_trainer: Callable[..., str]) -> str:
    """A LoRA trainer that many tests share, each with sessions of its own."""
    return start_trainer("shared-lora")
