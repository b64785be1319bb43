"""Requests for completions as they come over the wire, checked field by field.

A field that would change the answer is either honoured or refused with its name; none is skipped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

__all__ = ["BadRequest", "Call", "Message", "Prompt", "json_object", "read_chat", "read_completion"]

Prompt = str | tuple[int, ...]
Message = dict[str, Any]

_MAX_CHOICES = 128
_MAX_TOP_LOGPROBS = 20
_MAX_STOPS = 16
_MAX_TEMPERATURE = 10.0
_DEFAULT_MAX_TOKENS = 16  # of the completions API; a chat answer may fill the context

# Fields that cannot change the tokens of the answer.
_WITHOUT_EFFECT = frozenset(
    ("model", "user", "metadata", "store", "service_tier", "safety_identifier")
    + ("prompt_cache_key", "perf_metrics_in_response")
)
# Fields that would, with the values at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "images": ([],),
    "include_routing_matrix": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (False,),
}


class BadRequest(Exception):
    """A request that can never succeed as it is. `param` names the field, None when it is the body as a whole."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Call:
    """How to sample and how to answer, the same for all prompts of a request.

    max_tokens: None = up to the end of the context, 0 = nothing is sampled (for the echo alone). top_k: 0 = all
    tokens. top_logprobs: alternatives a position.
    echo: how many of the prompt's last tokens to give back, 0 = none, None = all.
    legacy_logprobs: the flat lists of the older API beside the structured content.
    overflow_is_error: refuse, instead of shorten, what does not fit the context.
    """

    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    logprobs: bool
    legacy_logprobs: bool
    top_logprobs: int
    echo: int | None
    raw_output: bool
    return_token_ids: bool
    overflow_is_error: bool


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. BadRequest when it is something else."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def read_completion(body: Mapping[str, Any], vocab_size: int) -> tuple[list[Prompt], Call]:
    """Prompts and call of a completions request. BadRequest names the first field that is wrong."""
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt"), vocab_size)
    logprobs, legacy, top = _completion_logprobs(fields)
    call = _call(fields, max_tokens=fields.whole("max_tokens", _DEFAULT_MAX_TOKENS, 0))
    echo_last = fields.whole("echo_last", None, 0)
    echo = fields.flag("echo")
    fields.finish()
    if len(prompts) * call.n > _MAX_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts with n={call.n} are too many: at most {_MAX_CHOICES} answers.", "n")
    call = replace(
        call,
        logprobs=logprobs,
        legacy_logprobs=legacy,
        top_logprobs=top,
        echo=echo_last if echo_last is not None else (None if echo else 0),
    )
    return prompts, call


def read_chat(body: Mapping[str, Any]) -> tuple[list[Message], Call]:
    """Messages and call of a chat request. BadRequest names the first field that is wrong."""
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    limits = [fields.whole(name, None, 1) for name in ("max_completion_tokens", "max_tokens")]
    logprobs = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, 0, _MAX_TOP_LOGPROBS) or 0
    if top and not logprobs:
        raise BadRequest(f"top_logprobs {top} needs logprobs: true.", "top_logprobs")
    call = _call(fields, max_tokens=next((limit for limit in limits if limit is not None), None))
    fields.finish()
    return messages, replace(call, logprobs=logprobs, top_logprobs=top)


def _call(fields: _Fields, max_tokens: int | None) -> Call:
    top_k = fields.whole("top_k", 0, -1) or 0
    overflow = fields.one_of("context_length_exceeded_behavior", ("truncate", "error"))
    return Call(
        n=fields.whole("n", 1, 1, _MAX_CHOICES) or 1,
        max_tokens=max_tokens,
        temperature=fields.number("temperature", 1.0, 0.0, _MAX_TEMPERATURE),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=max(0, top_k),
        seed=fields.whole("seed", None, -(2**63), 2**63 - 1),
        stop=_stops(fields.take("stop")),
        ignore_eos=fields.flag("ignore_eos"),
        stream=fields.flag("stream"),
        include_usage=_include_usage(fields.take("stream_options")),
        logprobs=False,
        legacy_logprobs=False,
        top_logprobs=0,
        echo=0,
        raw_output=fields.flag("raw_output"),
        return_token_ids=fields.flag("return_token_ids"),
        overflow_is_error=overflow == "error",
    )


