"""Pairs of answers as the SDK's datums, and logprobs on the wire back as those of the answers' response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cookbook.data.datums import datum_from_row
from cookbook.data.pairs import RenderedPair
from cookbook.data.rendering import RenderedRow
from cookbook.errors import DataError, ShapeError

if TYPE_CHECKING:
    from fireworks.training.sdk import Datum

__all__ = ["pair_datums", "response_logprobs"]


def pair_datums(pairs: Sequence[RenderedPair]) -> list[Datum]:
    """Two datums a pair, chosen and then rejected, next to each other: a trainer computes their shared prompt once.

    Their weights are 1 on the response tokens, as targets: for a forward pass, or a loss on the client.

    Raises:
        DataError: an answer has no response token.
    """
    for number, pair in enumerate(pairs):
        for side, row in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not _is_response(row).any():
                raise DataError(f"the {side} answer of pair {number} (of {len(pairs)}) has no response token.")
    return [datum_from_row(row.tokens, row.weights) for pair in pairs for row in (pair.chosen, pair.rejected)]


def response_logprobs(pairs: Sequence[RenderedPair], logprobs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What a model answered to `pair_datums(pairs)`, as (chosen (n_c,), rejected (n_d,)) of the response tokens.

    A response of one token behind a prompt of P is the one target at position P-1. The gradient flows through.

    Args:
        logprobs: one (N-1,) tensor a datum, in nats, one number for each target.

    Raises:
        ShapeError: not one tensor for each datum, or not one number for each of its targets.
    """
    if len(logprobs) != 2 * len(pairs):
        raise ShapeError(f"{len(pairs)} pairs are {2 * len(pairs)} datums, and there are {len(logprobs)} answers.")
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    found = [_response(row, values) for row, values in zip(rows, logprobs, strict=True)]
    return list(zip(found[::2], found[1::2], strict=True))


def _response(row: RenderedRow, logprobs: Tensor) -> Tensor:
    if logprobs.shape != (len(row.targets),):
        raise ShapeError(
            f"an answer with {len(row.targets)} target tokens has logprobs of shape {tuple(logprobs.shape)}. "
            "There must be one for each target token."
        )
    return logprobs[_is_response(row)]


def _is_response(row: RenderedRow) -> Tensor:
    """bool (N-1,): which targets are response tokens."""
    return torch.from_numpy(row.target_weights > 0)
