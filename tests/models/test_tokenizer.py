"""Loading tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cookbook.errors import ModelError
from cookbook.models import load_tokenizer, tokenizer_fingerprint
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def copied(tiny: Path, folder: Path, **changes: object) -> Path:
    """The tokenizer files alone, with changes to tokenizer_config.json."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny / name).exists():
            shutil.copy(tiny / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_is_loaded_once_and_needs_no_weights(tiny: Path, tmp_path: Path) -> None:
    assert load_tokenizer("tiny", tiny.parent) is load_tokenizer(str(tiny), tmp_path)
    assert load_tokenizer(str(copied(tiny, tmp_path / "t")), tmp_path).encode("ab") == [97, 98]


def test_a_tokenizer_without_chat_template_is_an_error(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "t", chat_template=None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="has no chat template, so messages cannot be rendered"):
        load_tokenizer("t", tmp_path)


def test_a_folder_without_or_with_damaged_tokenizer_files_is_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match="has no tokenizer files"):
        load_tokenizer("none", tmp_path)
    folder = copied(tiny, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"half":')
    with pytest.raises(ModelError, match="damaged cannot be loaded"):
        load_tokenizer("damaged", tmp_path)


def test_the_fingerprint_changes_with_the_chat_template(tiny: Path, tmp_path: Path) -> None:
    same = load_tokenizer(str(copied(tiny, tmp_path / "same")), tmp_path)
    other_folder = copied(tiny, tmp_path / "other")
    (other_folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    other = load_tokenizer(str(other_folder), tmp_path)
    original = tokenizer_fingerprint(load_tokenizer(str(tiny), tmp_path))
    assert tokenizer_fingerprint(same) == original
    assert tokenizer_fingerprint(other) != original
