"""One real backend for all wire tests, with a tiny random model, and the official SDK pointed at it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cookbook import embedded
from tests.tiny_model import make_tiny_model

MODEL = "accounts/local/models/tiny"
"""Base model of the wire tests: 2 layers, byte-level tokenizer, made for 512 tokens."""


@dataclass(frozen=True)
class WireBackend:
    """A running backend: where it answers, its key, and its home."""

    endpoint: embedded.Endpoint
    home: Path

    @property
    def base_url(self) -> str:
        return self.endpoint.base_url

    @property
    def api_key(self) -> str:
        return self.endpoint.api_key.get_secret_value()


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
