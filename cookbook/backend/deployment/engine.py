"""Continuous batching: requests in from any thread, one compute thread that prefills prompts and decodes all rows.

Requests with the same prompt share its prefill, later ones what is kept of earlier prompts and completions. HTTP, text
and stop strings are not known here.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cookbook.backend.deployment.cache import DecodeRows, PrefixStore, Prompt
from cookbook.backend.deployment.llama import LlamaModel, PromptPiece
from cookbook.backend.deployment.records import (
    EngineClosed,
    Generated,
    GenerationRequest,
    QueueFull,
    RunningSequence,
    Ticket,
)
from cookbook.backend.deployment.sampling import Draws, draw, token_logprobs, top_tokens, uniforms

__all__ = ["Engine", "EngineClosed", "Generated", "GenerationRequest", "QueueFull", "Ticket"]

_log = logging.getLogger(__name__)

_PREFILL_TOKENS = 1024  # in one go, so that rows being decoded do not wait long
_LOGITS_ROWS = 64  # at once: logits of a large vocabulary are large
_CACHE_BYTES = 4 * 2**30
_PREFIX_BYTES = 512 * 2**20


@dataclass(eq=False)
class _Prefill:
    """A prompt being filled in, and who waits for it."""

    prompt: Prompt
    wants_logprobs: bool
    waiters: list[RunningSequence]
    logprobs: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Load:
    version: str
    make: Callable[[LlamaModel], LlamaModel | None]
    done: Future[None]


class Engine:
    """`load` makes the model on the compute thread; what it raises, the constructor raises.

    max_batch: sequences decoded at once. max_context: tokens of prompt and completion together; less when the model
    has fewer positions. max_waiting: requests accepted beyond those that run.
    """

    def __init__(
        self, load: Callable[[], LlamaModel], version: str, *, max_batch: int, max_context: int, max_waiting: int
    ) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[RunningSequence] = deque()
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._version = version
        self._load: _Load | None = None
        self._drop_prefixes = self._closing = False
        self._prefills: deque[_Prefill] = deque()
        self._ready: deque[tuple[RunningSequence, Prompt]] = deque()
        self._rows: list[RunningSequence] = []
        self._prefixes = PrefixStore(_PREFIX_BYTES)
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(load, max_context, started), daemon=True, name="sampler"
        )
        self._thread.start()
        started.result()

    @property
    def version(self) -> str:
        """Of the weights that serve."""
        return self._version

    @property
    def is_loading(self) -> bool:
        """Whether new weights wait for sequences in flight, or are being loaded."""
        return self._load is not None

    @property
    def running(self) -> int:
        """Sequences being prefilled or decoded."""
        return self._num_running()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def submit(self, request: GenerationRequest, on_token: Callable[[int, float], None] | None = None) -> Ticket:
        """Queue a request. on_token gets each token and its log-probability on the compute thread.

        ValueError when it can never be served, QueueFull when too many wait, EngineClosed after close.
        """
        self._check(request)
        seed = secrets.randbits(64) if request.seed is None else request.seed % 2**64
        room = self.max_context - len(request.prompt)
        ticket = Ticket()
        sequence = RunningSequence(request, ticket, on_token, seed, min(request.max_tokens, room), time.monotonic())
        with self._changed:
            if self._closing:
                raise EngineClosed("the sampler is shutting down")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already, the limit is {self._max_waiting}")
            self._waiting.append(sequence)
            self._changed.notify()
        return ticket

    def load(self, version: str, make: Callable[[LlamaModel], LlamaModel | None], timeout_s: float) -> None:
        """Swap weights once the sequences in flight are done; new requests queue meanwhile.

        `make` runs on the compute thread with the present model and returns the new one (None: the present one stays).
        When it raises, the old weights stay and its exception is raised here. TimeoutError when nothing was swapped
        within the time: then it will not happen later either.
        """
        load = _Load(version, make, Future())
        with self._changed:
            if self._closing:
                raise EngineClosed("the sampler is shutting down")
            if self._load is not None:
                raise RuntimeError(f"weights {self._load.version!r} are being loaded; load {version!r} after them")
            self._load = load
            self._changed.notify()
        try:
            load.done.result(timeout_s)
        except TimeoutError:
            if load.done.cancel():
                with self._changed:
                    self._load = None
                    self._changed.notify()
                raise TimeoutError(
                    f"weights {version!r} were not loaded within {timeout_s} s: {self.running} sequences were in flight"
                ) from None
            load.done.result()  # it had begun: the swap is a matter of moments, and its outcome is known for sure

    def reset_prefix_cache(self) -> None:
        """Forget kept prompts, before the next request begins."""
        with self._changed:
            self._drop_prefixes = True

    def close(self) -> None:
        """Stop at the next step. Unanswered requests fail with EngineClosed."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _check(self, request: GenerationRequest) -> None:
        if not request.prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        if len(request.prompt) >= self.max_context + (request.max_tokens == 0):
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and leaves no room in a context of {self.max_context}"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocab_size:
            raise ValueError(f"the prompt has a token id outside 0 to {self.vocab_size - 1}")
        for name, value, is_valid in (
            ("max_tokens", request.max_tokens, request.max_tokens >= 0),
            ("temperature", request.temperature, 0.0 <= request.temperature < float("inf")),
            ("top_p", request.top_p, 0.0 < request.top_p <= 1.0),
            ("top_k", request.top_k, request.top_k >= 0),
            ("top_logprobs", request.top_logprobs, 0 <= request.top_logprobs <= self.vocab_size),
        ):
            if not is_valid:
                raise ValueError(f"{name} is out of range, got {value}")

    # Everything below runs on the compute thread.

    def _work(self, load: Callable[[], LlamaModel], max_context: int, started: Future[None]) -> None:
        try:
            self._model = load()
            self.max_context = min(max_context, self._model.max_positions)
            self.vocab_size = self._model.vocab_size
            self._cache = DecodeRows(self._model.cache_shape, self._max_batch, _CACHE_BYTES)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._turn()
                except BaseException as error:  # the thread must go on; whoever waits learns of it
                    _log.exception("sampling failed")
                    self._fail_running(error)
        self._fail_all(EngineClosed("the sampler has shut down"))

    def _wait_for_work(self) -> bool:
        """False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._load or self._waiting or self._num_running())
            return not self._closing

    def _num_running(self) -> int:
        return len(self._rows) + len(self._ready) + sum(len(prefill.waiters) for prefill in tuple(self._prefills))

    def _turn(self) -> None:
        self._drop_cancelled()
        if self._drop_prefixes:
            self._drop_prefixes = False
            self._prefixes.clear()
        load = self._load  # may be given up at any moment
        if load is None:
            self._admit()
        elif not self._num_running():
            self._swap(load)
        self._prefill()
        self._decode()

    def _drop_cancelled(self) -> None:
        for row in reversed([n for n, sequence in enumerate(self._rows) if sequence.ticket.cancelled()]):
            self._free(row)
        self._ready = deque(pair for pair in self._ready if not pair[0].ticket.cancelled())
        for prefill in self._prefills:
            prefill.waiters = [sequence for sequence in prefill.waiters if not sequence.ticket.cancelled()]
        self._prefills = deque(prefill for prefill in self._prefills if prefill.waiters)
        with self._changed:
            if any(sequence.ticket.cancelled() for sequence in self._waiting):
                self._waiting = deque(sequence for sequence in self._waiting if not sequence.ticket.cancelled())

    def _admit(self) -> None:
        with self._changed:
            room = self._max_batch - self._num_running()
            admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for sequence in admitted:
            sequence.started = time.monotonic()
            try:
                self._begin(sequence)
            except Exception as error:  # memory, above all: the next one may fit
                _fail([sequence], error)

    def _begin(self, sequence: RunningSequence) -> None:
        """Find the prompt complete, or being filled in, or start to fill it in behind what is known of it."""
        request = sequence.request
        known = self._prefixes.exact(request.prompt)
        if known is not None and (known.logprobs or not request.prompt_logprobs):
            sequence.cached_tokens = len(request.prompt)
            self._ready.append((sequence, known))
            return
        for prefill in self._prefills:
            if prefill.prompt.tokens == request.prompt and prefill.wants_logprobs >= request.prompt_logprobs:
                sequence.cached_tokens = len(request.prompt)
                prefill.waiters.append(sequence)
                return
        prompt = Prompt.blank(request.prompt, self._model.cache_shape)
        if not request.prompt_logprobs:  # they need the hidden states of all places
            self._reuse(prompt)
        sequence.cached_tokens = prompt.filled
        self._prefills.append(_Prefill(prompt, request.prompt_logprobs, [sequence]))

    def _reuse(self, prompt: Prompt) -> None:
        source, shared = self._prefixes.longest(prompt.tokens)
        if source is not None:
            prompt.start_from(source, min(shared, len(prompt.tokens) - 1))  # the last one's hidden state is needed

    def _prefill(self) -> None:
        """The next tokens of the oldest prompts."""
        pieces: list[tuple[_Prefill, PromptPiece]] = []
        room = _PREFILL_TOKENS
        for prefill in self._prefills:
            if room <= 0:
                break
            count = min(room, len(prefill.prompt.tokens) - prefill.prompt.filled)
            pieces.append((prefill, PromptPiece(prefill.prompt, count)))
            room -= count
        if not pieces:
            return
        hidden_MH = self._model.prefill([piece for _, piece in pieces])
        for (prefill, _), hidden in zip(
            pieces, torch.split(hidden_MH, [piece.count for _, piece in pieces]), strict=True
        ):
            self._after_prefill(prefill, hidden)

    def _after_prefill(self, prefill: _Prefill, hidden_MH: Tensor) -> None:
        prompt = prefill.prompt
        if prefill.wants_logprobs:
            prefill.logprobs += self._prompt_logprobs(prompt, hidden_MH)
        if prompt.filled < len(prompt.tokens):
            return
        prompt.last_hidden_H = hidden_MH[-1].clone()
        prompt.logprobs = [None, *prefill.logprobs] if prefill.wants_logprobs else None
        self._prefills.remove(prefill)
        self._prefixes.put(prompt)
        self._ready.extend((sequence, prompt) for sequence in prefill.waiters)

    def _prompt_logprobs(self, prompt: Prompt, hidden_MH: Tensor) -> list[float]:
        """Of the tokens that follow the places just filled in."""
        start = prompt.filled - len(hidden_MH)
        following = torch.from_numpy(prompt.array[start + 1 : prompt.filled + 1])
        result: list[float] = []
        for hidden, tokens in zip(
            torch.split(hidden_MH[: len(following)], _LOGITS_ROWS), torch.split(following, _LOGITS_ROWS), strict=True
        ):
            result += token_logprobs(self._model.logits(hidden), tokens).tolist()
        return result

    def _decode(self) -> None:
        """One token for every row, and the first token of those whose prompt is complete."""
        num_old = len(self._rows)
        fresh = self._take_ready()
        if not self._rows:
            return
        parts = [self._model.decode(*self._last_tokens(num_old), self._cache)] if num_old else []
        self._cache.advance(num_old)
        if fresh:
            parts.append(torch.stack(fresh))
        self._draw(torch.cat(parts))
        for row in reversed(range(len(self._rows))):
            self._finish_if_complete(row)

    def _take_ready(self) -> list[Tensor]:
        """Give rows to sequences whose prompt is complete; the hidden states that their first tokens come from."""
        hidden = []
        while self._ready:
            sequence, prompt = self._ready[0]
            if not self._cache.fits(sequence.num_positions):
                break
            sequence.decoding = time.monotonic()
            if sequence.request.prompt_logprobs:
                sequence.prompt_logprobs = list(prompt.logprobs or [])
            self._cache.append(prompt, sequence.num_positions)
            self._ready.popleft()
            self._rows.append(sequence)
            assert prompt.last_hidden_H is not None
            hidden.append(prompt.last_hidden_H)
        return hidden

    def _last_tokens(self, num_rows: int) -> tuple[Tensor, Tensor]:
        rows = self._rows[:num_rows]
        positions = [len(sequence.request.prompt) + len(sequence.tokens) - 1 for sequence in rows]
        return torch.tensor([sequence.tokens[-1] for sequence in rows]), torch.tensor(positions)

    def _draw(self, hidden_BH: Tensor) -> None:
        rows = self._rows
        seeds = np.array([sequence.seed for sequence in rows], dtype=np.uint64)
        positions = np.array([len(sequence.tokens) for sequence in rows], dtype=np.uint64)
        settings = [(s.request.temperature, s.request.top_p, s.request.top_k) for s in rows]
        draws = Draws.of(settings, uniforms(seeds, positions))
        for start in range(0, len(rows), _LOGITS_ROWS):
            part = slice(start, start + _LOGITS_ROWS)
            logits_BV = self._model.logits(hidden_BH[part])
            drawn = draw(logits_BV, draws.rows(part))
            results = (drawn.tokens_B.tolist(), drawn.logprobs_B.tolist(), drawn.sampling_logprobs_B.tolist())
            for row, (sequence, token, logprob, sampling) in enumerate(zip(rows[part], *results, strict=True)):
                if sequence.max_tokens == 0:
                    continue
                sequence.tokens.append(token)
                sequence.logprobs.append(logprob)
                sequence.sampling_logprobs.append(sampling)
                if count := sequence.request.top_logprobs:
                    normalizer = float(drawn.log_normalizer_B[row])
                    sequence.top.append(top_tokens(logits_BV[row], normalizer, count))
                sequence.tell(token, logprob)

    def _finish_if_complete(self, row: int) -> None:
        sequence = self._rows[row]
        reason = sequence.finish_reason()
        if sequence.error is not None:
            self._free(row)
            _fail([sequence], sequence.error)
        elif reason is not None:
            self._finish(row, reason)

    def _finish(self, row: int, reason: Literal["stop", "length"]) -> None:
        sequence = self._rows[row]
        self._keep(row, sequence)
        self._free(row)
        if not sequence.ticket.set_running_or_notify_cancel():
            return
        sequence.ticket.set_result(
            Generated(
                tokens=sequence.tokens,
                logprobs=sequence.logprobs,
                sampling_logprobs=sequence.sampling_logprobs,
                top=sequence.top,
                prompt_logprobs=sequence.prompt_logprobs,
                finish_reason=reason,
                version=self._version,
                queued_s=sequence.started - sequence.submitted,
                prefill_s=sequence.decoding - sequence.started,
                decode_s=time.monotonic() - sequence.decoding,
                cached_prompt_tokens=sequence.cached_tokens,
            )
        )

    def _keep(self, row: int, sequence: RunningSequence) -> None:
        """Prompt and completion may be the start of the next prompt. (The last token was never fed to the model.)"""
        tokens = (*sequence.request.prompt, *sequence.tokens[:-1])
        if len(tokens) > len(sequence.request.prompt):
            self._prefixes.put(self._cache.copy(row, tokens))

    def _free(self, row: int) -> None:
        """The last row takes its place, here as in the cache."""
        self._cache.remove(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def _swap(self, load: _Load) -> None:
        if not load.done.set_running_or_notify_cancel():
            return
        try:
            model = load.make(self._model)
            if model is not None:
                self._check_same_kind(model)
                self._model = model
            self._version = load.version
            self._prefixes.clear()
        except BaseException as error:
            _log.warning("weights %r were not loaded: %s", load.version, error)
            self._end_load()
            load.done.set_exception(error)
            return
        self._end_load()
        load.done.set_result(None)

    def _end_load(self) -> None:
        with self._changed:
            self._load = None

    def _check_same_kind(self, model: LlamaModel) -> None:
        ours, theirs = (self._model.cache_shape, self._model.vocab_size), (model.cache_shape, model.vocab_size)
        if ours != theirs or model.max_positions < self.max_context:
            raise ValueError(f"the new weights are of another kind of model: {theirs}, served is {ours}")

    def _fail_running(self, error: BaseException) -> None:
        sequences = [*self._rows, *(sequence for sequence, _ in self._ready)]
        sequences += [sequence for prefill in self._prefills for sequence in prefill.waiters]
        self._rows, self._ready, self._prefills = [], deque(), deque()
        self._cache = DecodeRows(self._model.cache_shape, self._max_batch, _CACHE_BYTES)  # a NaN in it would go on
        self._prefixes.clear()
        _fail(sequences, error)

    def _fail_all(self, error: BaseException) -> None:
        self._fail_running(error)
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
            load, self._load = self._load, None
        _fail(waiting, error)
        if load is not None and load.done.set_running_or_notify_cancel():
            load.done.set_exception(error)


def _fail(sequences: Sequence[RunningSequence], error: BaseException) -> None:
    for sequence in sequences:
        if sequence.ticket.set_running_or_notify_cancel():
            sequence.ticket.set_exception(error)