class _Fields:
    """The fields of a body, each taken once; `finish` refuses those that nobody took."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        return self._body.pop(name, None)

    def whole(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRequest(f"{name} must be a whole number, got {value!r}.", name)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise BadRequest(f"{name} must be {limits}, got {value}.", name)
        return value

    def number(self, name: str, default: float, least: float, most: float, *, above: bool = False) -> float:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise BadRequest(f"{name} must be a number, got {value!r}.", name)
        if not least <= value <= most or (above and value == least):
            raise BadRequest(f"{name} must be {'above' if above else 'from'} {least} up to {most}, got {value}.", name)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise BadRequest(f"{name} must be true or false, got {value!r}.", name)
        return bool(value)

    def one_of(self, name: str, values: tuple[str, ...]) -> str | None:
        value = self.take(name)
        if value is not None and value not in values:
            raise BadRequest(f"{name} must be one of {', '.join(values)}, got {value!r}.", name)
        return value if value is None else str(value)

    def finish(self) -> None:
        for name, value in self._body.items():
            if name in _WITHOUT_EFFECT or value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL:
                raise BadRequest(f"{name} {value!r} is not supported by an embedded deployment: leave it out.", name)
            raise BadRequest(f"there is no field {name!r}: check the spelling, or leave it out.", name)


def _prompts(value: Any, vocab_size: int) -> list[Prompt]:
    """One prompt or a list of them, each a text or token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and not isinstance(value[0], str | list)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRequest("prompt must be a text, a list of token ids, or a list of either; it is missing or empty.")
    return [_prompt(each, vocab_size) for each in value]


def _prompt(value: Any, vocab_size: int) -> Prompt:
    if not value:
        raise BadRequest("prompt is empty: give at least one token.", "prompt")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise BadRequest("prompt must be a text or a list of whole numbers (token ids).", "prompt")
    if min(value) < 0 or max(value) >= vocab_size:
        wrong = next(token for token in value if not 0 <= token < vocab_size)
        raise BadRequest(f"prompt has token id {wrong}, the model's ids are 0 to {vocab_size - 1}.", "prompt")
    return tuple(value)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a list with at least one message.", "messages")
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, value: Any) -> Message:
    where = f"messages[{number}]"
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise BadRequest(f"{where} must be an object with a role and a content, got {value!r}.", "messages")
    content = value.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadRequest(f"{where} has a part that is not text: only text can be read here.", "messages")
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRequest(f"{where}.content must be a text, got {content!r}.", "messages")
    return {**value, "content": content}


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadRequest(f"stop must be a text or a list of texts, none of them empty, got {value!r}.", "stop")
    if len(stops) > _MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} texts, at most {_MAX_STOPS} are watched for.", "stop")
    return tuple(stops)


def _completion_logprobs(fields: _Fields) -> tuple[bool, bool, int]:
    """Whether logprobs are wanted, whether in the older form too (`logprobs` a number), and how many alternatives."""
    value = fields.take("logprobs")
    top = fields.whole("top_logprobs", 0, 0, _MAX_TOP_LOGPROBS) or 0
    if value is not None and not isinstance(value, int):
        raise BadRequest(f"logprobs must be true, false or a whole number, got {value!r}.", "logprobs")
    if not 0 <= (value or 0) <= _MAX_TOP_LOGPROBS:
        raise BadRequest(f"logprobs must be from 0 to {_MAX_TOP_LOGPROBS}, got {value}.", "logprobs")
    legacy = value is not None and not isinstance(value, bool)
    wanted = legacy or value is True
    if top and not wanted:
        raise BadRequest(f"top_logprobs {top} needs logprobs: true.", "top_logprobs")
    return wanted, legacy, max(top, int(value or 0) if legacy else 0)


def _include_usage(value: Any) -> bool:
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"stream_options must be an object, got {value!r}.", "stream_options")
    return bool((value or {}).get("include_usage"))
