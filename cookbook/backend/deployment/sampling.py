"""Drawing tokens from logits: seeds, temperature, top-k, top-p, and the log-probabilities of what was drawn.

One uniform number a row decides its token, by inversion of the cumulative distribution. Models and batching are not
here. Suffixes: B rows, V vocabulary, K candidates, C blocks of the vocabulary, J tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BLOCK", "Drawn", "Draws", "draw", "token_logprobs", "top_tokens", "uniforms"]

BLOCK = 128
"""Logits come in whole blocks of this many columns; columns beyond the vocabulary are -inf."""

_FEW = 1024
_BELOW_ONE = 1.0 - 2.0**-53


@dataclass(frozen=True)
class Draws:
    """How each of B rows is drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off.

    temperature_B, top_p_B: float32. top_k_B: int64. uniform_B: float64 in [0, 1).
    """

    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    uniform_B: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, int]], uniform_B: NDArray[np.float64]) -> Draws:
        """From (temperature, top_p, top_k) of each row."""
        temperatures, top_ps, top_ks = zip(*rows, strict=True)
        return cls(
            torch.tensor(temperatures, dtype=torch.float32),
            torch.tensor(top_ps, dtype=torch.float32),
            torch.tensor(top_ks, dtype=torch.int64),
            torch.from_numpy(uniform_B),
        )

    def rows(self, index: Tensor | slice) -> Draws:
        """Some of the rows."""
        parts = (self.temperature_B, self.top_p_B, self.top_k_B, self.uniform_B)
        return Draws(*(part[index] for part in parts))


@dataclass(frozen=True)
class Drawn:
    """tokens_B int64; logprobs_B under the model (temperature 1, full vocabulary), sampling_logprobs_B under the
    distribution drawn from (greedy: 0); log_normalizer_B is the logsumexp of each row. float32, nats."""

    tokens_B: Tensor
    logprobs_B: Tensor
    sampling_logprobs_B: Tensor
    log_normalizer_B: Tensor


def uniforms(seeds_B: NDArray[np.uint64], positions_B: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one a row, that are a function of seed and position alone.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195), twice: once over the seed,
    so that neighbouring seeds give unrelated streams, once over seed and position.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(seeds_B + np.uint64(0x9E3779B97F4A7C15))
        mixed = _mix(mixed + (positions_B + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits_BV: Tensor, draws: Draws) -> Drawn:
    """One token a row from float32 logits in whole blocks. FloatingPointError when a row has no finite normalizer."""
    max_B = logits_BV.amax(-1)
    weights_BV = (logits_BV - max_B[:, None]).exp_()
    log_normalizer_B = max_B + weights_BV.sum(-1).log_()
    if not bool(log_normalizer_B.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or have diverged")
    tempered_B = (draws.temperature_B != 1.0) & (draws.temperature_B > 0.0)
    if bool(tempered_B.any()):
        rows = tempered_B.nonzero()[:, 0]
        scaled_BV = (logits_BV[rows] - max_B[rows, None]).div_(draws.temperature_B[rows, None])
        weights_BV[rows] = scaled_BV.exp_()

    tokens_B = _invert(weights_BV, draws.uniform_B)
    logprobs_B = _gathered(logits_BV, tokens_B) - log_normalizer_B
    sampling_B = logprobs_B
    if bool(tempered_B.any()):
        sampling_B = torch.where(tempered_B, _log_share(weights_BV, tokens_B), sampling_B)
    tokens_B, sampling_B = _draw_special_rows(logits_BV, weights_BV, draws, tokens_B, sampling_B)
    if sampling_B is not logprobs_B:
        logprobs_B = _gathered(logits_BV, tokens_B) - log_normalizer_B
    return Drawn(tokens_B, logprobs_B, sampling_B, log_normalizer_B)


def _draw_special_rows(
    logits_BV: Tensor, weights_BV: Tensor, draws: Draws, tokens_B: Tensor, sampling_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens and sampling log-probabilities with those of greedy, top-k and top-p rows put in."""
    greedy_B = draws.temperature_B == 0.0
    cut_B = ((draws.top_k_B > 0) | (draws.top_p_B < 1.0)) & ~greedy_B
    if bool(greedy_B.any()):
        tokens_B = torch.where(greedy_B, logits_BV.argmax(-1), tokens_B)
        sampling_B = sampling_B.masked_fill(greedy_B, 0.0)
    if bool(cut_B.any()):
        rows = cut_B.nonzero()[:, 0]
        cut_tokens, cut_logprobs = _draw_cut(weights_BV[rows], draws.rows(rows))
        tokens_B, sampling_B = tokens_B.index_copy(0, rows, cut_tokens), sampling_B.index_copy(0, rows, cut_logprobs)
    return tokens_B, sampling_B


