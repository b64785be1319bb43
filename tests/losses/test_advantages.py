"""Advantages of a prompt group, worked by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from cookbook.config import RLConfig
from cookbook.errors import ShapeError
from cookbook.losses.advantages import ADVANTAGE_MODES, advantages


def test_group_std_divides_by_the_sample_deviation() -> None:
    # mean 0.25; squares 0.5625 + 3 * 0.0625 = 0.75; / 3 = 0.25; root 0.5
    assert advantages([1, 0, 0, 0], "group_std") == pytest.approx((1.5, -0.5, -0.5, -0.5))


def test_group_mean_only_centres() -> None:
    assert advantages([1, 0, 0, 0], "group_mean") == pytest.approx((0.75, -0.25, -0.25, -0.25))


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    rewards = [3.0, 1.0, 0.5]
    assert advantages(rewards, "leave_one_out") == pytest.approx((3 - 0.75, 1 - 1.75, 0.5 - 2.0))


def test_group_std_is_what_the_statistics_module_says() -> None:
    rewards = [0.3, -1.7, 12.0, 0.3, 4.4]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert advantages(rewards, "group_std") == pytest.approx([(r - mean) / (std + 1e-8) for r in rewards])


def test_a_deviation_near_zero_is_kept_from_exploding() -> None:
    # std of (0, 2e-8) is sqrt(2) 1e-8, to which 1e-8 is added
    assert advantages([0.0, 2e-8], "group_std")[1] == pytest.approx(1 / (math.sqrt(2) + 1))


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_equal_rewards_give_exact_zeros(mode: str) -> None:
    assert advantages([0.1] * 3, mode) == (0.0, 0.0, 0.0)  # their mean is not exactly 0.1


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_advantages_of_a_group_sum_to_zero(mode: str) -> None:
    assert sum(advantages([0.2, 0.9, 0.4, 0.4], mode)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "mode", "match"),
    [
        ([1.0], "group_std", "at least 2 completions, got 1"),
        ([1.0, math.nan], "group_mean", "must be finite numbers, got"),
        ([1.0, 0.0], "batch", "must be one of group_std, group_mean, leave_one_out, got 'batch'"),
    ],
)
def test_what_has_no_advantage_is_refused(rewards: list[float], mode: str, match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        advantages(rewards, mode)


def test_every_mode_of_the_config_is_known_here() -> None:
    assert RLConfig.model_fields["advantage"].json_schema_extra["enum"] == list(ADVANTAGE_MODES)
