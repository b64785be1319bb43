"""What a model name stands for, and which folders can be trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cookbook.errors import ModelError
from cookbook.models import context_length, list_models, resolve_model


def model_folder(path: Path, *files: str, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 512} | config))
    for file in files or ("model.safetensors",):
        (path / file).write_bytes(b"weights")
    return path


def test_a_name_a_resource_and_a_path_stand_for_the_same_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "models" / "mine")
    for name in ("mine", "accounts/local/models/mine", str(folder)):
        assert resolve_model(name, tmp_path / "models") == folder


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("here/model", tmp_path / "models") == folder


def test_a_catalogue_model_that_is_not_pulled_says_how_to_get_it(tmp_path: Path) -> None:
    for name in ("smollm2-135m-instruct", "accounts/local/models/smollm2-135m-instruct"):
        with pytest.raises(ModelError, match="Run `cookbook models pull smollm2-135m-instruct`"):
            resolve_model(name, tmp_path)


@pytest.mark.parametrize("name", ["smolm2", "", "accounts/local/models/none", "accounts/other/models/x", "a/b/c"])
def test_an_unknown_name_says_what_exists(tmp_path: Path, name: str) -> None:
    model_folder(tmp_path / "tuned-1")
    with pytest.raises(ModelError) as caught:
        resolve_model(name, tmp_path)
    assert "Models on this machine: tuned-1." in str(caught.value)
    assert "`cookbook models pull NAME`: smollm2-135m-instruct" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (("pytorch_model.bin",), r"has its weights only as pytorch_model\.bin: a pickle can run code"),
        (("readme.md",), r"has a config\.json but no \*\.safetensors file"),
        (("model.safetensors.index.json", "model-1.safetensors"), r"lacks model-2\.safetensors of its 2 weight files"),
    ],
)
def test_a_folder_without_complete_safetensors_is_refused(tmp_path: Path, files: tuple[str, ...], reason: str) -> None:
    folder = model_folder(tmp_path / "m", *files)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=reason):
        resolve_model(str(folder), tmp_path)


def test_a_sharded_model_is_accepted_when_all_shards_are_there(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "model-1.safetensors", "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert resolve_model(str(folder), tmp_path) == folder


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "smollm2-135m-instruct"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    with pytest.raises(ModelError, match="is a LoRA adapter of 'smollm2-135m-instruct'"):
        resolve_model("adapter", tmp_path)
    [listed] = list_models(tmp_path)
    assert listed.is_adapter


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"half":')
    with pytest.raises(ModelError, match=r"m/config\.json cannot be read"):
        resolve_model("m", tmp_path)
    (folder / "model.json").write_text("[]")
    with pytest.raises(ModelError, match=r"m/model\.json holds a list, not an object"):
        list_models(tmp_path)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 4096}}, 4096),
    ],
)
def test_context_length_is_read_where_models_keep_it(tmp_path: Path, config: dict[str, object], length: int) -> None:
    assert context_length(model_folder(tmp_path / "m", **config)) == length


def test_a_config_without_context_length_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not say the context length"):
        context_length(model_folder(tmp_path / "m", max_position_embeddings=None))


def test_models_are_listed_by_name_without_temporary_folders(tmp_path: Path) -> None:
    assert list_models(tmp_path / "absent") == []
    for name in ("b", "a", ".pull-xyz"):
        model_folder(tmp_path / name)
    (tmp_path / "not-a-model").mkdir()
    (tmp_path / "a" / "model.json").write_text('{"source": "accounts/local/x", "licence": "MIT"}')
    listed = list_models(tmp_path)
    assert [(model.name, model.source, model.licence) for model in listed] == [
        ("a", "accounts/local/x", "MIT"),
        ("b", "", ""),
    ]
    assert listed[1].size_bytes == len(b"weights") + len('{"max_position_embeddings": 512}')


def test_a_hub_that_cannot_be_reached_is_one_error(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from cookbook.errors import ModelError; from cookbook.models import resolve_model\n"
        f"try: resolve_model('someone/some-model', Path({str(tmp_path)!r}))\n"
        "except ModelError as error: print(error)"
    )
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "no model 'someone/some-model': it is not a folder, and the hub did not give it (" in done.stdout
    assert "`cookbook models pull NAME`: smollm2-135m-instruct" in done.stdout


def test_importing_models_and_data_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "gguf", "huggingface_hub", "rich")
    code = f"import cookbook.models, cookbook.data, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
