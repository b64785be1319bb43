"""Keys and values of attention: the rows of sequences being decoded, and prompts kept for those that share a prefix.

The model writes into both; which sequence owns which row is the engine's matter. Keys lie with positions last, as the
product of a few queries with them is then three times as fast.
Suffixes: L layers, R rows, G key/value heads, T positions, D head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["CacheShape", "DecodeRows", "PrefixStore", "Prompt"]

_POSITIONS = 64


@dataclass(frozen=True)
class CacheShape:
    """Sizes of one position's keys and values."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_position(self) -> int:
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.dtype.itemsize

    def keys(self, *rows_and_positions: int) -> Tensor:
        """Zeros (L, G, D, T), or (L, R, G, D, T)."""
        *rows, positions = rows_and_positions
        return torch.zeros(self.num_layers, *rows, self.num_heads, self.head_dim, positions, dtype=self.dtype)

    def values(self, *rows_and_positions: int) -> Tensor:
        """Zeros (L, G, T, D), or (L, R, G, T, D)."""
        *rows, positions = rows_and_positions
        return torch.zeros(self.num_layers, *rows, self.num_heads, positions, self.head_dim, dtype=self.dtype)


class Prompt:
    """Tokens whose keys and values are known up to `filled`; last_hidden_H once all are.

    A finished sequence is kept in this form too, without last_hidden_H: its continuation may come as the next prompt.
    """

    def __init__(self, tokens: tuple[int, ...], keys_LGDT: Tensor, values_LGTD: Tensor, filled: int = 0) -> None:
        self.tokens = tokens
        self.array = np.array(tokens, dtype=np.int64)
        self.keys_LGDT = keys_LGDT
        self.values_LGTD = values_LGTD
        self.filled = filled
        self.last_hidden_H: Tensor | None = None
        self.logprobs: list[float | None] | None = None

    @classmethod
    def blank(cls, tokens: tuple[int, ...], shape: CacheShape) -> Prompt:
        """Nothing filled in."""
        return cls(tokens, shape.keys(len(tokens)), shape.values(len(tokens)))

    @property
    def num_bytes(self) -> int:
        return self.keys_LGDT.nbytes + self.values_LGTD.nbytes

    def start_from(self, other: Prompt, count: int) -> None:
        """Take over the first `count` keys and values."""
        self.keys_LGDT[..., :count] = other.keys_LGDT[..., :count]
        self.values_LGTD[:, :, :count] = other.values_LGTD[:, :, :count]
        self.filled = count

    def shared_with(self, tokens: NDArray[np.int64]) -> int:
        """How many first tokens are the same and have keys and values here."""
        count = min(self.filled, len(tokens))
        different = np.flatnonzero(self.array[:count] != tokens[:count])
        return int(different[0]) if len(different) else count


