"""What goes into the engine and what comes out of it, and the state of one request in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["EngineClosed", "Generated", "GenerationRequest", "QueueFull", "RunningSequence", "Ticket"]


class QueueFull(RuntimeError):
    """As many requests wait as may. Try again later."""


class EngineClosed(RuntimeError):
    """The engine has stopped; the request will not be answered."""


@dataclass(frozen=True)
class GenerationRequest:
    """One completion. temperature 0 is greedy, top_p 1 and top_k 0 are off, without a seed draws differ each time.

    is_complete: called on the compute thread with all tokens so far; True ends the completion. It must be cheap.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    eos_tokens: frozenset[int] = frozenset()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    is_complete: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True)
class Generated:
    """A completion; the token that ended it is part of it. Log-probabilities in nats, one a token.

    logprobs: under the model (temperature 1, full vocabulary). sampling_logprobs: under the distribution drawn from,
    0 when greedy. top: the most probable tokens at each place, best first. prompt_logprobs: None for the first token;
    empty unless asked for. version: of the weights behind all of it.
    """

    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    top: list[list[tuple[int, float]]]
    prompt_logprobs: list[float | None]
    finish_reason: Literal["stop", "length"]
    version: str
    queued_s: float
    prefill_s: float
    decode_s: float
    cached_prompt_tokens: int


class Ticket(Future[Generated]):
    """The answer to come. `cancel()` frees its place at the next step, whether it waits or runs."""


@dataclass(eq=False)
class RunningSequence:
    """A request on its way through the engine. Times are of time.monotonic()."""

    request: GenerationRequest
    ticket: Ticket
    on_token: Callable[[int, float], None] | None
    seed: int
    max_tokens: int
    submitted: float
    started: float = 0.0
    decoding: float = 0.0
    cached_tokens: int = 0
    prompt_logprobs: list[float | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    error: Exception | None = None

    @property
    def num_positions(self) -> int:
        return len(self.request.prompt) + self.max_tokens

    def tell(self, token: int, logprob: float) -> None:
        """Call on_token."""
        try:
            if self.on_token is not None:
                self.on_token(token, logprob)
        except Exception as error:  # only this request fails by its callback
            self.error = error

    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Why the completion ends here, or None."""
        if self.tokens and self.tokens[-1] in self.request.eos_tokens:
            return "stop"
        if self.tokens and self._is_complete():
            return "stop"
        return "length" if len(self.tokens) >= self.max_tokens else None

    def _is_complete(self) -> bool:
        try:
            return self.request.is_complete is not None and self.request.is_complete(self.tokens)
        except Exception as error:
            self.error = error
            return False
