"""The head of one micro-batch, forward and backward: logprobs of targets without the logits of all positions at once.

Suffixes: M positions computed, P (position, target) pairs, H hidden, V vocabulary. Which positions are computed, and
what a loss makes of their logprobs, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cookbook.backend.decoder import Decoder

__all__ = ["Head", "chunk_size", "in_chunks"]

_LOGITS_PER_CHUNK = 2**25  # 128 MiB of float32: large enough for fast matrix products, small beside the weights
_LOGITS_KEPT = 2**27  # 512 MiB: logits kept from the forward to the backward pass; more are computed again


def chunk_size(decoder: Decoder) -> int:
    """Positions whose logits exist at the same time."""
    return max(1, _LOGITS_PER_CHUNK // decoder.vocab_size)


def in_chunks(values: Tensor, size: int) -> list[Tensor]:
    """Slices of at most `size`."""
    return [values[start : start + size] for start in range(0, len(values), size)]


@dataclass(frozen=True)
class _Kept:
    """A chunk between forward and backward: head input (a leaf), head output, and exp(logits - max) with its sums."""

    hidden_MH: Tensor
    logits_MV: Tensor
    exponentials_MV: Tensor
    sums_M: Tensor


class Head:
    """The head of one micro-batch, in chunks of positions, so that logits never exist for all positions at once.

    Positions that are trained come first, so that a chunk needs a backward pass as a whole or not at all.
    """

    def __init__(
        self,
        decoder: Decoder,
        hidden_MH: Tensor,
        places: Sequence[Tensor],
        targets: Sequence[Tensor],
        trained: list[Tensor],
    ):
        self.hidden_MH = hidden_MH
        self._decoder = decoder
        self._shapes = [tensor.shape for tensor in targets]
        widths = [shape[1] if len(shape) == 2 else 1 for shape in self._shapes]
        self._targets_P = torch.cat([tensor.flatten() for tensor in targets])
        pairs_a_position = torch.cat(
            [torch.full((shape[0],), width) for shape, width in zip(self._shapes, widths, strict=True)]
        )
        self._position_P = torch.cat(list(places)).repeat_interleave(pairs_a_position)
        is_trained_M = torch.zeros(len(hidden_MH), dtype=torch.bool)
        self._is_trained_P = torch.cat([mask.flatten() for mask in trained])
        is_trained_M[self._position_P[self._is_trained_P]] = True
        size = chunk_size(decoder)
        self._trained_chunks = in_chunks(is_trained_M.nonzero().flatten(), size)
        self._other_chunks = in_chunks((~is_trained_M).nonzero().flatten(), size)
        self._kept: dict[int, _Kept] = {}

    def is_for(self, trained: list[Tensor]) -> bool:
        """Whether these are the trained targets: the chunks depend on them."""
        return torch.equal(self._is_trained_P, torch.cat([mask.flatten() for mask in trained]))

    def logprobs(self, keeps: bool) -> list[Tensor]:
        """Of all targets, per datum in the shape of its targets. keeps: what `backward` needs of them."""
        logprobs_P = torch.empty(len(self._targets_P))
        budget = _LOGITS_KEPT if keeps else 0
        for number, positions in enumerate(self._trained_chunks):
            kept = self._forward_chunk(positions, logprobs_P)
            budget -= kept.logits_MV.numel()
            if budget >= 0:
                self._kept[number] = kept
        with torch.no_grad():
            for positions in self._other_chunks:
                self._forward_chunk(positions, logprobs_P)
        sizes = [math.prod(shape) for shape in self._shapes]
        return [
            values.reshape(shape)
            for values, shape in zip(logprobs_P.split_with_sizes(sizes), self._shapes, strict=True)
        ]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """From d loss / d logprob per datum to the gradients of head and decoder."""
        gradient_P = torch.cat([gradient.flatten() for gradient in gradients])
        if not self._trained_chunks:
            return
        hidden_gradient_MH = torch.zeros(self.hidden_MH.shape)
        for number, positions in enumerate(self._trained_chunks):
            kept = self._kept.pop(number, None) or self._forward_chunk(positions, None)
            torch.autograd.backward(kept.logits_MV, self._logits_gradient(kept, positions, gradient_P))
            assert kept.hidden_MH.grad is not None
            hidden_gradient_MH[positions] = kept.hidden_MH.grad
        if self.hidden_MH.requires_grad:
            torch.autograd.backward(self.hidden_MH, hidden_gradient_MH.to(self.hidden_MH.dtype))

    def _forward_chunk(self, positions: Tensor, logprobs_P: Tensor | None) -> _Kept:
        hidden_MH = self.hidden_MH.detach()[positions].float().requires_grad_(torch.is_grad_enabled())
        logits_MV = self._decoder.logits(hidden_MH)
        # In place: a linear layer does not need its output for its backward pass.
        values_MV = logits_MV.detach()
        max_M = values_MV.amax(-1)
        pairs, row_P = self._pairs(positions)
        target_logits_P = values_MV[row_P, self._targets_P[pairs]]
        exponentials_MV = values_MV.sub_(max_M[:, None]).exp_()
        sums_M = exponentials_MV.sum(-1)
        if logprobs_P is not None:
            logprobs_P[pairs] = target_logits_P - (max_M + sums_M.log())[row_P]
        return _Kept(hidden_MH, logits_MV, exponentials_MV, sums_M)

    def _logits_gradient(self, kept: _Kept, positions: Tensor, gradient_P: Tensor) -> Tensor:
        """sum over targets k of g_k (onehot_k - softmax), (M, V); overwrites the exponentials."""
        pairs, row_P = self._pairs(positions)
        chunk_gradient_P = gradient_P[pairs]
        total_M = torch.zeros(len(positions)).index_add_(0, row_P, chunk_gradient_P)
        gradient_MV = kept.exponentials_MV.mul_((-total_M / kept.sums_M)[:, None])
        return gradient_MV.index_put_((row_P, self._targets_P[pairs]), chunk_gradient_P, accumulate=True)

    def _pairs(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the pairs at these positions, and for each the row of its position in the chunk."""
        row_M = torch.full((len(self.hidden_MH),), -1)
        row_M[positions] = torch.arange(len(positions))
        row_P = row_M[self._position_P]
        pairs = (row_P >= 0).nonzero().flatten()
        return pairs, row_P[pairs]