class PrefixStore:
    """Complete prompts, the least recently used dropped when they take more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._prompts: OrderedDict[tuple[int, ...], Prompt] = OrderedDict()

    def put(self, prompt: Prompt) -> None:
        """Keep a prompt in place of one with the same tokens."""
        self._drop(self._prompts.get(prompt.tokens))
        self._prompts[prompt.tokens] = prompt
        self._num_bytes += prompt.num_bytes
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._prompts.values())))

    def exact(self, tokens: tuple[int, ...]) -> Prompt | None:
        """The prompt with exactly these tokens, ready for a first token to be drawn."""
        prompt = self._prompts.get(tokens)
        if prompt is None or prompt.last_hidden_H is None:
            return None
        self._prompts.move_to_end(tokens)
        return prompt

    def longest(self, tokens: tuple[int, ...]) -> tuple[Prompt | None, int]:
        """The prompt that shares the most first tokens, and how many."""
        array = np.array(tokens, dtype=np.int64)
        best, shared = None, 0
        for prompt in self._prompts.values():
            if (count := prompt.shared_with(array)) > shared:
                best, shared = prompt, count
        if best is not None:
            self._prompts.move_to_end(best.tokens)
        return best, shared

    def clear(self) -> None:
        """Forget everything, as new weights demand."""
        self._prompts.clear()
        self._num_bytes = 0

    def _drop(self, prompt: Prompt | None) -> None:
        if prompt is not None:
            del self._prompts[prompt.tokens]
            self._num_bytes -= prompt.num_bytes


class DecodeRows:
    """Keys and values of the sequences being decoded, in rows 0 to n - 1 of two tensors, so that a step slices them.

    They grow as needed, up to `max_bytes`; `fits` says whether one more sequence may come in.
    """

    def __init__(self, shape: CacheShape, max_rows: int, max_bytes: int) -> None:
        self.shape = shape
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self.keys_LRGDT = shape.keys(1, _POSITIONS)
        self.values_LRGTD = shape.values(1, _POSITIONS)
        self._used: list[int] = []
        self._needed: list[int] = []

    @property
    def num_rows(self) -> int:
        return len(self._used)

    def fits(self, num_positions: int) -> bool:
        """Whether a row for so many positions fits beside those that there are. Alone it always does."""
        rows = self.num_rows + 1
        return rows == 1 or (rows <= self._max_rows and self._size(rows, num_positions) <= self._max_bytes)

    def append(self, prompt: Prompt, num_positions: int) -> int:
        """A new last row that starts with the prompt and has room for `num_positions`. Returns its index."""
        row, filled = self.num_rows, prompt.filled
        self._reserve(row + 1, num_positions)
        self.keys_LRGDT[:, row, :, :, :filled] = prompt.keys_LGDT[..., :filled]
        self.values_LRGTD[:, row, :, :filled] = prompt.values_LGTD[:, :, :filled]
        self._used.append(filled)
        self._needed.append(num_positions)
        return row

    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        used, needed = self._used.pop(), self._needed.pop()
        last = self.num_rows
        if row != last:
            self.keys_LRGDT[:, row, :, :, :used] = self.keys_LRGDT[:, last, :, :, :used]
            self.values_LRGTD[:, row, :, :used] = self.values_LRGTD[:, last, :, :used]
            self._used[row], self._needed[row] = used, needed

    def advance(self, num_rows: int) -> None:
        """The first rows have one position more."""
        for row in range(num_rows):
            self._used[row] += 1

    def copy(self, row: int, tokens: tuple[int, ...]) -> Prompt:
        """What a row holds, which are these tokens."""
        used = self._used[row]
        keys = self.keys_LRGDT[:, row, :, :, :used].clone(memory_format=torch.contiguous_format)
        values = self.values_LRGTD[:, row, :, :used].clone(memory_format=torch.contiguous_format)
        return Prompt(tokens, keys, values, filled=used)

    def clear(self) -> None:
        """Drop all rows."""
        self._used.clear()
        self._needed.clear()

    def _positions(self, num_positions: int) -> int:
        return -(-max([num_positions, *self._needed]) // _POSITIONS) * _POSITIONS

    def _size(self, num_rows: int, num_positions: int) -> int:
        return num_rows * self._positions(num_positions) * self.shape.bytes_per_position

    def _reserve(self, num_rows: int, num_positions: int) -> None:
        old_keys, old_values = self.keys_LRGDT, self.values_LRGTD
        old_rows, old_positions = old_values.shape[1], old_values.shape[3]
        if num_rows <= old_rows and num_positions <= old_positions:
            return
        rows = old_rows if num_rows <= old_rows else min(self._max_rows, 2 * old_rows)
        if self._size(rows, num_positions) > self._max_bytes:
            rows = num_rows
        places = self._positions(num_positions)
        # Both or none: with one of them the keys would lie in other places than the values.
        self.keys_LRGDT, self.values_LRGTD = self.shape.keys(rows, places), self.shape.values(rows, places)
        kept_rows, kept = self.num_rows, max(self._used, default=0)
        self.keys_LRGDT[:, :kept_rows, :, :, :kept] = old_keys[:, :kept_rows, :, :, :kept]
        self.values_LRGTD[:, :kept_rows, :, :kept] = old_values[:, :kept_rows, :, :kept]
