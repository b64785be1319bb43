"""A running backend and the name of its model, for tests that talk to it. The fixture is in tests/conftest.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cookbook import embedded

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
