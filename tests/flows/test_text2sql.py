"""A second, real data set: 100 text-to-SQL rows that lie beside the checkout. Skipped where they do not."""

from pathlib import Path

import pytest

from tests.flows.helpers import losses, run_here, sft_parameters

ROWS = Path(__file__).parents[3] / "shared" / "data" / "text2sql.jsonl"

pytestmark = pytest.mark.skipif(not ROWS.exists(), reason="text2sql.jsonl is not beside the checkout")


def test_real_rows_train_to_the_end_and_what_is_too_long_is_counted(environment, tiny_model, tmp_path):
    # The tiny model has a token for each byte and a context of 512: the longest rows do not fit, and are named.
    parameters = sft_parameters(tmp_path / "run", tiny_model, ROWS, batch_size=16, epochs=2, learning_rate=1e-3)
    summary = run_here(parameters, environment)
    rows_an_epoch = summary["rows_consumed"] // 2
    assert 50 < rows_an_epoch <= 100
    assert summary["steps"] == 2 * -(-rows_an_epoch // 16)
    assert losses(parameters)[summary["steps"]] < losses(parameters)[1]
