"""The report of what a run will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cookbook.data import PreflightReport, Renderer, SFTDataset, preflight_report
from tests.data import tokenizers
from tests.data.conftest import write_rows
from tests.data.test_dataset import rows_of_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def report_of(
    folder: Path, renderer: Renderer, lengths: list[int], *, interval: int = 2, evaluate: Path | None = None
) -> PreflightReport:
    options = {"cache_dir": folder, "max_seq_len": 64}
    dataset = SFTDataset.prepare(write_rows(folder / "d.jsonl", rows_of_lengths(*lengths)), renderer, **options)
    evaluation = SFTDataset.prepare(evaluate, renderer, **options) if evaluate else None
    plan = dataset.plan(batch_size=4, epochs=3, seed=0)
    return preflight_report(dataset, plan, dcp_save_interval=interval, evaluation=evaluation)


def test_numbers_are_those_worked_out_by_hand(tmp_path: Path, renderer: Renderer) -> None:
    held_out = write_rows(tmp_path / "e.jsonl", rows_of_lengths(30, 31, 99))
    report = report_of(tmp_path, renderer, [30, 40, 50, 60, 99], evaluate=held_out)
    assert (report.rows, report.kept, report.dropped) == (5, 4, {"longer than 64 tokens": 1})
    assert report.dropped_examples == ((4, 99),)
    assert (report.tokens.min, report.tokens.p50, report.tokens.p90, report.tokens.max) == (30, 50, 60, 60)
    assert (report.tokens_per_epoch, report.trained_tokens_per_epoch, report.trained_tokens) == (180, 8, 24)
    assert (report.steps_per_epoch, report.total_steps, report.resume_points) == (1, 3, 1)
    assert report.evaluation_rows == 2


def test_text_is_aligned_and_names_what_was_dropped(tmp_path: Path, renderer: Renderer) -> None:
    lines = report_of(tmp_path, renderer, [30, 40, 50, 60, 99]).to_text().splitlines()
    table = [line for line in lines[1:] if "warning" not in line]
    assert {line.index(line[2:].split("  ")[1].strip() or "?") for line in table if line[2:].split("  ")[1]} <= {19}
    assert all(line[2:19].strip() and line[17:19] == "  " and line[19] != " " for line in table)
    assert "dropped          1 longer than 64 tokens: row 4 (99)" in "\n".join(lines)
    assert "steps            3 = 3 epochs x 1 (batches of 4)" in "\n".join(lines)


def test_more_dropped_rows_than_are_named_are_counted(tmp_path: Path, renderer: Renderer) -> None:
    text = report_of(tmp_path, renderer, [30] * 10 + [70] * 25).to_text()
    assert "25 longer than 64 tokens: row 10 (70)" in text
    assert "row 29 (70) and 5 more" in text
    assert "warning: 71% of the rows are dropped" in text


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        (0, "no resume point (dcp_save_interval is 0)"),
        (5, "no resume point (dcp_save_interval is 5, the run has fewer steps)"),
        (2, "resume points    1, every 2 steps"),
        (1, "resume points    3, every 1 step\n"),
    ],
)
def test_resume_points_are_counted_or_said_to_be_none(
    tmp_path: Path, renderer: Renderer, interval: int, shown: str
) -> None:
    report = report_of(tmp_path, renderer, [30] * 4, interval=interval)
    assert shown in report.to_text()
    assert any("a run that dies starts over" in warning for warning in report.warnings) == ("no resume" in shown)


def test_warnings_say_what_will_not_work(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    held_out = write_rows(tmp_path / "e.jsonl", rows_of_lengths(30))
    assert report_of(tmp_path, Renderer(tokenizer), [31] * 4, evaluate=held_out).warnings == ()
    endless = Renderer(tokenizers.with_template(tokenizer, tokenizers.NO_END_OF_TURN))
    report = report_of(tmp_path, endless, [30], interval=0, evaluate=held_out)
    assert [warning.split(":")[0] for warning in report.warnings] == [
        "a run that dies starts over",
        "batch_size 4 is above the 1 rows",
        "the chat template ends an answer without a special token",
        "the evaluation rows are the training rows",
    ]


def test_markdown_is_a_table_and_the_dict_is_plain_json(tmp_path: Path, renderer: Renderer) -> None:
    report = report_of(tmp_path, renderer, [30, 99], interval=0)
    markdown = report.to_markdown()
    assert "| steps | 3 = 3 epochs x 1 (batches of 4) |" in markdown
    assert "> **Warning:** a run that dies starts over" in markdown
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["dropped_examples"] == [[1, 99]]
    assert loaded["tokens"] == {"min": 30, "p50": 30, "p90": 30, "max": 30}
    assert loaded["trained_tokens"] == 6
