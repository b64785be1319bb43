"""A tokenizer's chat template: rendering conversations to text, and finding where in the text a message lies.

Works on text only; tokens and weights are made in rendering.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cookbook.data.messages import Messages
from cookbook.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Span"]

_MARK = "\ue000content\ue001"
"""Stands for a message's content, to see where the template puts it. Private-use characters, in no real text."""


@dataclass(frozen=True)
class Span:
    """Message `index` fills text[start:end], from the end of its header through its end-of-turn token."""

    index: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        where: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation; with `add_generation_prompt` also the header of the answer to come.

        Raises:
            DataError: a message spells a special token, the template refuses the conversation, or leaves out its tools.
        """
        self._check_no_special_tokens(messages, where)
        text = self._apply(messages, tools, where, add_generation_prompt)
        if tools and self._apply(messages, None, where, add_generation_prompt) == text:
            raise DataError(f"{where} has tools, but the chat template does not show them. Remove them.")
        for index, message in enumerate(messages):
            for call in message.get("tool_calls") or ():
                if call["function"]["name"] not in text:
                    raise DataError(
                        f"{where}, messages[{index}] has tool_calls, but the chat template does not show them. Use a "
                        "model whose template knows tools, or write the call as content."
                    )
        return text

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The special token that ends an assistant's turn, or None when the template ends it without one."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        tail = self._apply(probe, None, "the chat template", False).rpartition(_MARK)[2].strip()
        return tail if tail in self._special_tokens else None

    def find_span(
        self, text: str, messages: Messages, index: int, tools: Sequence[Mapping[str, Any]] | None, where: str
    ) -> Span:
        """Where message `index` lies in `text`, the rendering of all `messages`.

        The start of an answer is the end of the prompt that a sampler would get for it. Its end is where the
        conversation up to it ends or, for templates that show earlier turns otherwise than the last (Qwen3 drops
        their reasoning), the next end-of-turn token.

        Raises:
            DataError: the template does not put the message there.
        """
        start = self._start(text, messages, index, tools, where)
        is_last = index == len(messages) - 1
        through = text if is_last else self._apply(messages[: index + 1], tools, where, False)
        end = None
        if start is not None and text.startswith(through) and len(through) > start:
            end = self._without_tail(through, start)
        elif start is not None and self.end_of_turn is not None and self.end_of_turn in text[start:]:
            end = text.index(self.end_of_turn, start) + len(self.end_of_turn)
        if start is None or end is None:
            raise DataError(
                f"{where}: the chat template renders the conversation otherwise once more messages follow "
                f"messages[{index}] ({messages[index]['role']}), so its tokens cannot be told apart. Split the row, "
                "or train only its last answer with train_on_what='last_assistant_message'."
            )
        return Span(index, start, end)

    def _start(
        self, text: str, messages: Messages, index: int, tools: Sequence[Mapping[str, Any]] | None, where: str
    ) -> int | None:
        if messages[index]["role"] == "assistant" and index > 0:
            prompt = self._apply(messages[:index], tools, where, True)
            if text.startswith(prompt):
                return len(prompt)
        marked = [*messages[:index], {"role": messages[index]["role"], "content": _MARK}]
        header, found, _ = self._apply(marked, tools, where, False).rpartition(_MARK)
        return len(header) if found and text.startswith(header) else None

    def _without_tail(self, through: str, start: int) -> int:
        """End of the text without the white space after its end-of-turn token; all of it if it ends without one."""
        end = len(through.rstrip())
        return end if end > start and through[:end].endswith(self._special_tokens) else len(through)

    @functools.cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(sorted(token.content for token in added if token.special))

    @functools.cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._special_tokens) or r"(?!)")

    def _check_no_special_tokens(self, messages: Messages, where: str) -> None:
        for index, message in enumerate(messages):
            if found := self._special_token_pattern.search(message.get("content") or ""):
                raise DataError(
                    f"{where}, messages[{index}] contains {found[0]!r}, which the tokenizer takes for a mark of its "
                    "own. Remove it from the content: the chat template writes the marks."
                )

    def _apply(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, where: str, add_generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools or None, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:  # whatever the template trips over
            raise DataError(f"{where}: the chat template refuses the messages: {error}. Change the row.") from error
        return str(text)
