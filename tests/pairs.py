"""Pairs of answers as rendered, made from numbers: for tests that need no text."""

from __future__ import annotations

import numpy as np

from cookbook.data.pairs import RenderedPair
from cookbook.data.rendering import RenderedRow

__all__ = ["make_pair", "make_pairs"]


def make_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> RenderedPair:
    """A pair whose answers are all that follows the prompt."""

    def side(answer: list[int]) -> RenderedRow:
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        return RenderedRow(np.array(prompt + answer, np.int32), np.array(weights, np.float32))

    return RenderedPair(side(chosen), side(rejected), len(prompt))


def make_pairs(count: int, seed: int = 0) -> list[RenderedPair]:
    """Pairs of the tiny model's bytes, of different lengths, no two alike."""
    random = np.random.default_rng(seed)

    def some(least: int, most: int) -> list[int]:
        return [int(token) for token in random.integers(0, 256, random.integers(least, most))]

    return [make_pair([256, *some(3, 20)], some(1, 12), some(1, 12)) for _ in range(count)]
