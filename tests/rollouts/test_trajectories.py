"""Rollouts for people."""

from __future__ import annotations

import json

import pytest

from cookbook.rollouts.ledger import CollectedStep, RowLedger
from cookbook.rollouts.records import RejectedRow
from cookbook.rollouts.trajectories import rollout_metrics, write_trajectories
from tests.rollouts.groups import make_group


def test_a_step_becomes_a_file_with_a_line_a_completion(tmp_path, tiny_tokenizer):
    groups = [make_group(3, (0.0, 2.0), parts={"format": 1.0}), make_group(5)]
    path = write_trajectories(tmp_path / "t", 12, groups, tiny_tokenizer)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "step-000012.jsonl"
    assert [(row["row"], row["completion_number"], row["reward"]) for row in rows] == [
        *((3, 0, 0.0), (3, 1, 2.0)),
        *((5, 0, 0.0), (5, 1, 1.0)),
    ]
    assert (rows[0]["prompt"], rows[0]["completion"], rows[0]["parts"]) == ("pq", "hi", {"format": 1.0})
    assert (rows[0]["version"], rows[0]["finish"], rows[0]["tokens"]) == ("step-1", "stop", 3)


def test_metrics_tell_rewards_lengths_and_rejections():
    groups = (make_group(0, (0.0, 1.0), parts={"format": 0.5}), make_group(2, (3.0, 4.0), finish_reason="length"))
    ledger = RowLedger(total=9).book(next_row=3, trained=[0, 2], rejected=[1])
    metrics = rollout_metrics(CollectedStep(groups, (RejectedRow(1, 1, "equal", (8.0, 8.0)),), ledger, "v"))
    assert metrics["reward/trained_mean"] == 2.0
    assert metrics["reward/mean"] == 4.0  # also of what is not trained
    assert metrics["reward/std"] == pytest.approx((58 / 6) ** 0.5)
    assert metrics["reward/format"] == 0.25
    assert metrics["rollout/truncated_share"] == 0.5
    assert metrics["rollout/tokens"] == 12
    assert metrics["rollout/rejected_share"] == pytest.approx(1 / 3)


def test_a_step_without_groups_has_metrics_too():
    ledger = RowLedger(total=1).book(next_row=1, trained=[], rejected=[0])
    metrics = rollout_metrics(CollectedStep((), (RejectedRow(0, 0, "equal"),), ledger, "v"))
    assert metrics == {"rollout/groups": 0.0, "rollout/rejected": 1.0, "rollout/rejected_share": 1.0}
