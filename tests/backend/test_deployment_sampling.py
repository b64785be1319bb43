"""Drawing tokens: against probabilities worked out with a plain softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cookbook.backend.deployment.sampling import BLOCK, Draws, draw, top_tokens, uniforms

VOCAB = 300  # three blocks, the last one partly beyond the vocabulary


def _logits(rows: int = 1, seed: int = 0) -> Tensor:
    width = -(-VOCAB // BLOCK) * BLOCK
    logits = torch.full((rows, width), -torch.inf)
    logits[:, :VOCAB] = 3 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    return logits


def _draws(rows: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Draws:
    """Rows with evenly spread uniform numbers, so that counts follow the probabilities almost exactly."""
    return Draws.of([(temperature, top_p, top_k)] * rows, (np.arange(rows) + 0.5) / rows)


def _shares(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens, minlength=VOCAB)[:VOCAB].double() / len(tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_evenly_spread_uniforms_give_the_softmax(temperature: float) -> None:
    logits = _logits(20_000)
    drawn = draw(logits, _draws(20_000, temperature))
    expected = (logits[0, :VOCAB].double() / temperature).softmax(0)
    assert (_shares(drawn.tokens_B) - expected).abs().max() < 1.01e-4
    torch.testing.assert_close(drawn.sampling_logprobs_B, expected.log()[drawn.tokens_B].float(), atol=1e-5, rtol=0)


def test_logprobs_are_those_of_the_model_at_any_temperature() -> None:
    logits = _logits(50)
    drawn = draw(logits, _draws(50, 0.7))
    expected = logits[0, :VOCAB].log_softmax(0)
    torch.testing.assert_close(drawn.logprobs_B, expected[drawn.tokens_B], atol=1e-5, rtol=0)


def test_greedy_takes_the_largest_with_sampling_logprob_zero() -> None:
    logits = _logits(4)
    drawn = draw(logits, _draws(4, 0.0))
    assert drawn.tokens_B.tolist() == [int(logits[0].argmax())] * 4
    assert drawn.sampling_logprobs_B.tolist() == [0.0] * 4
    assert drawn.logprobs_B[0] < -0.01


def test_top_k_draws_from_the_k_largest_renormalised() -> None:
    logits = _logits(5000)
    drawn = draw(logits, _draws(5000, 1.0, top_k=3))
    best = logits[0].topk(3)
    expected = best.values.double().softmax(0)
    assert set(drawn.tokens_B.tolist()) == set(best.indices.tolist())
    assert (_shares(drawn.tokens_B)[best.indices] - expected).abs().max() < 3e-4
    assert math.isclose(drawn.sampling_logprobs_B.exp().unique().sum(), 1.0, abs_tol=1e-5)


def test_top_p_draws_from_the_smallest_set_that_holds_p() -> None:
    logits = torch.full((1000, BLOCK), -torch.inf)
    logits[:, [5, 9, 70]] = torch.tensor([0.5, 0.3, 0.2]).log()
    assert set(draw(logits, _draws(1000, top_p=0.5)).tokens_B.tolist()) == {5}
    assert set(draw(logits, _draws(1000, top_p=0.6)).tokens_B.tolist()) == {5, 9}
    drawn = draw(logits, _draws(1000, top_p=0.6))
    nine = drawn.sampling_logprobs_B[drawn.tokens_B == 9][0]
    assert math.isclose(math.exp(nine), 0.3 / 0.8, rel_tol=1e-5)
    assert math.isclose(math.exp(drawn.logprobs_B[drawn.tokens_B == 9][0]), 0.3, rel_tol=1e-5)


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_candidates() -> None:
    width = 64 * BLOCK
    drawn = draw(torch.zeros(500, width), _draws(500, top_p=0.5))
    assert len(set(drawn.tokens_B.tolist())) == 500
    assert math.isclose(math.exp(drawn.sampling_logprobs_B[0]), 2 / width, rel_tol=1e-3)


def test_top_k_holds_before_top_p() -> None:
    logits = torch.full((1000, BLOCK), -torch.inf)
    logits[:, [5, 9, 70]] = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = draw(logits, _draws(1000, top_p=0.7, top_k=2))  # of 0.625 and 0.375, both are needed for 0.7
    assert set(drawn.tokens_B.tolist()) == {5, 9}
    assert set(draw(logits, _draws(1000, top_p=0.6, top_k=2)).tokens_B.tolist()) == {5}


def test_rows_do_not_influence_each_other() -> None:
    logits = torch.cat([_logits(1, seed=seed) for seed in range(5)])
    settings = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.9, 0), (1.5, 1.0, 7)]
    numbers = uniforms(np.arange(5, dtype=np.uint64), np.zeros(5, dtype=np.uint64))
    together = draw(logits, Draws.of(settings, numbers))
    for row in range(5):
        alone = draw(logits[row : row + 1], Draws.of([settings[row]], numbers[row : row + 1]))
        assert alone.tokens_B[0] == together.tokens_B[row]
        assert abs(alone.sampling_logprobs_B[0] - together.sampling_logprobs_B[row]) < 1e-6


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((4, 2 * BLOCK), -torch.inf)
    logits[:, [0, 130, 200]] = 0.0
    draws = Draws.of([(1.0, 1.0, 0)] * 4, np.array([0.0, 1 / 3, 1 - 2**-53, 2 / 3]))
    assert set(draw(logits, draws).tokens_B.tolist()) <= {0, 130, 200}


def test_uniforms_are_a_function_of_seed_and_position_and_even() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    numbers = uniforms(seeds.ravel(), positions.ravel())
    assert np.array_equal(numbers, uniforms(seeds.ravel(), positions.ravel()))
    assert len(np.unique(numbers)) == 40_000
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 4000 - 1).max() < 0.06
    grid = numbers.reshape(200, 200)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


def test_logits_that_are_not_finite_are_an_error() -> None:
    logits = _logits(2)
    logits[1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(logits, _draws(2))


def test_top_tokens_come_best_first_with_their_logprobs() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert [(token, round(math.exp(lp), 4)) for token, lp in top_tokens(logits, 0.0, 2)] == [(1, 0.6), (2, 0.3)]
