"""RolloutCollector against a real completions server: windows, replacement, versions, failures and the account."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from starlette.responses import JSONResponse

from cookbook.config import RetryConfig, RLConfig
from cookbook.errors import CheckpointError, RewardError, SamplingError
from cookbook.rewards import Reward
from cookbook.rollouts.collect import RolloutCollector
from cookbook.rollouts.ledger import RowLedger, sampling_seed
from tests.faulty_proxy import FaultyProxy
from tests.rollouts.waiting import interrupt, wait_until, when


@dataclass(frozen=True)
class Row:
    index: int
    messages: list = field(default_factory=list)

    @property
    def prompt_tokens(self):
        return list(f"row {self.index}".encode())

    @property
    def fields(self):
        return {"number": self.index}


@dataclass(frozen=True)
class Rows:
    total_rows: int

    def row(self, ordinal):
        return Row(ordinal)


async def by_length(text, row, *, where):
    return Reward(float(len(text)), {"length": float(len(text))})


async def by_row(text, row, *, where):
    """All completions of an odd row are worth the same."""
    return Reward(0.0 if row["number"] % 2 else float(len(text)))


def distinct_answers(body):
    """Of a length that follows from the seed, so that two completions of a row are worth different rewards."""
    return "x" * (1 + body["seed"] % 97)


QUICK = RetryConfig(attempts=3, initial_delay_s=0.01, max_delay_s=0.02)


def make_config(**changes):
    values = {"log_path": "runs/t", "base_model": "tiny", "dataset": "d.jsonl", "reward": "exact", "seed": 7}
    values |= {"prompt_groups_per_step": 2, "completions_per_prompt": 3, "max_completion_tokens": 120, "retry": QUICK}
    interval = changes.pop("interval", 1)
    return RLConfig(**values | {"weight_sync": {"weight_sync_interval": interval}} | changes)


@pytest.fixture
def start(server, start_sampler):
    """Starts a collector over some rows; closes it."""
    server.answer = distinct_answers
    collectors = []

    def start(total=20, scorer=by_length, url=None, window=64, **changes):
        sampler = start_sampler(url, window=window)
        collectors.append(RolloutCollector(sampler, Rows(total), scorer, make_config(**changes)))
        return collectors[-1]

    yield start
    for collector in collectors:
        collector.close()


def rows_of(step):
    return [group.row for group in step.groups]


def rows_asked(server):
    """Rows that were asked for, ascending."""
    return sorted({int(prompt.split()[1]) for prompt in server.prompts})


def rows(*held):
    """Whether a request is of one of these rows."""
    return lambda body: int(body["prompt_cache_key"].removeprefix("row-")) in held


def test_a_group_has_its_completions_with_seeds_of_their_own_and_one_cache_key(server, start):
    step = start(total=2).collect(RowLedger(total=2), step=0, version="")
    assert rows_of(step) == [0, 1]
    for group in step.groups:
        assert [completion.seed for completion in group.completions] == [
            sampling_seed(7, group.row, number) for number in range(3)
        ]
        assert all(len(set(part)) > 1 for part in [group.rewards])
        assert sum(completion.advantage for completion in group.completions) == pytest.approx(0, abs=1e-6)
        assert any(completion.advantage for completion in group.completions)
        assert group.completions[0].parts == {"length": group.completions[0].reward}
        assert all(completion.is_sampled == (True,) * len(completion.tokens) for completion in group.completions)
    assert Counter(body["prompt_cache_key"] for body in server.bodies) == {"row-0": 3, "row-1": 3}
    assert len({body["seed"] for body in server.bodies}) == 6


def test_the_same_rows_give_the_same_groups_however_often_they_are_sampled(start):
    first = start().collect(RowLedger(total=20), step=0, version="")
    again = start().collect(RowLedger(total=20), step=0, version="")
    assert first == again


@pytest.mark.parametrize("interval", [1, 0])
def test_with_interval_1_or_none_nothing_is_sampled_ahead(server, start, interval):
    collector, ledger = start(interval=interval), RowLedger(total=20)
    for step in range(3):
        ledger = collector.collect(ledger, step=step, version="").ledger
        time.sleep(0.15)
        assert rows_asked(server) == list(range(2 * step + 2))


def test_with_interval_3_the_rows_of_three_steps_are_in_flight_at_once_and_no_more(server, start):
    server.hold = rows(2, 3, 4, 5)
    collector, ledger = start(interval=3), RowLedger(total=20)
    first = collector.collect(ledger, step=0, version="")
    assert rows_of(first) == [0, 1]
    assert first.ledger == RowLedger(total=20, next_row=6, open_rows=(2, 3, 4, 5), trained=2)
    wait_until(lambda: server.in_flight == 12)
    server.resume()
    wait_until(lambda: server.in_flight == 0)  # while the trainer would train
    ledger = collector.collect(first.ledger, step=1, version="").ledger
    ledger = collector.collect(ledger, step=2, version="").ledger
    time.sleep(0.15)
    assert ledger == RowLedger(total=20, next_row=6, trained=6)
    assert rows_asked(server) == list(range(6))
    server.version = "step-3"  # the sync
    collector.collect(ledger, step=3, version="step-3")
    assert rows_asked(server) == list(range(12))


def test_groups_train_as_they_arrive(server, start):
    server.hold = rows(0, 2)
    collector = start(interval=2)
    first = collector.collect(RowLedger(total=20), step=0, version="")
    assert rows_of(first) == [1, 3]
    assert first.ledger.open_rows == (0, 2)
    server.resume()
    assert rows_of(collector.collect(first.ledger, step=1, version="")) == [0, 2]


def test_a_rejected_group_is_replaced_by_the_next_row_and_booked_with_its_reason(start):
    step = start(scorer=by_row).collect(RowLedger(total=20), step=0, version="")
    assert rows_of(step) == [0, 2]
    assert [(row.row, row.index) for row in step.rejected] == [(1, 1)]
    assert step.rejected[0].reason == "all rewards are 0"
    assert step.ledger == RowLedger(total=20, next_row=3, trained=2, rejected=1)


def test_an_open_row_of_the_ledger_is_sampled_first(server, start):
    before = RowLedger(total=20, next_row=9, open_rows=(3, 5), trained=7)
    step = start().collect(before, step=3, version="")
    assert rows_of(step) == [3, 5]
    assert step.ledger == RowLedger(total=20, next_row=9, trained=9)


def test_a_run_that_is_resumed_within_a_window_fills_the_rest_of_it(server, start):
    before = RowLedger(total=40, next_row=10, trained=10)
    start(total=40, interval=4).collect(before, step=5, version="")
    wait_until(lambda: len(server.bodies) == 18)
    time.sleep(0.15)
    assert rows_asked(server) == list(range(10, 16))  # steps 5, 6 and 7; the sync follows the 8th


def test_the_end_of_the_data_makes_a_short_step_and_then_an_empty_one(start):
    collector = start(total=3)
    first = collector.collect(RowLedger(total=3), step=0, version="")
    second = collector.collect(first.ledger, step=1, version="")
    third = collector.collect(second.ledger, step=2, version="")
    assert [rows_of(step) for step in (first, second, third)] == [[0, 1], [2], []]
    assert third.ledger.pending == 0


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.usefixtures("fast_sdk")
def test_every_row_is_trained_or_rejected_exactly_once_over_a_faulty_network(server, start, interval):
    """Each 20th request is slow, so that rows end out of order; one in four fails on the way."""
    server.delay_s = lambda body: 0.15 if body["seed"] % 20 == 0 else 0.0
    with FaultyProxy.everywhere(server.url, rate=0.25, seed=1) as proxy:
        collector = start(total=31, scorer=by_row, url=proxy.url, window=12, interval=interval)
        ledger, trained, rejected, step = RowLedger(total=31), [], [], 0
        while ledger.pending:
            server.version = f"step-{step - step % interval}"
            collected = collector.collect(ledger, step=step, version=server.version)
            assert {group.version for group in collected.groups} <= {server.version}
            ledger, step = collected.ledger, step + 1
            trained += rows_of(collected)
            rejected += [row.row for row in collected.rejected]
            assert ledger.trained == len(trained)
            assert ledger.rejected == len(rejected)
        assert proxy.num_faults > 20
    assert sorted(trained) == list(range(0, 31, 2))
    assert sorted(rejected) == list(range(1, 31, 2))


def test_a_group_of_another_version_is_never_booked_and_sampled_again(server, start):
    server.version = "old"
    answered = []

    def switch(choice):
        answered.append(choice)
        if len(answered) == 4:
            server.version = "new"

    server.edit = switch
    step = start(interval=1).collect(RowLedger(total=20), step=0, version="new")
    assert {completion.version for group in step.groups for completion in group.completions} == {"new"}
    assert rows_of(step) == [0, 1]
    assert len(server.bodies) in (9, 12)  # both rows were asked for again, or one


def test_another_version_at_every_attempt_is_an_error_and_the_row_stays(server, start):
    server.version = "other"
    ledger = RowLedger(total=20)
    collector = start()
    with pytest.raises(SamplingError, match=r"row \d .*'other' at the last of 3 attempts, but 'mine' is synced"):
        collector.collect(ledger, step=0, version="mine")
    server.version = "mine"
    assert rows_of(collector.collect(ledger, step=0, version="mine")) == [0, 1]


def test_a_broken_reward_stops_everything_and_the_rows_stay(server, start):
    async def broken(text, row, *, where):
        if row["number"] == 1:
            while server.in_flight < 3:  # row 0 is under way
                await asyncio.sleep(0.01)
            raise RewardError(f"reward of {where} is nan")
        return Reward(float(len(text)))

    server.hold = rows(0)
    collector, ledger = start(scorer=broken), RowLedger(total=20)
    with pytest.raises(RewardError, match=r"row 1 \(row 1 of the data\), completion . is nan"):
        collector.collect(ledger, step=0, version="")
    wait_until(lambda: server.hung_up == 3)
    assert ledger == RowLedger(total=20)


def test_a_failure_while_the_trainer_trains_comes_with_the_next_step(server, start):
    server.hold = rows(2, 3)
    server.intercept = lambda body: JSONResponse({"error": "no"}, 400) if body["prompt_cache_key"] == "row-2" else None
    collector = start(interval=2)
    first = collector.collect(RowLedger(total=20), step=0, version="")
    assert rows_of(first) == [0, 1]
    server.resume()
    with pytest.raises(SamplingError, match=r"row 2 .*HTTP 400"):
        collector.collect(first.ledger, step=1, version="")
    server.intercept = lambda body: None
    assert rows_of(collector.collect(first.ledger, step=1, version="")) == [2, 3]


def test_an_empty_completion_rejects_its_row(server, start):
    def empty(choice):
        if choice["raw_output"]["prompt_token_ids"] == list(b"row 1"):
            choice["raw_output"]["completion_token_ids"] = []
            choice["logprobs"]["content"] = []

    server.edit = empty
    step = start().collect(RowLedger(total=20), step=0, version="")
    assert rows_of(step) == [0, 2]
    assert [(row.row, "is empty" in row.reason) for row in step.rejected] == [(1, True)]


def test_going_back_to_an_earlier_ledger_drops_what_is_in_flight(server, start):
    server.hold = rows(2, 3, 4, 5)
    collector, commit = start(interval=3), RowLedger(total=20)
    collector.collect(commit, step=0, version="")
    wait_until(lambda: server.in_flight == 12)
    again = collector.collect(commit, step=0, version="")  # the trainer was lost and restored
    assert rows_of(again) == [0, 1]
    wait_until(lambda: server.hung_up == 12)


def test_dropping_cancels_what_is_in_flight(server, start):
    server.hold = rows(2, 3)
    collector = start(interval=2)
    first = collector.collect(RowLedger(total=20), step=0, version="")
    wait_until(lambda: server.in_flight == 6)
    collector.drop()
    wait_until(lambda: server.hung_up == 6)
    server.resume()
    assert rows_of(collector.collect(first.ledger, step=1, version="")) == [2, 3]


def test_ctrl_c_cancels_the_window_and_the_rows_stay(server, start):
    server.hold = lambda body: True
    collector, ledger = start(interval=2), RowLedger(total=20)
    when(lambda: server.in_flight == 12, interrupt)
    with pytest.raises(KeyboardInterrupt):
        collector.collect(ledger, step=0, version="")
    wait_until(lambda: server.hung_up == 12)
    server.resume()
    assert set(rows_of(collector.collect(ledger, step=0, version=""))) <= {0, 1, 2, 3}


def test_ones_own_filter_decides(start):
    step = start(group_filter=f"{__name__}:not_the_first").collect(RowLedger(total=20), step=0, version="")
    assert rows_of(step) == [1, 2]
    assert step.rejected[0].reason == "too easy"


def not_the_first(group):
    return "too easy" if group.row == 0 else None


def test_a_ledger_of_other_data_is_refused(start):
    with pytest.raises(CheckpointError, match="of 21 rows, the data and epochs make 20"):
        start(total=20).collect(RowLedger(total=21), step=0, version="")
