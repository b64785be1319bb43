"""The account of the rows, and seeds."""

from __future__ import annotations

import random

import pytest

from cookbook.errors import CheckpointError
from cookbook.rollouts.ledger import CollectedStep, RowLedger, sampling_seed
from cookbook.rollouts.records import RejectedRow
from tests.rollouts.groups import make_group


def test_rows_that_end_out_of_order_leave_the_others_open():
    ledger = RowLedger(total=10).book(next_row=5, trained=[4, 0], rejected=[2])
    assert ledger == RowLedger(total=10, next_row=5, open_rows=(1, 3), trained=2, rejected=1)
    assert ledger.pending == 7
    assert [row for row in range(-1, 12) if ledger.is_pending(row)] == [1, 3, 5, 6, 7, 8, 9]


def test_trained_rejected_and_pending_add_up_whatever_is_booked():
    generator = random.Random(0)
    ledger, ended = RowLedger(total=200), set()
    while ledger.pending:
        taken = min(200, ledger.next_row + generator.randint(0, 9))
        candidates = [*ledger.open_rows, *range(ledger.next_row, taken)]
        done = generator.sample(candidates, generator.randint(0, len(candidates)))
        cut = generator.randint(0, len(done))
        ledger = ledger.book(next_row=taken, trained=done[:cut], rejected=done[cut:])
        assert not ended & set(done)
        ended |= set(done)
        assert ledger.trained + ledger.rejected + ledger.pending == 200
        assert RowLedger.from_dict(ledger.to_dict()) == ledger
    assert ended == set(range(200))


@pytest.mark.parametrize(
    ("trained", "rejected"),
    [([0, 0], []), ([0], [0]), ([3], []), ([], [1])],
    ids=["twice", "trained and rejected", "not taken", "ended before"],
)
def test_a_row_that_cannot_end_is_not_booked(trained, rejected):
    ledger = RowLedger(total=5, next_row=2, open_rows=(0,), trained=1)
    with pytest.raises(CheckpointError, match="cannot be booked"):
        ledger.book(next_row=3, trained=trained, rejected=rejected)


@pytest.mark.parametrize(
    "change",
    [{"trained": 4}, {"rejected": 0}, {"open_rows": [3, 1]}, {"open_rows": [1, 1]}, {"next_row": 11}, {"trained": -2}],
    ids=repr,
)
def test_a_ledger_that_does_not_add_up_is_refused(change):
    sound = {"total": 10, "next_row": 5, "open_rows": [1, 3], "trained": 2, "rejected": 1}
    RowLedger.from_dict(sound)
    with pytest.raises(CheckpointError, match="does not add up"):
        RowLedger.from_dict(sound | change)


@pytest.mark.parametrize("change", [{"total": None}, {"trained": "2"}, {"open_rows": 3}, {"open_rows": [True]}])
def test_a_ledger_with_other_values_than_whole_numbers_is_refused(change):
    sound = {"total": 10, "next_row": 5, "open_rows": [1, 3], "trained": 2, "rejected": 1}
    with pytest.raises(CheckpointError, match="whole numbers"):
        RowLedger.from_dict(sound | change)


def test_a_recorded_step_follows_only_upon_the_ledger_it_was_made_from():
    before = RowLedger(total=10, next_row=3, open_rows=(1,), trained=2)
    after = before.book(next_row=6, trained=[1, 4], rejected=[3])
    step = CollectedStep((make_group(1), make_group(4)), (RejectedRow(3, 3, "no"),), after, "v")
    assert step.follows(before)
    assert not step.follows(RowLedger(total=10, next_row=3, open_rows=(2,), trained=2))
    assert not step.follows(after)


def test_seeds_differ_by_run_row_completion_and_turn_and_are_the_same_every_time():
    seeds = {sampling_seed(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (0, 11, 0)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(3, 14, 2) == 402117704
