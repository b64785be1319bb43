"""The decoder gives transformers' logits, needs no padding mask, and refuses models that it would train wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
)

from cookbook.backend.decoder import HuggingFaceDecoder, dithered, read_config
from cookbook.errors import ModelError
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


TOKENS_NT = torch.randint(260, (3, 11), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_transformers(tiny: Path) -> None:
    decoder = HuggingFaceDecoder.load(tiny, "float32")
    reference = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        ours = decoder.logits(decoder.hidden_states(TOKENS_NT))
        assert torch.allclose(ours, reference(TOKENS_NT).logits, atol=1e-5)


def test_right_padding_does_not_change_earlier_positions(tiny: Path) -> None:
    decoder = HuggingFaceDecoder.load(tiny, "float32")
    padded = TOKENS_NT.clone()
    padded[0, 6:] = 0
    with torch.no_grad():
        alone = decoder.hidden_states(TOKENS_NT[:1, :6])
        assert torch.allclose(decoder.hidden_states(padded)[:1, :6], alone, atol=1e-5)


def test_bfloat16_compute_stays_close_and_gives_float32_logits(tiny: Path) -> None:
    exact = HuggingFaceDecoder.load(tiny, "float32")
    rounded = HuggingFaceDecoder.load(tiny, "bfloat16")
    with torch.no_grad():
        expected = exact.logits(exact.hidden_states(TOKENS_NT))
        got = rounded.logits(rounded.hidden_states(TOKENS_NT))
        rounded.compress()
        compressed = rounded.logits(rounded.hidden_states(TOKENS_NT))
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(compressed, got)


def test_rounding_keeps_bfloat16_weights_and_the_mean_of_small_steps() -> None:
    weights = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(dithered(weights.float()), weights)
    step = 1e-3 * weights.float().abs()  # a quarter to an eighth of the last digit: rounding to nearest drops it
    moved = weights.float() + step
    assert torch.equal(moved.bfloat16(), weights)
    assert (dithered(moved).float() - weights.float()).mean() == pytest.approx(step.mean().item(), rel=0.05)
    assert torch.equal(dithered(moved), dithered(moved.clone()))


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**SMALL), "final_logit_softcapping=30.0"),
        (GraniteConfig(**SMALL, logits_scaling=4.0), "logits_scaling=4.0"),
        (CohereConfig(**SMALL, logit_scale=0.0625), "logit_scale=0.0625"),
        (MixtralConfig(**SMALL, num_local_experts=4), "mixture of experts"),
    ],
)
def test_models_that_cannot_be_trained_here_are_refused(tmp_path: Path, config: PretrainedConfig, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a Hugging Face model folder"):
        read_config(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        HuggingFaceDecoder.load(folder, "float32")


def test_missing_weights_are_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, first model\.layers\.1\.mlp\.up_proj\.weight"):
        HuggingFaceDecoder.load(folder, "float32")


class ScaledLlama(LlamaForCausalLM):
    """Rescales its logits without saying so in its config."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class AveragingLlama(LlamaForCausalLM):
    """Lets every position see the whole sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_hook(self._average)

    @staticmethod
    def _average(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output


@pytest.mark.parametrize(
    ("model", "message"), [(ScaledLlama, "not a plain linear function"), (AveragingLlama, "not a causal model")]
)
def test_undeclared_differences_are_found_by_a_probe(tiny: Path, model: type[LlamaForCausalLM], message: str) -> None:
    decoder = HuggingFaceDecoder(model.from_pretrained(tiny), "float32")
    with pytest.raises(ModelError, match=message):
        decoder.check_trainable(tiny)
