"""The completions of one request in the engine: submitted together, followed as they grow, cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from cookbook.backend.deployment.answers import Choice
from cookbook.backend.deployment.engine import Engine, Generated, GenerationRequest, Ticket
from cookbook.backend.deployment.stops import DeltaText, StopWatch, TextStream, cut_at_stop
from cookbook.backend.deployment.tokenizer import TextModel
from cookbook.backend.deployment.wire import BadRequest, Call

__all__ = ["Generation", "Piece"]


@dataclass(frozen=True)
class Piece:
    """What a choice has grown by, and under which snapshot. `choice` is there with the last piece of each."""

    index: int
    text: str
    version: str
    choice: Choice | None = None


class Generation:
    """All choices of a request. Choice i belongs to prompt i // n, and draws with the request's seed + i % n."""

    def __init__(self, engine: Engine, text: TextModel, call: Call, prompts: Sequence[tuple[int, ...]]) -> None:
        """Submit everything or nothing.

        A stream's pieces come token by token. With raw_output each choice comes at once, as its client reads it.

        Raises:
            QueueFull: not all of it can wait.
            BadRequest: a prompt does not fit the context.
        """
        self._engine = engine
        self._text = text
        self._call = call
        self._prompts = [prompt for prompt in prompts for _ in range(call.n)]
        self._end_tokens = frozenset() if call.ignore_eos else text.end_tokens
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, int | None, str]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        growing = call.stream and not call.raw_output
        limits = [_max_tokens(prompt, call, engine.max_context) for prompt in self._prompts]
        try:
            for index, limit in enumerate(limits):
                self._submit(index, limit, growing)
        except BaseException:
            self.cancel()
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is sampled, as it comes, until every choice has ended. Raises what the engine failed with."""
        texts = [DeltaText(self._text.decode, self._call.stop, self._end_tokens) for _ in self._prompts]
        unfinished = len(self._prompts)
        while unfinished:
            index, token, version = await self._news.get()
            if token is None:
                choice = self._choice(index)
                unfinished -= 1
                yield Piece(index, texts[index].finish(choice.text), choice.generated.version, choice)
            elif text := texts[index].push(token):
                yield Piece(index, text, version)

    async def choices(self) -> list[Choice]:
        """All choices in order, when the last has ended."""
        done = [piece.choice async for piece in self.pieces() if piece.choice is not None]
        return sorted(done, key=lambda choice: choice.index)

    def cancel(self) -> None:
        """Stop sampling what has not ended."""
        for ticket in self._tickets:
            ticket.cancel()

    def _submit(self, index: int, max_tokens: int, growing: bool) -> None:
        call = self._call
        request = GenerationRequest(
            prompt=self._prompts[index],
            max_tokens=max_tokens,
            temperature=call.temperature,
            top_p=call.top_p,
            top_k=call.top_k,
            seed=None if call.seed is None else call.seed + index % call.n,
            eos_tokens=self._end_tokens,
            top_logprobs=call.top_logprobs,
            prompt_logprobs=call.logprobs and call.echo != 0,
            is_complete=StopWatch(self._text.decode, call.stop) if call.stop else None,
        )
        try:
            ticket = self._engine.submit(request, on_token=self._token_sender(index) if growing else None)
        except ValueError as error:  # a token that the model does not know, for one
            raise BadRequest(str(error)) from error
        self._tickets.append(ticket)
        ticket.add_done_callback(lambda _: self._tell(index, None, ""))

    def _token_sender(self, index: int) -> Callable[[int, float], None]:
        # On the compute thread, where no load can come between a token and the version that sampled it.
        return lambda token, _: self._tell(index, token, self._engine.version)

    def _tell(self, index: int, token: int | None, version: str) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, (index, token, version))

    def _choice(self, index: int) -> Choice:
        generated: Generated = self._tickets[index].result(0)
        tokens = generated.tokens
        if tokens and tokens[-1] in self._end_tokens:
            tokens = tokens[:-1]
        stream = TextStream(self._text.decode)
        stream.push(tokens)
        stream.finish()
        text, was_cut = cut_at_stop(stream.text, self._call.stop)
        reason = "stop" if was_cut else generated.finish_reason
        return Choice(index, self._prompts[index], generated, text, reason)


def _max_tokens(prompt: tuple[int, ...], call: Call, max_context: int) -> int:
    room = max_context - len(prompt)
    if room < (call.max_tokens != 0):
        raise BadRequest(
            f"prompt has {len(prompt)} tokens, which leaves no room for an answer in the context of {max_context} "
            "tokens: shorten it.",
            "prompt",
        )
    if call.max_tokens is not None and call.max_tokens > room and call.overflow_is_error:
        raise BadRequest(
            f"max_tokens {call.max_tokens} and a prompt of {len(prompt)} tokens do not fit the context of "
            f"{max_context} tokens: ask for at most {room}.",
            "max_tokens",
        )
    return room if call.max_tokens is None else min(call.max_tokens, room)
