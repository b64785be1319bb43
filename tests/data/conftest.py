"""The tiny model's tokenizer: one token a byte, so counts can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from cookbook.data import Renderer
from cookbook.models import load_tokenizer
from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return load_tokenizer(str(folder), folder.parent)


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer)


def chat(*contents: str) -> dict[str, list[dict[str, str]]]:
    """A row of user and assistant messages in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path
