"""Bodies of answers to completion and chat requests, whole and as events of a stream.

Every answer says which snapshot sampled it: in its id (`cmpl-<hex>.<snapshot>`; nothing after the dot is the base
model), in `snapshot_identity` and in each choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from cookbook.backend.deployment.engine import Generated
from cookbook.backend.deployment.stops import Decode
from cookbook.backend.deployment.wire import Call

__all__ = ["DONE_EVENT", "Choice", "Reply", "event", "served_version"]

DONE_EVENT = b"data: [DONE]\n\n"

_Object = dict[str, Any]

_LINE_ENDS = [(mark.encode(), f"\\u{ord(mark):04x}".encode()) for mark in ("\x85", "\u2028", "\u2029")]


@dataclass(frozen=True)
class Choice:
    """One finished completion. `text` is without echo, without the final end token and cut at a stop string."""

    index: int
    prompt: tuple[int, ...]
    generated: Generated
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Reply:
    """Builds the answer to one request. `serial` is the hex part of its id, `model` the deployment's name.

    `num_concurrent` counts the requests that were in work when this one came; `started` is on the monotonic clock.
    """

    serial: str
    model: str
    chat: bool
    call: Call
    decode: Decode
    num_concurrent: int
    started: float
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> _Object:
        """The body of an answer that is not streamed."""
        entries = [self._entry(choice, self._content("message", self._text(choice))) for choice in choices]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, served_version(choices), entries) | self._summary(choices)

    def opening(self, index: int, prompt: Sequence[int], version: str) -> list[_Object]:
        """The event before a choice's first text, where there is one: a chat's role, or the echoed prompt."""
        if self.chat:
            return [self._event(version, self._bare(index, {"delta": {"role": "assistant", "content": ""}}, version))]
        echoed = self.decode(self._echoed(prompt))
        return [self.delta(index, echoed, version)] if echoed else []

    def delta(self, index: int, text: str, version: str) -> _Object:
        """An event with a piece of text."""
        return self._event(version, self._bare(index, self._content("delta", text), version))

    def closing(self, choice: Choice, text: str) -> _Object:
        """The last event of a choice, with the rest of its text and everything that is known only now."""
        return self._event(choice.generated.version, self._entry(choice, self._content("delta", text)))

    def whole_event(self, choice: Choice) -> _Object:
        """A whole choice as one event."""
        return self.closing(choice, self._text(choice))

    def last(self, body: _Object, choices: Sequence[Choice]) -> list[_Object]:
        """The last event of a stream, `body`, with usage and timing, which have an event of their own if asked for."""
        if not self.call.include_usage:
            return [body | self._summary(choices)]
        empty = self._frame(self._event_kind, served_version(choices), [])
        return [body, empty | self._summary(choices)]

    @property
    def _event_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(self, version: str, entry: _Object) -> _Object:
        return self._frame(self._event_kind, version, [entry])

    def _frame(self, kind: str, version: str | None, entries: list[_Object]) -> _Object:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.serial}" if version is None else f"{prefix}-{self.serial}.{version}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "snapshot_identity": version,
            "choices": entries,
        }

    def _content(self, where: str, text: str) -> _Object:
        if not self.chat:
            return {"text": text}
        return {where: {"role": "assistant", "content": text} if where == "message" else {"content": text}}

    def _bare(self, index: int, content: _Object, version: str) -> _Object:
        return {"index": index, **content, "logprobs": None, "finish_reason": None, "snapshot_identity": version}

    def _entry(self, choice: Choice, content: _Object) -> _Object:
        entry = self._bare(choice.index, content, choice.generated.version)
        entry["finish_reason"] = choice.finish_reason
        if self.call.logprobs:
            entry["logprobs"] = self._logprobs(choice)
        tokens = [*self._echoed(choice.prompt), *choice.generated.tokens]
        if self.call.raw_output:
            entry["raw_output"] = {"completion_token_ids": tokens, "prompt_token_ids": list(choice.prompt)}
        if self.call.return_token_ids:
            entry |= {"token_ids": tokens, "prompt_token_ids": list(choice.prompt)}
        return entry

    def _text(self, choice: Choice) -> str:
        return self.decode(self._echoed(choice.prompt)) + choice.text

    def _echoed(self, prompt: Sequence[int]) -> Sequence[int]:
        count = len(prompt) if self.call.echo is None else min(self.call.echo, len(prompt))
        return prompt[len(prompt) - count :]

    def _logprobs(self, choice: Choice) -> _Object:
        """One entry a token: what the model gave it at temperature 1, and what it was drawn with.

        An echoed token was not drawn; the first of a prompt has no probability either, and is given as 0.
        """
        generated = choice.generated
        echoed = self._echoed(choice.prompt)
        start = len(choice.prompt) - len(echoed)
        content = [
            self._position(token, logprob or 0.0, None, [])
            for token, logprob in zip(echoed, (generated.prompt_logprobs or [])[start:], strict=True)
        ]
        tops: Sequence[Sequence[tuple[int, float]]] = generated.top or [()] * len(generated.tokens)
        columns = zip(generated.tokens, generated.logprobs, generated.sampling_logprobs, tops, strict=True)
        content += [self._position(token, logprob, drawn, top) for token, logprob, drawn, top in columns]
        return {"content": content} | (_legacy(content) if self.call.legacy_logprobs else {})

    def _position(
        self, token: int, logprob: float, sampling_logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> _Object:
        entry: _Object = {
            "token": self.decode([token]),
            "token_id": token,
            "logprob": logprob,
            "sampling_logprob": sampling_logprob,
        }
        if self.chat:
            entry["bytes"] = None
        if self.call.top_logprobs or self.chat:
            entry["top_logprobs"] = [
                {"token": self.decode([other]), "token_id": other, "logprob": value} for other, value in top
            ]
        return entry

    def _summary(self, choices: Sequence[Choice]) -> _Object:
        # A request's prompts may be of several lengths, each shared by n choices, and it is counted once for them.
        prompts = [choice.prompt for choice in choices if choice.index % self.call.n == 0]
        num_prompt = sum(map(len, prompts))
        num_completion = sum(len(choice.generated.tokens) for choice in choices)
        cached = sum(choice.generated.cached_prompt_tokens for choice in choices if choice.index % self.call.n == 0)
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return {"usage": usage, "perf_metrics": self._metrics(choices, num_prompt, cached)}

    def _metrics(self, choices: Sequence[Choice], num_prompt: int, cached: int) -> dict[str, str]:
        """Seconds, of the choice that took longest in each respect, under the names of the training API."""
        timings = [choice.generated for choice in choices]
        queued, prefill = max(g.queued_s for g in timings), max(g.prefill_s for g in timings)
        return {
            "prefill-queue-duration": f"{queued:.6f}",
            "prefill-duration": f"{prefill:.6f}",
            "generation-queue-duration": "0",
            "generation-duration": f"{max(g.decode_s for g in timings):.6f}",
            "server-time-to-first-token": f"{max(g.queued_s + g.prefill_s for g in timings):.6f}",
            "server-processing-time": f"{time.monotonic() - self.started:.6f}",
            "num-concurrent-requests": str(self.num_concurrent),
            "prompt-tokens": str(num_prompt),
            "cached-prompt-tokens": str(cached),
            "deployment": self.model,
        }


def served_version(choices: Sequence[Choice]) -> str | None:
    """The snapshot that sampled all of these, or None when a hot load came between them."""
    versions = {choice.generated.version for choice in choices}
    return versions.pop() if len(versions) == 1 else None


def event(body: _Object) -> bytes:
    """A server-sent event with a JSON body."""
    data = orjson.dumps(body)
    # Line ends to many a client that reads line by line. In JSON they can only stand in a string.
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return b"data: " + data + b"\n\n"


def _legacy(content: Sequence[_Object]) -> _Object:
    return {
        "tokens": [entry["token"] for entry in content],
        "token_logprobs": [entry["logprob"] for entry in content],
        "top_logprobs": [
            # Backwards, so that of tokens with the same text the most probable counts.
            {other["token"]: other["logprob"] for other in reversed(entry.get("top_logprobs", []))}
            for entry in content
        ],
    }
