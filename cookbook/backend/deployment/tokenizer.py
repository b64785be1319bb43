"""Text to token ids and back for the model that a deployment serves, and the tokens that end a completion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cookbook.backend.deployment.wire import BadRequest, Message
from cookbook.backend.paths import read_json
from cookbook.errors import ModelError

__all__ = ["TextModel"]


class TextModel:
    """The tokenizer of a model folder. Thread-safe.

    `vocab_size` counts the rows of the model's head, padding included. `end_tokens` end a completion: those of
    generation_config.json and config.json, and the tokenizer's own.
    """

    def __init__(self, folder: Path) -> None:
        """ModelError when the folder has no fast tokenizer, or a config.json that gives no vocab_size."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}. Copy its files anew.") from error
        if not self._tokenizer.is_fast:
            raise ModelError(f"the tokenizer in {folder} has no tokenizer.json. Convert it with transformers.")
        config = read_json(folder / "config.json") or {}
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise ModelError(f"{folder / 'config.json'} has no vocab_size: copy the file anew.")
        self.vocab_size = vocab_size
        generation = read_json(folder / "generation_config.json") or {}
        ends = [generation.get("eos_token_id"), config.get("eos_token_id"), self._tokenizer.eos_token_id]
        self.end_tokens = frozenset(token for end in ends for token in (end if isinstance(end, list) else [end])) - {
            None
        }

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain text, with the special tokens that the tokenizer puts before one."""
        ids = tuple(self._tokenizer.backend_tokenizer.encode(text).ids)
        if not ids:
            raise BadRequest(f"prompt {text!r} has no tokens: give at least one.", "prompt")
        return ids

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant's answer begins. BadRequest when the template refuses it."""
        if not self._tokenizer.chat_template:
            raise BadRequest("the deployed model has no chat template: use /v1/completions.", "messages")
        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # whatever the template, a program of the model's makers, thinks of the messages
            raise BadRequest(f"the model's chat template refuses the messages: {error}", "messages") from error
        return tuple(ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included. Ids without a token (padding of the head) add nothing."""
        return str(self._tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False))
