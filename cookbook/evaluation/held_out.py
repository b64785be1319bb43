"""Held-out evaluation under teacher forcing, with the trainer's forward pass. Sampling is not here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cookbook.client import ReconnectableClient
from cookbook.data.datums import datum_from_row
from cookbook.deadlines import Deadline
from cookbook.errors import DataError, TrainerLost

if TYPE_CHECKING:
    from cookbook.data.rendering import RenderedRow

__all__ = ["EvalResult", "evaluate_held_out"]


@dataclass(frozen=True)
class EvalResult:
    """Numbers over the trained tokens (those with a weight) of held-out rows."""

    loss: float
    """Mean negative log-likelihood, weighted by the weights, in nats a token."""
    token_accuracy: float
    """Share of tokens that are the model's most likely one, given all tokens before them."""
    exact_match: float
    """Share of rows of which every token is: greedy decoding would give exactly this answer."""
    num_tokens: int
    num_rows: int
    """Rows with at least one trained token; others are not counted anywhere."""

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Sums:
    loss: float = 0.0
    weight: float = 0.0
    correct: int = 0
    tokens: int = 0
    exact: int = 0
    rows: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Sums(*(mine + theirs for mine, theirs in pairs))


def evaluate_held_out(
    client: ReconnectableClient, rows: Iterable[RenderedRow], *, chunk: int = 64, timeout_s: float | None = None
) -> EvalResult:
    """Evaluate the client's model; nothing is trained.

    Args:
        rows: rendered rows, read once and lazily.
        chunk: rows in one request.
        timeout_s: seconds for all rows; None = the client's default for each request.

    Raises:
        DataError: no row has a trained token.
        RequestRejected: a row is too long for the trainer, for one.
        TrainerLost: the trainer is gone, or the deadline has passed.
    """
    deadline = None if timeout_s is None else Deadline(timeout_s)
    remaining = iter(rows)
    sums = _Sums()
    while batch := list(itertools.islice(remaining, chunk)):
        if deadline is not None and deadline.expired:
            raise TrainerLost(
                f"evaluation had finished {sums.rows} rows when its {timeout_s:g} s were over. "
                "Raise evaluation.timeout_s, or lower evaluation.max_examples."
            )
        output = client.forward(
            [datum_from_row(row.tokens, row.weights) for row in batch],
            "cross_entropy",
            {"top_k": 1},
            timeout_s=None if deadline is None else deadline.remaining(),
        )
        for row, found in zip(batch, output.loss_fn_outputs, strict=True):
            sums += _score(row, found)
    if sums.rows == 0:
        raise DataError("no held-out row has a trained token. Look at evaluation.dataset and train_on_what.")
    return EvalResult(
        loss=sums.loss / sums.weight,
        token_accuracy=sums.correct / sums.tokens,
        exact_match=sums.exact / sums.rows,
        num_tokens=sums.tokens,
        num_rows=sums.rows,
    )


def _score(row: RenderedRow, found: dict[str, Any]) -> _Sums:
    """The sums of one row. The trainer's `logprobs` are (N-1,), its `top_k_indices` (N-1, 1)."""
    weights_T: NDArray[np.float64] = np.asarray(row.weights[1:], dtype=np.float64)
    targets_T = np.asarray(row.tokens[1:])
    trained_T = weights_T > 0
    if not trained_T.any():
        return _Sums()
    logprobs_T = found["logprobs"].to_numpy().astype(np.float64)
    hits_T = found["top_k_indices"].to_numpy()[:, 0][trained_T] == targets_T[trained_T]
    return _Sums(
        loss=float(-(weights_T * logprobs_T).sum()),
        weight=float(weights_T.sum()),
        correct=int(hits_T.sum()),
        tokens=len(hits_T),
        exact=int(hits_T.all()),
        rows=1,
    )
