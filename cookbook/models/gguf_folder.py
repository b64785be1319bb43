"""A GGUF file of a Llama-shaped model with a byte-level tokenizer, rewritten as a Hugging Face folder.

transformers' own GGUF loader is not used: it knows no split rule for the `smollm` pre-tokenizer, so numbers would be
tokenized in other pieces than the model was trained on, and what it loads refuses to be saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer

__all__ = ["write_hf_folder"]

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3
"""Value of tokenizer.ggml.token_type for special tokens."""


def write_hf_folder(gguf_file: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the fast tokenizer of `gguf_file` into `folder`.

    Weights are stored in bfloat16, the type SmolLM2 was published in: the GGUF holds 4-bit blocks, whose error is
    about twenty times that of rounding to bfloat16, and float32 would only double the file. A tied output head is not
    stored twice.

    Raises:
        ModelError: another architecture or tokenizer than llama with byte-level BPE, or an unknown tensor.
        OSError: a file cannot be written.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    _require(metadata, "general.architecture", "llama")
    _require(metadata, "tokenizer.ggml.model", "gpt2")
    _require(metadata, "tokenizer.ggml.pre", "smollm")
    config = _config(metadata, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    _write_tokenizer(metadata, folder)
    _write_weights(reader, folder, heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"])


def _require(metadata: dict[str, Any], key: str, value: str) -> None:
    if metadata.get(key) != value:
        raise ModelError(
            f"the GGUF file has {key} = {metadata.get(key)!r}; only {value!r} can be converted. "
            "Use a model that is published as a Hugging Face folder with safetensors weights."
        )


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored as float32; seven digits give back the decimal that was meant (1e-05).
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": metadata["llama.rope.freq_base"], "rope_type": "default"},
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_weights(reader: GGUFReader, folder: Path, *, heads: int, kv_heads: int) -> None:
    import torch
    from gguf import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {}
    for tensor in reader.tensors:
        name = _tensor_name(tensor.name)
        array = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            array = _unpermute(array, heads)
        elif ".attn_k." in tensor.name:
            array = _unpermute(array, kv_heads)
        weights[name] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OSError(str(error)) from error


def _tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, kind, suffix = name.split(".")
    if kind not in TENSOR_NAMES or suffix != "weight" or (block and block[0] != "blk"):
        raise ModelError(
            f"the GGUF file has a tensor {name!r} that a plain Llama does not have. "
            "Use a model that is published as a Hugging Face folder with safetensors weights."
        )
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{TENSOR_NAMES[kind]}.{suffix}"


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k rows, float32 (heads * head_dim, hidden).

    llama.cpp rotates neighbouring pairs of a head's dimensions, transformers rotates the two halves; its converter
    therefore interleaves the halves (LlamaModel.permute in convert_hf_to_gguf.py), and this puts them back.
    """
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, with the chat template inside the latter."""
    tokens = metadata["tokenizer.ggml.tokens"]
    serialized = _byte_level_tokenizer(metadata).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(serialized, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": metadata["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def _byte_level_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """SmolLM's tokenizer: GPT-2's byte-level BPE, with every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
