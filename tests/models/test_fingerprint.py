"""A model's fingerprint follows what it computes, not where it is or what is beside its weights."""

import shutil

import pytest

from cookbook.config import DPOConfig
from cookbook.errors import ModelError
from cookbook.models.fingerprint import model_fingerprint, reference_fingerprint, served_fingerprint
from tests.tiny_model import make_tiny_adapter, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def fingerprint(folder):
    return model_fingerprint("embedded", folder.name, folder.parent)


def test_changed_weights_at_the_same_path_are_another_model(tmp_path):
    folder = tmp_path / "tiny"
    before = fingerprint(make_tiny_model(folder))
    assert len(before) == 64
    assert fingerprint(make_tiny_model(folder)) == before
    assert fingerprint(make_tiny_model(folder, seed=1)) != before


def test_a_copy_is_the_same_model_and_its_tokenizer_does_not_count(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text("{}")
    assert fingerprint(copy) == fingerprint(tiny) == model_fingerprint("embedded", str(copy), tmp_path / "none")
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert fingerprint(copy) != fingerprint(tiny)


def test_each_of_several_weight_files_counts(tiny, tmp_path):
    one = shutil.copytree(tiny, tmp_path / "one")
    shutil.copy(one / "model.safetensors", one / "more.safetensors")
    assert fingerprint(one) != fingerprint(tiny)


def test_an_adapter_is_another_model_with_other_weights_or_another_base(tmp_path):
    base = make_tiny_model(tmp_path / "base")

    def of(folder):
        return served_fingerprint("embedded", str(folder), tmp_path)

    assert of(base) == model_fingerprint("embedded", str(base), tmp_path)
    adapter = make_tiny_adapter(tmp_path / "adapter", base=base)
    before = of(adapter)
    assert before != of(base)
    assert of(shutil.copytree(adapter, tmp_path / "copy")) == before
    assert of(make_tiny_adapter(tmp_path / "other", base=base, seed=1)) != before
    make_tiny_model(base, seed=1)
    assert of(adapter) != before


def test_a_resource_of_the_service_is_its_own_fingerprint(tmp_path):
    name = "accounts/fireworks/models/qwen3-8b"
    assert model_fingerprint("fireworks", name, tmp_path) == name
    with pytest.raises(ModelError, match="no model 'none'"):
        model_fingerprint("embedded", "none", tmp_path)


def test_what_changes_the_references_numbers_changes_its_fingerprint(tiny):
    def of(infra=None, **fields):
        values = {"log_path": "unused", "base_model": "tiny", "dataset": "unused", "lora_rank": 4}
        return reference_fingerprint(DPOConfig(**{**values, **fields}, infra=infra or {}), tiny.parent)

    plain = of()
    assert of({"extra_args": ["--threads=2"]}) == plain == of(beta=0.5, learning_rate=1.0, lora_rank=8)
    assert of({"extra_args": ["--compute-dtype=float32"]}) != plain
    shaped = of({"training_shape_id": "shape-a"})
    assert shaped != plain
    own = of({"training_shape_id": "shape-a", "ref_training_shape_id": "shape-b"}, lora_rank=0)
    assert own != shaped == of({"training_shape_id": "shape-a"}, lora_rank=0)
    assert of(base_model=str(tiny)) == plain
