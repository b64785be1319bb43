"""Datums and token-mean weights, by hand."""

import numpy as np
import pytest

from cookbook.data.datums import datum_from_row, token_mean_weights
from cookbook.data.rendering import RenderedRow
from cookbook.errors import DataError


def row(weights):
    return RenderedRow(np.arange(len(weights), dtype=np.int32), np.array(weights, dtype=np.float32))


def test_a_datum_predicts_each_token_from_those_before_it():
    datum = datum_from_row([5, 6, 7, 8], [0, 0, 1, 1])
    assert datum.model_input.to_ints() == [5, 6, 7]
    targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
    assert (targets.data, targets.dtype) == ([6, 7, 8], "int64")
    assert (weights.data, weights.dtype) == ([0.0, 1.0, 1.0], "float32")


@pytest.mark.parametrize(("tokens", "weights"), [([5], [0]), ([5, 6], [0]), ([[5, 6]], [[0, 1]])])
def test_rows_that_are_none_are_refused(tokens, weights):
    with pytest.raises(DataError, match="at least 2 tokens"):
        datum_from_row(tokens, weights)


def test_the_weights_of_a_batch_sum_to_one_over_its_tokens():
    # Three trained tokens in all, so each weighs 1/3, whatever its row.
    scaled = token_mean_weights([row([0, 1, 1]), row([0, 0, 0, 1])])
    third = pytest.approx(1 / 3)
    assert [weights.tolist() for weights in scaled] == [[0, third, third], [0, 0, 0, third]]
    assert all(weights.dtype == np.float32 for weights in scaled)


def test_a_weight_on_the_first_token_does_not_count():
    (scaled,) = token_mean_weights([row([9, 1, 1])])
    assert scaled[1:].tolist() == [0.5, 0.5]


def test_a_batch_without_a_trained_token_is_refused():
    with pytest.raises(DataError, match="batch of 2 rows sum to 0"):
        token_mean_weights([row([0, 0]), row([1, 0])])
