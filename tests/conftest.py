"""The one real backend of the test session, and trainers on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import httpx
import pytest
from fireworks.training.sdk import TrainerJobConfig, TrainerJobManager

from cookbook import embedded
from tests.running_backend import MODEL, WireBackend
from tests.tiny_model import make_tiny_model

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A run in the background ignores Ctrl-C, and so would all processes that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = ("flows", "faults", "wire")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders with tests of many seconds first, so that no worker waits long for the last file of another."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW)


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WireBackend]:
    """The backend, with the model `tiny`. Stopped, its trainers too, at the end of the session."""
    home = tmp_path_factory.mktemp("cookbook-home")
    make_tiny_model(home / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        patch.setenv("NO_PROXY", ",".join(filter(None, ["127.0.0.1", os.environ.get("NO_PROXY")])))
        running = WireBackend(embedded.ensure_running(home), home)
        yield running
    # Over HTTP and not with embedded.stop: that finds only a backend of the code as it is now.
    httpx.post(f"{running.base_url}/cookbook/v1/stop", headers={"X-Api-Key": running.api_key}, trust_env=False)
    embedded.stop(home)  # of the present code; waits until its processes have ended


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
