"""Rendered rows as the SDK's datums, and the client-side normalization of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from fireworks.training.sdk import Datum, ModelInput, TensorData
from numpy.typing import ArrayLike, NDArray

from cookbook.errors import DataError

if TYPE_CHECKING:
    from cookbook.data.rendering import RenderedRow

__all__ = ["datum_from_row", "token_mean_weights"]


def datum_from_row(tokens: ArrayLike, weights: ArrayLike) -> Datum:
    """One training sequence on the wire, shifted by one: input token i predicts target i.

    Args:
        tokens: int (N,), x_0 .. x_{N-1}, N >= 2.
        weights: float (N,), loss weight of each token as a target; `weights[0]` is dropped: nothing predicts x_0.

    Returns:
        Datum with input x_0 .. x_{N-2}, `target_tokens` int64 (N-1,) and `weights` float32 (N-1,).

    Raises:
        DataError: the two differ in length, or there are fewer than two tokens.
    """
    tokens_T = np.asarray(tokens, dtype=np.int64)
    weights_T = np.asarray(weights, dtype=np.float32)
    if tokens_T.ndim != 1 or tokens_T.shape != weights_T.shape or len(tokens_T) < 2:
        raise DataError(
            f"a row needs at least 2 tokens and a weight for each, got shapes {tokens_T.shape} and {weights_T.shape}."
        )
    targets = {"target_tokens": TensorData.from_numpy(tokens_T[1:]), "weights": TensorData.from_numpy(weights_T[1:])}
    return Datum(model_input=ModelInput.from_ints(tokens_T[:-1].tolist()), loss_fn_inputs=targets)


def token_mean_weights(rows: Sequence[RenderedRow]) -> list[NDArray[np.float32]]:
    """Weights of one optimizer batch, scaled so that they sum to 1: the summed loss is then the mean over its tokens.

    Returns:
        For each row float32 (N,): its weights over the sum of all. `weights[0]` of a row counts for nothing.

    Raises:
        DataError: no weight is positive.

    >>> row = RenderedRow(tokens=np.array([5, 6, 7, 8]), weights=np.array([0, 0, 1, 1]))  # doctest: +SKIP
    >>> token_mean_weights([row, row])[0].tolist()  # doctest: +SKIP
    [0.0, 0.0, 0.25, 0.25]
    """
    total = sum(float(row.weights[1:].sum(dtype=np.float64)) for row in rows)
    if not total > 0:
        raise DataError(f"the weights of a batch of {len(rows)} rows sum to {total:g}: there is no token to train.")
    return [(row.weights.astype(np.float64) / total).astype(np.float32) for row in rows]