def _gathered(x_BV: Tensor, index_B: Tensor) -> Tensor:
    return x_BV.gather(1, index_B[:, None])[:, 0]


def _log_share(weights_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return _gathered(weights_BV, tokens_B).log() - weights_BV.sum(-1).log()


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform * total, which never has weight 0.

    In two levels, first over sums of blocks: a running sum over a whole vocabulary is slow and, in float32, coarse.
    """
    blocks_BCJ = weights_BV.view(len(weights_BV), -1, BLOCK)
    block_B, rest_B = _first_above(blocks_BCJ.sum(-1).double(), uniform_B)
    inside_BJ = blocks_BCJ[torch.arange(len(block_B)), block_B].double()
    token_B, _ = _first_above(inside_BJ, rest_B)
    return block_B * BLOCK + token_B


def _first_above(weights_BK: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight first exceeds uniform * total, and how far into that weight this is, in [0, 1)."""
    cumulative_BK = weights_BK.cumsum(-1)
    target_B = uniform_B.clamp(max=_BELOW_ONE) * cumulative_BK[:, -1]
    index_B = (cumulative_BK <= target_B[:, None]).sum(-1).clamp_(max=weights_BK.shape[1] - 1)
    weight_B = _gathered(weights_BK, index_B)
    before_B = _gathered(cumulative_BK, index_B) - weight_B
    return index_B, ((target_B - before_B) / weight_B).clamp_(0.0, _BELOW_ONE)


def _draw_cut(weights_BV: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Tokens of the top k, then of the smallest set of those with at least top_p of their probability."""
    vocab_size = weights_BV.shape[1]
    top_k_B = torch.where(draws.top_k_B > 0, draws.top_k_B, vocab_size).clamp(max=vocab_size)
    total_B = weights_BV.sum(-1)
    num_candidates = min(vocab_size, max(_FEW, int(draws.top_k_B.max())))
    while True:
        weights_BK, index_BK = weights_BV.topk(num_candidates)
        weights_BK = weights_BK.double()
        weights_BK.masked_fill_(torch.arange(num_candidates) >= top_k_B[:, None], 0.0)
        within_B = top_k_B <= num_candidates
        mass_B = torch.where(within_B, weights_BK.sum(-1), total_B.double()) * draws.top_p_B
        cumulative_BK = weights_BK.cumsum(-1)
        if num_candidates == vocab_size or bool((within_B | (cumulative_BK[:, -1] >= mass_B)).all()):
            break
        num_candidates = vocab_size  # a flat distribution: the few largest do not hold top_p of it
    before_BK = cumulative_BK - weights_BK
    keep_BK = before_BK < mass_B[:, None]
    keep_BK[:, 0] = True
    weights_BK.masked_fill_(~keep_BK, 0.0)
    choice_B, _ = _first_above(weights_BK, draws.uniform_B)
    logprob_B = (_gathered(weights_BK, choice_B) / weights_BK.sum(-1)).log().float()
    return _gathered(index_BK, choice_B), logprob_B


def token_logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """float32 (B,) log-probabilities of given tokens."""
    return _gathered(logits_BV, tokens_B) - logits_BV.logsumexp(-1)


def top_tokens(logits_V: Tensor, log_normalizer: float, count: int) -> list[tuple[int, float]]:
    """The most probable tokens with their log-probabilities, best first."""
    values, index = logits_V.topk(count)
    return list(zip(index.tolist(), (values - log_normalizer).tolist(), strict=True))
