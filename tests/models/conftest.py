"""A package index in a folder, with one wheel that holds a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cookbook.models import CatalogueEntry
from tests.models.tiny_wheel import write_gguf, write_wheel
from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Published:
    """What is in the index: the wheel's entry, and the model it was made from."""

    entry: CatalogueEntry
    index: Path
    model: LlamaForCausalLM


def rounded_model(folder: Path, **options: object) -> LlamaForCausalLM:
    """A tiny model whose weights are bfloat16 values, so that converting it loses nothing."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(make_tiny_model(folder, **options), dtype=torch.bfloat16)
    return model.to(torch.float32).eval()


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    model = rounded_model(folder / "source")
    write_gguf(folder / "tiny.gguf", model)
    return Published(write_wheel(folder / "index", folder / "tiny.gguf"), folder / "index", model)


@pytest.fixture
def index(published: Published, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point pip at the folder and at nothing else, as a user's configuration would."""
    use_index(monkeypatch, published.index)
    return published.index


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
