"""Recorded steps."""

from __future__ import annotations

import json
import os

import pytest

from cookbook.errors import CheckpointError
from cookbook.rollouts.ledger import CollectedStep, RowLedger
from cookbook.rollouts.records import RejectedRow
from cookbook.rollouts.store import RolloutStore
from tests.rollouts.groups import make_completion, make_group

BEFORE = RowLedger(total=20)


def collected(*rows, rejected=(9,), before=BEFORE, parts=None):
    groups = tuple(make_group(row, (0.1, 1 / 3), parts=parts or {"exact": 1.0}, advantage=0.7) for row in rows)
    ledger = before.book(next_row=10, trained=rows, rejected=rejected)
    return CollectedStep(groups, tuple(RejectedRow(row, row, "equal") for row in rejected), ledger, "step-4-ab")


def test_a_step_comes_back_bit_for_bit(tmp_path):
    step = collected(0, 2)
    RolloutStore(tmp_path).write_step(4, step)
    assert RolloutStore(tmp_path).read_step(4) == step


def test_injected_tokens_and_turns_come_back(tmp_path):
    completion = make_completion(is_sampled=(True, False, True), num_turns=2, finish_reason="length")
    step = collected(0)
    step = CollectedStep(
        (type(step.groups[0])(0, 7, (1,), (completion, completion), {"a": [1, None]}),), (), step.ledger, ""
    )
    RolloutStore(tmp_path).write_step(0, step)
    assert RolloutStore(tmp_path).read_step(0) == step


def test_what_was_never_recorded_is_none(tmp_path):
    assert RolloutStore(tmp_path / "none").read_step(0) is None
    assert RolloutStore(tmp_path / "none").steps() == []


def test_a_record_that_does_not_follow_upon_the_ledger_is_none(tmp_path):
    store = RolloutStore(tmp_path)
    store.write_step(4, collected(0, 2))
    assert store.read_step(4, BEFORE) is not None
    assert store.read_step(4, BEFORE.book(next_row=1, trained=[0], rejected=[])) is None


def test_writing_a_step_drops_the_later_ones_of_another_course(tmp_path):
    store = RolloutStore(tmp_path)
    for step in (3, 4, 5, 6):
        store.write_step(step, collected(0))
    store.write_step(4, collected(1))
    assert store.steps() == [3, 4]
    assert [group.row for group in store.read_step(4).groups] == [1]


def test_pruning_keeps_what_a_resume_needs(tmp_path):
    store = RolloutStore(tmp_path)
    for step in range(5):
        store.write_step(step, collected(0))
    store.prune(before=3)
    assert store.steps() == [3, 4]


@pytest.mark.parametrize("lines", [slice(0, 2), slice(0, -1), slice(1, None), slice(0, 0)], ids=repr)
def test_a_file_that_is_not_whole_is_an_error_that_names_it(tmp_path, lines):
    store = RolloutStore(tmp_path)
    path = store.write_step(4, collected(0, 2))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[lines]))
    with pytest.raises(CheckpointError, match=r"step-000004\.jsonl is damaged"):
        store.read_step(4)


def test_a_file_of_another_step_is_an_error(tmp_path):
    store = RolloutStore(tmp_path)
    store.write_step(4, collected(0)).rename(tmp_path / "step-000005.jsonl")
    with pytest.raises(CheckpointError, match="is damaged"):
        store.read_step(5)


def test_a_step_that_cannot_be_written_leaves_no_half_file(tmp_path):
    store = RolloutStore(tmp_path)
    with pytest.raises(CheckpointError, match="not JSON"):
        store.write_step(1, collected(0, parts={"bad": float("nan")}))
    assert os.listdir(tmp_path) == []


def test_every_line_is_json_that_others_can_read(tmp_path):
    path = RolloutStore(tmp_path).write_step(4, collected(0, 2))
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["head", "group", "group", "rejected", "end"]


def test_a_step_that_was_sampled_under_another_config_is_sampled_anew(tmp_path):
    RolloutStore(tmp_path, "a").write_step(4, collected())
    assert RolloutStore(tmp_path, "b").read_step(4) is None
    assert RolloutStore(tmp_path, "a").read_step(4) is not None
