"""Sampler weights on disk: a Hugging Face folder in bfloat16 that transformers loads. (PEFT folders: lora.py.)"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cookbook.backend.decoder import HuggingFaceDecoder, dithered

__all__ = ["write_model"]

_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def write_model(
    folder: Path, decoder: HuggingFaceDecoder, weights: Iterable[tuple[str, Tensor]], base_folder: Path
) -> None:
    """Write these weights, rounded to bfloat16, with the model's config and the tokenizer files of its base.

    Rounded as for training (`dithered`): rounding to nearest would lose the small steps that the model has learned by.
    """
    tensors = {name: _in_bfloat16(tensor.detach()) for name, tensor in weights}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    config = copy.deepcopy(decoder.model.config)
    config.dtype = torch.bfloat16
    config.architectures = [type(decoder.model).__name__]
    # A head with its own weights is one more tensor; a reader that ties would drop it.
    config.tie_word_embeddings = config.tie_word_embeddings and "lm_head.weight" not in tensors
    config.save_pretrained(folder)
    for name in _COPIED:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)


def _in_bfloat16(tensor: Tensor) -> Tensor:
    return dithered(tensor) if tensor.dtype == torch.float32 else tensor.to(torch.bfloat16).contiguous()
