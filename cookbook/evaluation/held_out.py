"""Held-out evaluation by forward passes on the trainer: loss, token accuracy and exact match. No sampling, no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from cookbook.client import ReconnectableClient
from cookbook.data.datums import datum_from_row
from cookbook.data.rendering import RenderedRow
from cookbook.deadlines import Deadline
from cookbook.errors import DataError

__all__ = ["EvalResult", "evaluate_held_out"]

ROWS_A_REQUEST = 64


@dataclass(frozen=True)
class EvalResult:
    """Numbers over the trained tokens of held-out rows."""

    loss: float
    """Mean negative log-likelihood, nats a token, weighted as in training."""
    token_accuracy: float
    """Share of the trained tokens that are the most likely token given all before them."""
    exact_match: float
    """Share of rows all of whose trained tokens are the most likely one: greedy decoding gives just this answer."""
    num_tokens: int
    num_rows: int

    def to_dict(self) -> dict[str, float]:
        """Metric name -> value."""
        return asdict(self)


def evaluate_held_out(
    client: ReconnectableClient,
    rows: Iterable[RenderedRow],
    *,
    rows_a_request: int = ROWS_A_REQUEST,
    timeout_s: float = 1800.0,
) -> EvalResult:
    """Evaluate the client's model on `rows`, within one deadline over all requests.

    Raises:
        DataError: there are no rows.
        RequestRejected, TrainerLost: from the client.
    """
    deadline = Deadline(timeout_s)
    losses, weights, correct, exact = 0.0, 0.0, 0, []
    num_tokens = 0
    for chunk in _chunks(rows, rows_a_request):
        datums = [datum_from_row(row.tokens, row.weights) for row in chunk]
        output = client.forward(datums, "cross_entropy", {"top_k": 1}, timeout_s=max(deadline.remaining(), 0.001))
        for row, answer in zip(chunk, output.loss_fn_outputs, strict=True):
            trained = row.weights[1:] != 0
            logprobs = answer["logprobs"].to_numpy()[trained].astype(np.float64)
            best = answer["top_k_indices"].to_numpy().reshape(len(trained), -1)[trained, 0]
            right = best == row.tokens[1:][trained]
            losses -= float(logprobs @ row.weights[1:][trained])
            weights += float(row.weights[1:].sum(dtype=np.float64))
            correct += int(right.sum())
            num_tokens += len(right)
            exact.append(bool(right.all()))
    if not exact:
        raise DataError("there are no held-out rows to evaluate. Check evaluation.dataset.")
    return EvalResult(losses / weights, correct / num_tokens, sum(exact) / len(exact), num_tokens, len(exact))


def _chunks(rows: Iterable[RenderedRow], size: int) -> Iterator[list[RenderedRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk
