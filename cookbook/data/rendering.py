"""Chat messages as tokens with one training weight each, through the tokenizer's own chat template.

The template stays the only description of a model's format: where a message begins and ends is found by rendering the
conversation up to it, never by knowing the format. Nothing is guessed: what cannot be found is an error.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cookbook.data.messages import Messages, check_messages, is_trained
from cookbook.data.template import ChatTemplate, Span
from cookbook.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RENDERERS", "TRAIN_ON_WHAT", "RenderedRow", "Renderer"]

TRAIN_ON_WHAT = ("all_assistant_messages", "last_assistant_message", "all_messages")
RENDERERS = ("chat_template",)

_LOCKS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = weakref.WeakKeyDictionary()
"""One for each tokenizer: its settings change while it encodes, so two threads must not use it at once."""


@dataclass(frozen=True, eq=False)
class RenderedRow:
    """One conversation as N tokens, x_0 .. x_{N-1}, with the weight of each as a target.

    `weights[0]` is 0: nothing predicts the first token.
    """

    tokens: NDArray[np.int32]
    """int32 (N,)"""
    weights: NDArray[np.float32]
    """float32 (N,), 1 where the token is trained, else 0"""

    @property
    def num_trained(self) -> int:
        """Tokens with a weight other than 0."""
        return int(np.count_nonzero(self.weights))

    @property
    def model_input(self) -> NDArray[np.int32]:
        """int32 (N-1,): x_0 .. x_{N-2}"""
        return self.tokens[:-1]

    @property
    def targets(self) -> NDArray[np.int32]:
        """int32 (N-1,): x_1 .. x_{N-1}; position j is the token after `model_input[j]`."""
        return self.tokens[1:]

    @property
    def target_weights(self) -> NDArray[np.float32]:
        """float32 (N-1,): the weights of `targets`. A prompt of P tokens and one trained token: a 1 at P-1 only."""
        return self.weights[1:]


@dataclass(frozen=True, eq=False)
class Renderer:
    """Renders rows for one tokenizer and one choice of what to train.

    Trained of a message: its content and the token that ends its turn. Never trained: headers such as
    `<|im_start|>assistant`, a system prompt that the template adds itself, and white space after the end-of-turn token
    (the sampler has stopped by then). `train_on_what` chooses the messages; a message's own `"weight": 0` or `1`
    overrides the choice for it. Several threads may render at once, also with two renderers of one tokenizer.

    Raises:
        DataError: unknown `train_on_what` or `renderer_name`.

    >>> renderer = Renderer(tokenizer, "all_assistant_messages")  # doctest: +SKIP
    >>> rendered = renderer.render({"messages": [...]}, "row 0")  # doctest: +SKIP
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    train_on_what: str = "all_assistant_messages"
    renderer_name: str | None = None
    """None or "chat_template" = the tokenizer's own chat template."""

    def __post_init__(self) -> None:
        if self.train_on_what not in TRAIN_ON_WHAT:
            raise DataError(f"train_on_what {self.train_on_what!r} is unknown. Use one of: {', '.join(TRAIN_ON_WHAT)}.")
        if self.renderer_name is not None and self.renderer_name not in RENDERERS:
            raise DataError(
                f"renderer_name {self.renderer_name!r} is unknown. Leave it out for the tokenizer's own chat template, "
                f"or use one of: {', '.join(RENDERERS)}."
            )

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Text that is the same for two renderers exactly when they render every row alike."""
        from cookbook.models.tokenizer import tokenizer_fingerprint

        return f"1/{tokenizer_fingerprint(self.tokenizer)}/chat_template/{self.train_on_what}"

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        """Tokens and weights of a row `{"messages": [...], "tools": [...]}`; `tools` is optional.

        `where` names the row in errors.

        Raises:
            DataError: the row is not a valid conversation, the template refuses it or cannot be followed, or no token
                of it would be trained.
        """
        messages = check_messages(row, where)
        tools = row.get("tools")
        trained = [index for index in range(len(messages)) if is_trained(messages, index, self.train_on_what)]
        if not trained:
            raise DataError(_nothing_trained(messages, where, self.train_on_what))
        with self._lock:
            template = self.template
            text = template.render(messages, tools, where)
            spans = [template.find_span(text, messages, index, tools, where) for index in trained]
            rendered = _tokenize(self.tokenizer, text, spans, where)
        if rendered.num_trained == 0:
            raise DataError(f"{where} has no trained token: the trained message renders to nothing. Remove the row.")
        return rendered

    def prompt_tokens(
        self, messages: Sequence[Mapping[str, Any]], where: str, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> NDArray[np.int32]:
        """int32 tokens that a sampler is given to answer `messages`: the conversation and the assistant's header.

        Raises:
            DataError: as `render`.
        """
        checked = check_messages({"messages": list(messages), "tools": tools}, where)
        with self._lock:
            text = self.template.render(checked, tools, where, add_generation_prompt=True)
            return np.asarray(_encode(self.tokenizer, text), np.int32)

    @property
    def _lock(self) -> threading.Lock:
        return _LOCKS.setdefault(self.tokenizer, threading.Lock())


def _nothing_trained(messages: Messages, where: str, train_on_what: str) -> str:
    if not any(message["role"] == "assistant" for message in messages):
        return f"{where} has no assistant message (roles: {[m['role'] for m in messages]}). Add one or remove the row."
    return (
        f"{where} has no trained message with train_on_what={train_on_what!r}: the weights of its messages are "
        f"{[m.get('weight') for m in messages]}. Give one the weight 1 or remove the row."
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the special tokens itself, the first one too.
    return list(tokenizer.encode(text, add_special_tokens=False))


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], where: str) -> RenderedRow:
    """Tokens of `text`, weighted 1 inside `spans`, such that no token lies across the edge of a span.

    The text is tokenized whole and in pieces cut at the edges. Usually both agree. Where a token of the whole reaches
    over an edge (content that begins with a newline, after a header that ends with one), the pieces are what a sampler
    sees, as its prompt ends at that edge, and they are taken if they spell the same text. A tokenizer that marks the
    start of each text it is given makes other pieces; then the whole is taken if its tokens keep to the edges.
    """
    pieces = _cut(text, spans, where)
    encoded = [_encode(tokenizer, piece) for piece, _ in pieces]
    tokens = [token for ids in encoded for token in ids]
    weights = [float(trained) for ids, (_, trained) in zip(encoded, pieces, strict=True) for _ in ids]
    whole = _encode(tokenizer, text)
    if tokens != whole and _decode(tokenizer, tokens) != _decode(tokenizer, whole):
        tokens, weights = whole, _weights_by_offset(tokenizer, text, spans, where)
    weights[:1] = [0.0] * len(weights[:1])
    return RenderedRow(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))


def _cut(text: str, spans: Sequence[Span], where: str) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is trained; neighbouring spans stay pieces of their own."""
    pieces: list[tuple[str, bool]] = []
    position = 0
    for span in spans:
        if span.start < position:
            raise DataError(
                f"{where}: the chat template puts messages[{span.index}] before the end of the message trained before "
                "it. Train only the last answer with train_on_what='last_assistant_message'."
            )
        pieces += [(text[position : span.start], False), (text[span.start : span.end], True)]
        position = span.end
    return [(piece, trained) for piece, trained in [*pieces, (text[position:], False)] if piece]


def _weights_by_offset(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], where: str) -> list[float]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    weights = [0.0] * len(offsets)
    for span in spans:
        for index, (start, end) in enumerate(offsets):
            if start < span.start < end or start < span.end < end:
                raise DataError(
                    f"{where}: the token {text[start:end]!r} reaches over the edge of messages[{span.index}], so the "
                    "message cannot be trained alone. Change the white space at its start or end, or the chat template."
                )
            if span.start <= start and end <= span.end and start < end:
                weights[index] = 1.0
    return weights
