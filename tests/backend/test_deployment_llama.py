"""The sampler's decoder against transformers, in float32 on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cookbook.backend.decoder import HuggingFaceDecoder
from cookbook.backend.deployment.cache import DecodeRows, Prompt
from cookbook.backend.deployment.llama import LlamaModel, PromptPiece
from cookbook.backend.trainer.export import write_model
from cookbook.backend.trainer.lora import LoraSettings, attach, write_adapter
from cookbook.errors import ModelError
from tests.tiny_model import make_tiny_model

TOKENS = tuple(int(t) for t in torch.randint(256, (40,), generator=torch.Generator().manual_seed(1)))
TOLERANCE = {"atol": 3e-5, "rtol": 1e-5}
SMALL = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def _logits(model: LlamaModel, tokens: tuple[int, ...] = TOKENS, num_prefill: int = 25, piece: int = 10) -> Tensor:
    """Float32 (T, V) logits: the first tokens prefilled in pieces, the others decoded one by one beside another row."""
    with torch.inference_mode():
        prompt = Prompt.blank(tokens[:num_prefill], model.cache_shape)
        hidden = []
        while prompt.filled < num_prefill:
            hidden.append(model.prefill([PromptPiece(prompt, min(piece, num_prefill - prompt.filled))]))
        other = Prompt.blank(tokens[:7], model.cache_shape)
        model.prefill([PromptPiece(other, 7)])
        rows = DecodeRows(model.cache_shape, 4, 2**30)
        rows.append(other, 64)
        rows.append(prompt, 64)
        for step, token in enumerate(tokens[num_prefill:]):
            positions = torch.tensor([7 + step, num_prefill + step])
            hidden.append(model.decode(torch.tensor([tokens[7 + step], token]), positions, rows)[1:])
        return model.logits(torch.cat(hidden))[:, : model.vocab_size]


@torch.no_grad()
def _expected(folder: Path, tokens: tuple[int, ...] = TOKENS) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_logits_are_those_of_transformers(tiny: Path) -> None:
    torch.testing.assert_close(_logits(LlamaModel.load(tiny, "float32")), _expected(tiny), **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_each_served_architecture_is_that_of_transformers(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # made as zeros and ones, which would hide their loss
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(LlamaModel.load(tmp_path, "float32")), _expected(tmp_path), **TOLERANCE)


def test_an_adapter_on_all_layers_is_that_of_the_trainer(tiny: Path, tmp_path: Path) -> None:
    decoder = HuggingFaceDecoder.load(tiny, "float32")
    parameters = attach(decoder, "default", LoraSettings(rank=3, alpha=6))
    for n, parameter in enumerate(parameters.values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(n))
    write_adapter(tmp_path, decoder, "default", parameters, tiny)
    with torch.no_grad():
        expected = decoder.logits(decoder.hidden_states(torch.tensor([TOKENS])))[0]
    base = LlamaModel.load(tiny, "float32")
    adapted = base.with_adapter(tmp_path)
    torch.testing.assert_close(_logits(adapted), expected, **TOLERANCE)
    assert not torch.allclose(_logits(base), expected, atol=0.1)
    torch.testing.assert_close(_logits(adapted.without_adapter()), _logits(base), atol=0.0, rtol=0.0)
    torch.testing.assert_close(_logits(adapted.with_adapter(tmp_path)), _logits(adapted), atol=0.0, rtol=0.0)


def test_an_adapter_of_some_layers_leaves_the_others(tiny: Path, tmp_path: Path) -> None:
    decoder = HuggingFaceDecoder.load(tiny, "float32")
    settings = LoraSettings(rank=2, alpha=2, train_mlp=False, train_unembed=False)
    parameters = attach(decoder, "default", settings)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.2)
    write_adapter(tmp_path, decoder, "default", parameters, tiny)
    with torch.no_grad():
        expected = decoder.logits(decoder.hidden_states(torch.tensor([TOKENS])))[0]
    torch.testing.assert_close(_logits(LlamaModel.load(tiny, "float32").with_adapter(tmp_path)), expected, **TOLERANCE)


def test_an_adapter_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    decoder = HuggingFaceDecoder.load(other, "float32")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", decoder, "a", attach(decoder, "a", LoraSettings(rank=2, alpha=2)), other)
    with pytest.raises(ModelError, match="Use an adapter of this model"):
        LlamaModel.load(tiny, "float32").with_adapter(tmp_path / "adapter")


def test_bfloat16_stays_near_the_trainers_decoder(tiny: Path) -> None:
    decoder = HuggingFaceDecoder.load(tiny, "bfloat16")
    with torch.no_grad():
        expected = decoder.logits(decoder.hidden_states(torch.tensor([TOKENS])))[0].log_softmax(-1)
    ours = _logits(LlamaModel.load(tiny, "bfloat16")).log_softmax(-1)
    assert (ours - expected).abs().quantile(0.5) < 0.02
    assert (ours - expected).abs().max() < 0.3


def test_a_snapshot_of_the_trainer_is_read(tiny: Path, tmp_path: Path) -> None:
    decoder = HuggingFaceDecoder.load(tiny, "float32")
    write_model(tmp_path, decoder, decoder.model.named_parameters(), tiny)
    torch.testing.assert_close(_logits(LlamaModel.load(tmp_path, "float32")), _expected(tmp_path), **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "type 'gpt2', which cannot be served"),
        ({"sliding_window": 16, "model_type": "mistral"}, "sliding attention window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scales positions by 'yarn'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"tie_word_embeddings": False}, "lacks the weight lm_head.weight"),
    ],
)
def test_what_cannot_be_served_is_named(tiny: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((tiny / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        LlamaModel.load(tmp_path, "float32")
