"""The order of rows, and going on from a recorded position."""

from __future__ import annotations

import pytest

from cookbook.data import START, EpochPlan, Position
from cookbook.errors import DataError

PLAN = EpochPlan(num_rows=10, batch_size=4, epochs=3, seed=7)


def places(plan: EpochPlan, start: Position = START) -> list[tuple[int, int]]:
    return [(part.epoch, int(index)) for part in plan.slices(start) for index in part.indices]


def test_every_row_comes_once_an_epoch_and_the_last_batch_is_short() -> None:
    parts = list(PLAN.slices())
    assert [len(part.indices) for part in parts] == [4, 4, 2] * 3
    assert [(part.epoch, part.start) for part in parts] == [(e, s) for e in range(3) for s in (0, 4, 8)]
    for epoch in range(3):
        assert sorted(index for e, index in places(PLAN) if e == epoch) == list(range(10))
    assert (PLAN.steps_per_epoch, PLAN.total_steps) == (3, 9)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [PLAN.permutation(0), PLAN.permutation(1), EpochPlan(10, 4, 3, seed=8).permutation(0)]
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    assert places(PLAN) == places(EpochPlan(num_rows=10, batch_size=3, epochs=3, seed=7))


def test_the_order_is_the_same_as_when_positions_were_recorded() -> None:
    assert EpochPlan(8, 2, 1, seed=5).permutation(3).tolist() == [7, 1, 0, 3, 4, 2, 6, 5]


def test_going_on_after_any_batch_gives_the_rest() -> None:
    whole, seen = places(PLAN), 0
    for part in PLAN.slices():
        seen += len(part.indices)
        assert places(PLAN, part.next) == whole[seen:]
        assert PLAN.steps_left(part.next) == PLAN.total_steps - 1 - (3 * part.epoch + part.start // 4)


def test_going_on_with_another_batch_size_trains_every_row_once() -> None:
    other = EpochPlan(num_rows=10, batch_size=7, epochs=3, seed=7)
    assert places(other, Position(1, 4)) == places(PLAN)[14:]
    assert [len(part.indices) for part in other.slices(Position(1, 4))] == [6, 7, 3]
    assert other.steps_left(Position(1, 4)) == 3


def test_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    assert places(PLAN, Position(0, 10)) == places(PLAN, Position(1, 0))
    assert places(PLAN, Position(2, 10)) == places(PLAN, Position(3, 0)) == []
    assert PLAN.steps_left(Position(3, 0)) == 0


@pytest.mark.parametrize(
    "position", [Position(0, 11), Position(3, 1), Position(4, 0), Position(0, -1), Position(-1, 0)]
)
def test_a_position_outside_the_data_is_an_error(position: Position) -> None:
    with pytest.raises(DataError, match="lies outside 3 epochs of 10 rows"):
        list(PLAN.slices(position))
