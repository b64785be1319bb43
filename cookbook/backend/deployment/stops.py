"""Text of a completion as its tokens arrive, and where stop strings end it.

Token ids are never changed here: a stop string cuts the text, the ids stay those that were sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

__all__ = ["Decode", "DeltaText", "StopWatch", "TextStream", "cut_at_stop"]

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included, each id standing for itself. Thread-safe."""

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens.

    A token may hold part of a character, and may read differently at the start of a text than within it. So a piece is
    given out only once it ends in a whole character, and each is decoded with the tokens of the piece before it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0  # first token that is decoded along
        self._given = 0  # first token whose text has not been given out
        self.text = ""

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return len(self._tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add; empty while a character is incomplete."""
        self._tokens.extend(tokens)
        piece = self._pending()
        return "" if piece.endswith(_INCOMPLETE) else self._give(piece)

    def finish(self) -> str:
        """What is left, with a mark for each byte sequence that never became a character."""
        return self._give(self._pending())

    def _pending(self) -> str:
        known = self._decode(self._tokens[self._context : self._given])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _give(self, piece: str) -> str:
        self._context, self._given = self._given, len(self._tokens)
        self.text += piece
        return piece


class StopWatch:
    """Says when the text of a completion contains one of the stop strings. One watch for each completion."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._stream = TextStream(decode)
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text of `tokens`, which has grown since the last call, contains a stop string."""
        start = len(self._stream.text) - self._longest + 1
        self._stream.push(tokens[self._stream.num_tokens :])
        return any(self._stream.text.find(stop, max(0, start)) >= 0 for stop in self._stops)


class DeltaText:
    """What of a completion's text may be sent on so far: never part of a stop string, nor of a character."""

    def __init__(self, decode: Decode, stops: Sequence[str], end_tokens: Collection[int]) -> None:
        self._stream = TextStream(decode)
        self._stops = tuple(stops)
        self._end_tokens = end_tokens
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that may be sent now that `token` was sampled."""
        if token in self._end_tokens:
            return ""
        self._stream.push([token])
        text = cut_at_stop(self._stream.text, self._stops)[0]
        return self._send(text[: len(text) - _held_back(text, self._stops)])

    def finish(self, text: str) -> str:
        """The rest, given the completion's final text."""
        return self._send(text)

    def _send(self, text: str) -> str:
        delta = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return delta


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
