"""Attention over sequences that share a prefix: the prefix once, then every continuation, in one row of tokens.

Everything but attention treats positions one by one, so a row [prefix, continuation 1, continuation 2, ...] with the
right position ids needs no more than this attention, where a continuation sees the prefix and itself. It is made known
to transformers under the name `ATTENTION`; for a call without a forest it is transformers' own SDPA attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ATTENTION", "Forest", "Tree", "register"]

ATTENTION = "cookbook_branches"

_MAX_EXPLICIT = 256  # keys: up to here plain products are twice as fast as torch's fused kernel, and still small


@dataclass(frozen=True)
class Tree:
    """Lengths in tokens of a prefix and of what follows it in each sequence; none is 0."""

    prefix: int
    continuations: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.prefix + sum(self.continuations)


class Forest:
    """Trees one after the other in a row of M tokens, and what attention needs to know of them."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = tuple(trees)
        self._pads = [_Padding(tree) for tree in trees]

    @property
    def num_tokens(self) -> int:
        return sum(tree.num_tokens for tree in self.trees)

    def positions(self) -> Tensor:
        """int64 (M,): the place of each token in its own sequence."""
        return torch.cat(
            [
                torch.arange(start, start + length)
                for tree in self.trees
                for start, length in ((0, tree.prefix), *((tree.prefix, length) for length in tree.continuations))
            ]
        )

    def sequences(self) -> list[Tensor]:
        """For each continuation of each tree the int64 (T,) indices into M of its whole sequence."""
        indices, start = [], 0
        for tree in self.trees:
            prefix_T = torch.arange(start, start + tree.prefix)
            start += tree.prefix
            for length in tree.continuations:
                indices.append(torch.cat([prefix_T, torch.arange(start, start + length)]))
                start += length
        return indices

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """(1, M, heads, D) from a query (1, heads, M, D); keys and values may have fewer heads, for several each."""
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        sizes = [size for tree in self.trees for size in (tree.prefix, tree.num_tokens - tree.prefix)]
        parts = [tensor.split_with_sizes(sizes, 2) for tensor in (query, key, value)]
        outputs = []
        for number, padding in enumerate(self._pads):
            (q, k, v), (q_own, k_own, v_own) = ([part[2 * number + own] for part in parts] for own in (0, 1))
            outputs.append(_attend(q, k, v, padding.causal, scale))
            outputs.append(padding.attention(q_own, (k, k_own), (v, v_own), scale))
        return torch.cat([output.transpose(1, 2) for output in outputs], 1)


class _Padding:
    """The continuations of one tree as a batch of G rows of C tokens, and what of prefix and C they see."""

    def __init__(self, tree: Tree) -> None:
        lengths_G = torch.tensor(tree.continuations)
        self._shape = len(lengths_G), int(lengths_G.max())
        longest = self._shape[1]
        is_real_GC = torch.arange(longest) < lengths_G[:, None]
        self._places = None if bool(is_real_GC.all()) else is_real_GC.flatten().nonzero().flatten()
        self.causal = _causal(0, tree.prefix) if tree.prefix <= _MAX_EXPLICIT else None
        self._bias = _causal(tree.prefix, longest)

    def attention(self, query: Tensor, key: Sequence[Tensor], value: Sequence[Tensor], scale: float | None) -> Tensor:
        """(1, heads, tokens, D) of the continuations, which see the prefix of `key` and `value` and themselves."""
        num_rows = self._shape[0]
        key_G, value_G = (
            torch.cat([prefix.expand(num_rows, -1, -1, -1), self._pad(own)], 2) for prefix, own in (key, value)
        )
        return self._unpad(_attend(self._pad(query), key_G, value_G, self._bias, scale))

    def _pad(self, values: Tensor) -> Tensor:
        """(G, heads, C, D) from (1, heads, tokens, D). Rows are padded on the right, where nothing real looks."""
        if self._places is not None:
            padded = values.new_zeros(1, values.shape[1], math.prod(self._shape), values.shape[3])
            values = padded.index_copy(2, self._places, values)
        return values.reshape(values.shape[1], *self._shape, values.shape[3]).transpose(0, 1)

    def _unpad(self, values: Tensor) -> Tensor:
        """(1, heads, tokens, D) from (G, heads, C, D)."""
        values = values.transpose(0, 1).flatten(1, 2)[None]
        return values if self._places is None else cast(Tensor, _Pick.apply(values, self._places))  # type: ignore[no-untyped-call]


def _causal(past: int, length: int) -> Tensor:
    """Float32 (length, past + length), to be added to scores: minus infinity where a later position would be seen."""
    return torch.full((length, past + length), -math.inf).triu(past + 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """(N, heads, T, D) softmax attention with float32 scores, in the autocast dtype where that is on.

    bias: added to the scores; None = causal.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if bias is None or bias.shape[1] > _MAX_EXPLICIT:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = None if bias is None else bias.to(dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    shape = query.shape
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float().flatten(0, 1), key.float().flatten(0, 1), value.to(dtype).flatten(0, 1)
        shares = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale).softmax(-1)
        return torch.bmm(shares.to(dtype), value).view(shape)


class _Pick(torch.autograd.Function):
    """`values.index_select(2, places)` for places that differ: its backward pass need not add, which is slow."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = values.shape
        return values.index_select(2, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        gradient = gradients[0].new_zeros(ctx.shape)
        return gradient.index_copy_(2, places, gradients[0]), None


@functools.cache
def register() -> None:
    """Make `ATTENTION` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        forest: Forest | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if forest is not None:
            return forest.attention(query, key, value, scaling), None
        output = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return cast(tuple[Tensor, None], output)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
