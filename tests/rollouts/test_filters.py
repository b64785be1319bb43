"""Which groups are trained."""

from __future__ import annotations

import pytest

from cookbook.errors import ConfigError, DataError
from cookbook.rollouts.filters import load_group_filter, rejection, rewards_all_equal
from tests.rollouts.groups import make_group


def test_equal_rewards_are_rejected_and_any_difference_is_not():
    assert rewards_all_equal(make_group(0, (0.5, 0.5, 0.5))) == "all rewards are 0.5"
    assert rewards_all_equal(make_group(0, (0.5, 0.5, 0.5000001))) is None
    assert load_group_filter(None) is rewards_all_equal


def keep_even(group):
    return None if group.row % 2 == 0 else "odd"


def says_true(group):
    return True


def test_ones_own_filter_is_loaded_by_name():
    group_filter = load_group_filter(f"{__name__}:keep_even")
    assert rejection(group_filter, make_group(2)) is None
    assert rejection(group_filter, make_group(3)) == "odd"


@pytest.mark.parametrize("spec", ["no_such_module_here:f", f"{__name__}:missing", "keep_even", f"{__name__}:pytest"])
def test_a_filter_that_is_not_there_is_an_error_that_names_the_field(spec):
    with pytest.raises(ConfigError, match="group_filter"):
        load_group_filter(spec)


@pytest.mark.parametrize("answer", [True, "", 0.0])
def test_a_filter_that_gives_no_reason_is_an_error(answer):
    with pytest.raises(DataError, match=r"returned .* for row 3"):
        rejection(lambda group: answer, make_group(3))
