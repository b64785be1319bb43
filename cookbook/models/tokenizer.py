"""Loading the tokenizer of a model: local files only, one instance per folder, with a chat template or not at all."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.errors import ModelError
from cookbook.models.folders import CONFIG_PATTERNS, TOKENIZER_PATTERNS, find_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer", "tokenizer_fingerprint"]


def load_tokenizer(name_or_path: str, models_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model as `resolve_model` names it; the folder needs no weights.

    The instance is shared by all callers of a process: do not change it. No code from the folder is run.

    Raises:
        ModelError: nothing answers to the name, no tokenizer files, no chat template, or not a `tokenizers` tokenizer.
    """
    folder = find_folder(name_or_path, models_dir, hub_patterns=(*CONFIG_PATTERNS, *TOKENIZER_PATTERNS))
    return _load(folder.resolve())


@functools.lru_cache(maxsize=8)
def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(f"{folder} has no tokenizer files. Copy tokenizer.json and tokenizer_config.json into it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loader raises whatever a damaged file makes its parsers raise
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}. Copy its files anew.") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer in {folder} has no tokenizer.json. Convert it with transformers and save it.")
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {folder} has no chat template, so messages cannot be rendered. Use an instruct model, "
            "set tokenizer_model to one with the same vocabulary, or add chat_template.jinja to the folder."
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over everything that decides how messages become tokens: vocabulary, rules and chat template."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(tokenizer.get_chat_template().encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    return digest.hexdigest()
