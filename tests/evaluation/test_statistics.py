"""Means, intervals and pass@k against numbers worked by hand, or counted out."""

from itertools import combinations

import numpy as np
import pytest

from cookbook.errors import ShapeError
from cookbook.evaluation.bootstrap import Bootstrap
from cookbook.evaluation.passes import pass_at
from cookbook.evaluation.win_rate import reward_wins


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (6, 1, 1), (6, 6, 2), (7, 0, 7), (7, 1, 7), (8, 3, 4)])
def test_pass_at_k_is_the_share_of_the_choices_of_k_answers_that_hold_a_right_one(n, c, k):
    choices = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at(k, n, c) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_1_is_the_share_of_right_answers_and_large_numbers_do_not_overflow():
    assert pass_at(1, 8, 3) == pytest.approx(3 / 8)
    assert pass_at(500, 1000, 1) == pytest.approx(0.5)


@pytest.mark.parametrize(("k", "n", "c"), [(0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1)])
def test_numbers_that_do_not_fit_are_refused(k, n, c):
    with pytest.raises(ShapeError, match=f"pass@{k}"):
        pass_at(k, n, c)


def test_a_weighted_mean_counts_every_token_alike():
    # 3 nats over 1 token and 1 nat over 3 tokens: 4 nats over 4 tokens, not the mean of 3 and 1/3
    assert Bootstrap(200, 0.95, 0).mean([3.0, 1.0], [1.0, 3.0]).value == 1.0


def test_the_interval_of_two_rows_has_the_three_means_that_there_are():
    # resamples of (0, 1): 0 with 1/4, 1/2 with 1/2, 1 with 1/4
    estimate = Bootstrap(4000, 0.4, 0).mean([0.0, 1.0])
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)  # 30% and 70% lie in the middle half
    estimate = Bootstrap(4000, 0.8, 0).mean([0.0, 1.0])
    assert (estimate.low, estimate.high) == (0.0, 1.0)  # 10% and 90% lie in the outer quarters


def test_the_interval_agrees_with_the_normal_approximation_on_many_rows():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    estimate = Bootstrap(4000, 0.95, 0).mean(values)
    error = values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        found = Bootstrap(400, 0.9, trial).mean(generator.normal(0.0, 1.0, 50))
        covered += found.low <= 0.0 <= found.high
    assert 0.83 <= covered / 200 <= 0.96


def test_a_difference_is_paired_so_that_what_both_find_hard_cancels():
    hard = np.random.default_rng(3).normal(0.0, 100.0, 50)
    estimate = Bootstrap(500, 0.95, 0).mean(hard + 1.0, minus=(hard, None))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.0, 1.0, 1.0))
    alone = Bootstrap(500, 0.95, 0).mean(hard)
    assert alone.high - alone.low > 20


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.arange(20.0)
    assert Bootstrap(300, 0.95, 7).mean(values) == Bootstrap(300, 0.95, 7).mean(values)
    assert Bootstrap(300, 0.95, 7).mean(values) != Bootstrap(300, 0.95, 8).mean(values)


def test_resamples_are_the_same_however_many_fit_into_memory(monkeypatch):
    values = np.arange(20.0)
    at_once = Bootstrap(300, 0.95, 7).mean(values)
    monkeypatch.setattr("cookbook.evaluation.bootstrap._DRAWN_AT_ONCE", 50)
    assert Bootstrap(300, 0.95, 7).mean(values) == at_once


def test_one_row_has_no_interval_and_no_rows_are_refused():
    assert Bootstrap(100, 0.95, 0).mean([2.0]).low is None
    with pytest.raises(ShapeError, match="at least 1"):
        Bootstrap(100, 0.95, 0).mean([])
    with pytest.raises(ShapeError, match="2, 2, 1, 1"):
        Bootstrap(100, 0.95, 0).mean([1.0, 2.0], minus=([1.0], None))


def test_the_higher_reward_wins_and_a_tie_is_half_a_win():
    assert [reward_wins(1.0, 0.0), reward_wins(0.0, 1.0), reward_wins(0.3, 0.3)] == [1.0, 0.0, 0.5]
