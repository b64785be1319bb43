"""Two answers to one prompt, a chosen and a rejected one: the row forms that are known, their checks, their tokens.

A data file of such rows: preferences.py. How one conversation becomes tokens: rendering.py.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.data.messages import Messages, check_messages
from cookbook.data.rendering import RenderedRow, Renderer
from cookbook.errors import DataError

__all__ = ["FORMS", "RenderedPair", "is_pair", "render_pair"]

FORMS = (
    '{"chosen": {"messages": [...]}, "rejected": {"messages": [...]}}',
    '{"samples": [{"messages": [...], "score": 1.0}, {"messages": [...], "score": 0.0}]}',
    '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}',
)
"""The row forms. A score may also stand in `evals`; `input` may be a list or a string, an output a string."""
_KEYS = (("chosen", "rejected"), ("samples",), ("input", "preferred_output", "non_preferred_output"))
_SHOWN = 60
"""Characters of a text that an error shows."""


@dataclass(frozen=True, eq=False)
class RenderedPair:
    """A chosen and a rejected answer behind the same P prompt tokens; only tokens of the answers have a weight.

    Both answers begin at x_P, which is trained: as a target it stands at position P-1 (`RenderedRow.target_weights`).
    """

    chosen: RenderedRow = field(repr=False)
    rejected: RenderedRow = field(repr=False)
    prompt_tokens: int
    """P: tokens that both sides share before the first response token; all weights below it are 0."""

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of the sha256 over both sides' tokens and weights: what reference logprobs are kept under."""
        sha256 = hashlib.sha256()
        for side in (self.chosen, self.rejected):
            sha256.update(len(side.tokens).to_bytes(8, "little"))
            sha256.update(side.tokens.astype("<i4").tobytes())
            sha256.update(side.weights.astype("<f4").tobytes())
        return sha256.hexdigest()[:16]

    @property
    def num_trained(self) -> int:
        """Response tokens of both sides."""
        return self.chosen.num_trained + self.rejected.num_trained

    @property
    def num_tokens(self) -> int:
        """Tokens of both sides, the prompt counted twice."""
        return len(self.chosen.tokens) + len(self.rejected.tokens)


@dataclass(frozen=True)
class _Conversation:
    """One side of a row: prompt and answer together."""

    side: str
    messages: Messages
    tools: Any


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether the row has a key of a pair, well-formed or not, and is no plain conversation."""
    return "messages" not in row and any(key in row for keys in _KEYS for key in keys)


def render_pair(row: Mapping[str, Any], renderer: Renderer, where: str) -> RenderedPair:
    """Tokens of both answers of a row in one of the `FORMS`; `where` names the row in errors.

    The prompt is what both conversations share; an answer is all that follows. Trained of it is what `renderer` trains:
    with "all_assistant_messages" its assistant messages with the tokens that end their turns, not the turns of users
    and tools between them. Where both answers open alike, that opening is part of each.

    Raises:
        DataError: unknown form; scores other than one 1.0 and one 0.0; an invalid or empty conversation; prompts that
            differ; a side without an answer; equal answers; or a chat template whose tokens before the two answers are
            not the same.
    """
    chosen, rejected = _conversations(row, where)
    first = _first_difference(chosen, rejected, where)
    ours, theirs = (_render_side(conversation, first, renderer, where) for conversation in (chosen, rejected))
    return RenderedPair(ours, theirs, _shared_prompt(ours, theirs, renderer, where))


def _conversations(row: Mapping[str, Any], where: str) -> tuple[_Conversation, _Conversation]:
    """Chosen and rejected of a row in any form."""
    found = [keys for keys in _KEYS if all(key in row for key in keys)]
    if len(found) != 1:
        raise DataError(
            f"{where} is not a pair of answers in one form (keys: {sorted(row)}). Write one of these:\n"
            + "\n".join(f"      {form}" for form in FORMS)
        )
    if found[0] == _KEYS[0]:
        return _from_side(row, "chosen", row["chosen"], where), _from_side(row, "rejected", row["rejected"], where)
    if found[0] == _KEYS[1]:
        return _from_samples(row, where)
    return _from_output(row, "preferred_output", where), _from_output(row, "non_preferred_output", where)


def _from_side(row: Mapping[str, Any], side: str, value: object, where: str) -> _Conversation:
    if not isinstance(value, dict):
        raise DataError(f'{where} has {side} = {value!r:.100}. Write {{"messages": [{{"role", "content"}}, ...]}}.')
    return _Conversation(side, check_messages(value, f"{where}, {side}"), value.get("tools", row.get("tools")))


def _from_samples(row: Mapping[str, Any], where: str) -> tuple[_Conversation, _Conversation]:
    samples = row["samples"]
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise DataError(f"{where} has samples = {samples!r:.100}. Write {FORMS[1]}.")
    scores = [_score(sample) for sample in samples]
    if len(scores) != 2 or any(isinstance(score, bool) for score in scores) or {*scores} != {0.0, 1.0}:
        raise DataError(f"{where} has samples with the scores {scores}. Keep two: one scored 1.0 and one scored 0.0.")
    sides = [_from_side(row, f"samples[{index}]", sample, where) for index, sample in enumerate(samples)]
    return (sides[0], sides[1]) if scores[0] == 1.0 else (sides[1], sides[0])


def _score(sample: Mapping[str, Any]) -> float | str | None:
    evals = sample.get("evals")
    score = sample.get("score", evals.get("score") if isinstance(evals, dict) else None)
    return score if score is None or isinstance(score, int | float) else repr(score)


def _from_output(row: Mapping[str, Any], side: str, where: str) -> _Conversation:
    prompt = row["input"]
    if not isinstance(prompt, dict):
        prompt = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    output = row[side]
    answer = [{"role": "assistant", "content": output}] if isinstance(output, str) else output
    messages = [
        *check_messages(prompt, f"{where}, input"),
        *check_messages({"messages": answer}, f"{where}, {side}"),
    ]
    return _Conversation(side, messages, prompt.get("tools", row.get("tools")))


def _first_difference(chosen: _Conversation, rejected: _Conversation, where: str) -> int:
    """Index of the first message of the answers.

    Raises:
        DataError: there is none, or it is not an assistant's on both sides.
    """
    names = f"{chosen.side} and {rejected.side}"
    if (chosen.tools or None) != (rejected.tools or None):
        raise DataError(f"{where}: the prompts differ: {names} have other tools. Give both the same.")
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    shortest = min(len(chosen.messages), len(rejected.messages))
    first = next((index for index, pair in enumerate(pairs) if _shown(pair[0]) != _shown(pair[1])), shortest)
    if first == shortest:
        raise DataError(f"{where}: {_without_answer(chosen, rejected)} Correct or remove the row.")
    ours, theirs = chosen.messages[first], rejected.messages[first]
    if not ours["role"] == theirs["role"] == "assistant":
        what = f"messages[{first}] of {names} are {_both(ours, theirs)}"
        raise DataError(f"{where}: the prompts differ: {what}. Give both answers the same prompt.")
    if first == 0:
        raise DataError(f"{where} has no prompt: both conversations begin with the answer. Put the question first.")
    for conversation in (chosen, rejected):
        if conversation.messages[first].get("weight") == 0:
            what = f"{conversation.side}, messages[{first}] begins the answer and has the weight 0"
            raise DataError(f"{where}, {what}. Remove the weight: what is to be left out belongs into the prompt.")
    return first


def _without_answer(chosen: _Conversation, rejected: _Conversation) -> str:
    if len(chosen.messages) != len(rejected.messages):
        short, long = sorted((chosen, rejected), key=lambda conversation: len(conversation.messages))
        return f"{short.side} has no answer of its own: {long.side} is the same and goes on."
    if chosen.messages[-1]["role"] != "assistant":
        return f"{chosen.side} and {rejected.side} have no answer: both are the prompt alone."
    return f"{chosen.side} and {rejected.side} are equal answers: there is nothing to prefer."


def _shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat template may show of a message."""
    return {key: value for key, value in message.items() if key != "weight" and value is not None}


