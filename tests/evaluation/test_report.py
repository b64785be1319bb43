"""From answers to measures, worked by hand; and the report as files, text and tables."""

import pytest

from cookbook.errors import CheckpointError
from cookbook.evaluation.answers import Answer, ReferenceLoss
from cookbook.evaluation.report import EvaluationReport, RowResult, make_report
from cookbook.evaluation_config import EvaluationConfig

FIELDS = {"log_path": "e", "model": "new", "dataset": "rows.jsonl", "bootstrap_samples": 200}
CONFIG = EvaluationConfig(**FIELDS, against="old", reward="exact", samples_per_row=2, pass_at=[1, 2])


def answers(index, *rewards):
    return [
        Answer(index, f"{index}?", f"a|{reward}<b>", reward, 10, "length" if reward is None else "stop", sample)
        for sample, reward in enumerate(rewards)
    ]


def results(wins=True):
    return [
        RowResult(
            0,
            "0?",
            "zero",
            {"model": answers(0, 1.0, 0.0), "against": answers(0, 0.0, 0.0)},
            {"model": ReferenceLoss(0, 3.0, 1), "against": ReferenceLoss(0, 6.0, 2)},
            (1.0, 0.5) if wins else (),
        ),
        RowResult(
            7,
            "7?",
            None,
            {"model": answers(7, 1.0, 1.0), "against": answers(7, 1.0, 0.0)},
            {},
            (0.5, 1.0) if wins else (),
        ),
    ]


@pytest.fixture
def report(tmp_path):
    return make_report(CONFIG, "eval-1", tmp_path, results(), same_tokens=True)


def test_measures_are_means_over_rows(report):
    model, against = report.measures["model"], report.measures["against"]
    assert {name: each.value for name, each in model.items()} == {
        "loss": 3.0,
        "reward": 0.75,
        "pass@1": 0.75,
        "pass@2": 1.0,
        "tokens_per_answer": 10.0,
        "truncated_share": 0.0,
    }
    assert (against["reward"].value, against["pass@2"].value, against["loss"].value) == (0.25, 0.5, 3.0)
    assert (report.difference["reward"].value, report.difference["loss"].value) == (0.5, 0.0)
    assert report.difference["reward"].low == report.difference["reward"].high == 0.5  # the same on both rows
    assert report.win_rate.value == 0.75
    assert report.outcomes == {"won": 2, "tied": 2, "lost": 0}
    assert (model["loss"].num_rows, model["loss"].low) == (1, None)


def test_the_report_and_its_answers_come_back_from_the_run_directory(report, tmp_path):
    assert EvaluationReport.read(tmp_path) is None
    report.write(tmp_path, {"config": {"seed": 0}})
    read, told = EvaluationReport.read(tmp_path)
    assert (read.to_dict(), read.rows(), told["config"]) == (report.to_dict(), report.rows(), {"seed": 0})
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text(lines[0])
    with pytest.raises(CheckpointError, match="has 1 rows, and its report is of 2"):
        EvaluationReport.read(tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"row": 1}\n')
    with pytest.raises(CheckpointError, match="damaged"):
        EvaluationReport.read(tmp_path)


def test_people_see_every_measure_with_its_interval_and_rows_side_by_side(report):
    for text in (report.to_text(), report.to_markdown()):
        for part in ("pass@2", "0.750 [0.500, 1.000]", "+0.500 [+0.500, +0.500]", "new wins 75.0%", "2 answers each"):
            assert part in text
    row = report.rows(1)[0]
    assert (row["model"], row["against"], row["model_reward"], row["win"]) == ("a|1.0<b>", "a|0.0<b>", 0.5, 0.75)
    assert report.evaluation["win_rate"]["win_rate"] == 0.75
    reward = report.measures["model"]["reward"]
    told = report.evaluation["model"]
    assert (told["reward"], told["reward_low"], told["reward_high"]) == (reward.value, reward.low, reward.high)
    assert "loss_low" not in told  # one row has no interval


def test_losses_of_different_tokenizers_are_not_subtracted(tmp_path):
    report = make_report(CONFIG, "eval-1", tmp_path, results(), same_tokens=False)
    assert "loss" not in report.difference
    assert "different tokenizers" in report.to_text()


def test_one_model_without_a_reward_has_a_loss_only_and_says_so(tmp_path):
    alone = [RowResult(0, "0?", "zero", {"model": []}, {"model": ReferenceLoss(0, 3.0, 2)})]
    report = make_report(EvaluationConfig(**FIELDS), "eval-1", tmp_path, alone, same_tokens=True)
    assert set(report.measures["model"]) == {"loss"}
    assert (report.difference, report.win_rate, report.outcomes) == ({}, None, {})
    for part in ("1.5000", "rows.jsonl, no answers", "no answers were sampled: without a reward"):
        assert part in report.to_text()
    assert report.rows()[0]["model"] is None
    report.write(tmp_path, {})
    assert EvaluationReport.read(tmp_path)[0] == report


def test_two_models_without_a_reward_have_lengths_too(tmp_path):
    config = EvaluationConfig(**FIELDS, against="old")
    said = {"model": answers(0, None), "against": answers(0, None)}
    losses = {role: ReferenceLoss(0, 3.0, 2) for role in said}
    report = make_report(config, "e", tmp_path, [RowResult(0, "0?", "zero", said, losses)], same_tokens=True)
    assert set(report.measures["against"]) == {"loss", "tokens_per_answer", "truncated_share"}
    assert report.measures["model"]["truncated_share"].value == 1.0


def test_a_hot_loaded_snapshot_is_named_beside_its_model(tmp_path):
    versions = {"model": "step-3", "against": ""}
    report = make_report(CONFIG, "eval-1", tmp_path, results(), same_tokens=True, versions=versions)
    assert "new with snapshot step-3 wins 75.0%" in report.to_text()
    assert EvaluationReport.from_dict(report.to_dict()).versions == {"model": "step-3"}


def test_a_part_that_some_answers_lack_counts_as_0_there_and_the_report_says_so(tmp_path):
    def scored(parts):
        return Answer(0, "?", "a", 1.0, 1, "stop", parts=parts)

    config = EvaluationConfig(**FIELDS, reward="exact", samples_per_row=2)
    row = RowResult(0, "?", None, {"model": [scored({"form": 1.0, "sum": 1.0}), scored({"form": 0.5})]})
    report = make_report(config, "eval-1", tmp_path, [row], same_tokens=True)
    assert report.measures["model"]["reward/sum"].value == 0.5
    assert report.notes == ("reward/sum of new: 1 of 2 answers lack it, and count as 0",)