def _both(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Two messages that differ, shortened to where they do."""
    texts = [str(message.get("content") or "") for message in (ours, theirs)]
    if texts[0] == texts[1] and ours["role"] == theirs["role"]:
        texts = [repr(sorted(_shown(message).items())) for message in (ours, theirs)]
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    start = max(0, shared - _SHOWN // 3)
    cut = [_shortened(text, start) for text in texts]
    return f"{ours['role']} {cut[0]!r} and {theirs['role']} {cut[1]!r}"


def _shortened(text: str, start: int) -> str:
    end = start + _SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")


def _render_side(conversation: _Conversation, first: int, renderer: Renderer, where: str) -> RenderedRow:
    """The conversation with nothing trained before message `first`."""
    messages = [{**message, "weight": 0} for message in conversation.messages[:first]]
    messages += [dict(message) for message in conversation.messages[first:]]
    return renderer.render({"messages": messages, "tools": conversation.tools}, f"{where}, {conversation.side}")


def _shared_prompt(chosen: RenderedRow, rejected: RenderedRow, renderer: Renderer, where: str) -> int:
    """P, once the tokens of both sides are the same below it."""
    starts = [int(np.flatnonzero(side.weights)[0]) for side in (chosen, rejected)]
    length = min(starts)
    different = np.flatnonzero(chosen.tokens[:length] != rejected.tokens[:length])
    if len(different) or starts[0] != starts[1]:
        at = int(different[0]) if len(different) else length
        shown = [_around(side.tokens, at, renderer) for side in (chosen, rejected)]
        raise DataError(
            f"{where}: the chat template does not put the same tokens before both answers, which begin at tokens "
            f"{starts[0]} and {starts[1]}: from token {at} on they are {shown[0]!r} and {shown[1]!r}. Make them alike "
            "in what the template looks at (number of messages, reasoning, tool calls), or remove the row."
        )
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise DataError(
            f"{where}: chosen and rejected are equal answers once the chat template has rendered them: there is "
            "nothing to prefer. Correct or remove the row."
        )
    return length


def _around(tokens: NDArray[np.int32], at: int, renderer: Renderer) -> str:
    return str(renderer.tokenizer.decode(tokens[at : at + 12].tolist(), clean_up_tokenization_spaces=False))
