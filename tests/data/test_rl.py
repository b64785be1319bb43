"""The data of an RL run: which rows, in which order, under which limits, and every problem before anything runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cookbook.config import RLConfig
from cookbook.data import make_rl_task
from cookbook.data.rl import RLData, load_rl_data
from cookbook.errors import ConfigError, RewardError
from tests.tiny_model import make_tiny_model

from .conftest import write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)


def rl_row(question: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **fields}


@pytest.fixture
def config(model: Path, tmp_path: Path) -> dict[str, Any]:
    """Fields of a config over six rows whose prompts have 1 to 6 letters."""
    rows = write_rows(tmp_path / "rows.jsonl", [rl_row("a" * (i + 1), ground_truth=str(i)) for i in range(6)])
    fields = {"log_path": str(tmp_path / "run"), "base_model": str(model), "dataset": str(rows), "reward": "numeric"}
    return {**fields, "max_completion_tokens": 10, "lora_rank": 4}


def load(fields: dict[str, Any], tmp_path: Path) -> RLData:
    return load_rl_data(RLConfig(**fields), tmp_path / "models", tmp_path / "cache")


def problems(fields: dict[str, Any], tmp_path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(fields, tmp_path)
    return [str(problem) for problem in caught.value.problems]


def test_every_row_comes_once_an_epoch_under_its_ordinal(config: dict[str, Any], tmp_path: Path) -> None:
    data = load({**config, "epochs": 3, "seed": 5}, tmp_path)
    assert (data.num_rows, data.total_rows) == (6, 18)
    indices = [row.index for _, row in data.rows()]
    epochs = [indices[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [row.index for _, row in data.rows(start=7)] == indices[7:]
    assert [load({**config, "epochs": 3, "seed": 5}, tmp_path).row(i).index for i in range(18)] == indices
    with pytest.raises(IndexError, match="row 18 of 18"):
        data.row(18)


def test_a_row_holds_the_prompt_that_is_sampled_and_all_fields(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [rl_row("q", ground_truth="1", level=3)]
    data = load({**config, "dataset": str(write_rows(tmp_path / "one.jsonl", rows))}, tmp_path)
    row = data.row(0)
    assert data.train.renderer.tokenizer.decode(list(row.prompt_tokens)).endswith("assistant\n")
    assert row.prompt_tokens == tuple(data.train.renderer.prompt_tokens(row.messages, "row").tolist())
    assert (row.messages, row.fields, row.where) == (tuple(rows[0]["messages"]), rows[0], "row 0 (one.jsonl, line 1)")
    assert asyncio.run(data.score("it is 1", row.fields)).value == 1.0


def test_prompts_that_leave_no_room_for_a_completion_are_dropped_and_named(
    config: dict[str, Any], tmp_path: Path
) -> None:
    longest = len(load(config, tmp_path).train.render(5).prompt_tokens)
    data = load({**config, "max_seq_len": longest + 10}, tmp_path)
    assert (data.num_rows, data.report.kept) == (6, 6)
    data = load({**config, "max_seq_len": longest + 8}, tmp_path)
    assert (data.num_rows, data.train.dropped()) == (4, [(4, longest - 1), (5, longest)])
    assert f"row 4 ({longest - 1}), row 5 ({longest})" in data.report.to_text()
    assert "33% of the rows are dropped" in data.report.to_text()
    assert sorted(row.index for _, row in data.rows()) == [0, 1, 2, 3]
    (nothing,) = problems({**config, "max_seq_len": 12}, tmp_path)
    assert nothing.startswith(f"dataset: no prompt of {config['dataset']} leaves room for a completion")
    (nothing,) = problems({**config, "max_seq_len": 10}, tmp_path)
    assert nothing.startswith("max_completion_tokens: is 10, which leaves no room for a prompt")


def test_max_rows_takes_the_first_ones_and_changes_the_fingerprint(config: dict[str, Any], tmp_path: Path) -> None:
    data = load({**config, "max_rows": 4}, tmp_path)
    assert sorted(row.index for _, row in data.rows()) == [0, 1, 2, 3]
    assert "4 of 6 read" in data.report.to_text()
    assert data.fingerprint != load(config, tmp_path).fingerprint
    assert data.fingerprint == load({**config, "max_rows": 4, "seed": 9}, tmp_path).fingerprint


def test_invalid_rows_of_both_files_and_a_broken_reward_are_named_together(
    config: dict[str, Any], tmp_path: Path
) -> None:
    answered = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [rl_row("q", ground_truth="none"), answered, {"text": "q"}, rl_row("q", ground_truth=1), rl_row("q")]
    train, held_out = write_rows(tmp_path / "t.jsonl", rows), write_rows(tmp_path / "h.jsonl", [rl_row("q")])
    fields = {**config, "dataset": str(train), "evaluation": {"dataset": str(held_out)}}
    first, second = problems(fields, tmp_path)
    assert first.startswith("dataset: 4 of 5 rows of ")
    for text in (
        "row 0 (t.jsonl, line 1) has no number in ground_truth = 'none'",
        "row 1 (t.jsonl, line 2) ends with an answer",
        "row 2 (t.jsonl, line 3) has no messages (keys: ['text'])",
        "row 4 (t.jsonl, line 5) has no ground_truth to compare with (keys: ['messages'])",
    ):
        assert text in first
    assert "row 3" not in first
    assert second.startswith("evaluation.dataset: 1 of 1 rows of ")
    first, second = problems({**config, "reward": "absent_module:f", "dataset": str(tmp_path / "no.jsonl")}, tmp_path)
    assert first.startswith("reward: 'absent_module:f': there is no module 'absent_module'")
    assert second.startswith("dataset: ")


def test_a_reward_that_fails_on_an_empty_completion_fails_before_anything_runs(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing_reward_of_rl.py").write_text("def score(completion, row):\n    return row['level']\n")
    (problem,) = problems({**config, "reward": "failing_reward_of_rl:score"}, tmp_path)
    assert problem.startswith(
        "reward: reward 'failing_reward_of_rl:score' of row 0 (rows.jsonl, line 1) raised KeyError"
    )
    (tmp_path / "hanging_reward_of_rl.py").write_text("import time\ndef score(completion, row):\n    time.sleep(30)\n")
    fields = {**config, "reward": "hanging_reward_of_rl:score", "reward_timeout_s": 0.2}
    (problem,) = problems(fields, tmp_path)
    assert "did not return within reward_timeout_s=0.2" in problem


def test_a_reward_that_fails_later_is_an_error_that_names_the_row(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picky_reward_of_rl.py").write_text(
        "def score(completion, row):\n    return float('nan') if completion else 0\n"
    )
    data = load({**config, "reward": "picky_reward_of_rl:score"}, tmp_path)
    with pytest.raises(RewardError, match=r"of row 2 \(rows.jsonl, line 3\) is nan"):
        asyncio.run(data.score("x", {}, where=data.train.render(2).where))


def test_held_out_rows_have_limits_of_their_own(config: dict[str, Any], tmp_path: Path) -> None:
    evaluation = {"dataset": config["dataset"], "max_rows": 3, "max_completion_tokens": 2}
    longest = len(load(config, tmp_path).train.render(2).prompt_tokens)
    data = load({**config, "max_seq_len": longest + 10, "evaluation": evaluation}, tmp_path)
    assert (data.num_rows, [row.index for row in data.held_out_rows()]) == (3, [0, 1, 2])
    assert "3 of 3 held-out prompts are training prompts" in data.report.to_text()
    assert list(load(config, tmp_path).held_out_rows()) == []


def test_a_procedural_task_is_a_data_set_with_held_out_rows_of_other_seeds(
    config: dict[str, Any], tmp_path: Path
) -> None:
    task = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=3"
    fields = {**config, "dataset": task, "reward": "reasoning_gym:chain_sum", "max_rows": 8}
    fields |= {"evaluation": {"dataset": task, "max_rows": 5}}
    data = load(fields, tmp_path)
    assert (data.num_rows, len(list(data.held_out_rows())), data.report.evaluation_rows_trained) == (8, 5, 0)
    row = data.row(0)
    assert asyncio.run(data.score(f"<answer>{row.fields['ground_truth']}</answer>", row.fields)).value == 1.0
    again = load(fields, tmp_path / "elsewhere")
    assert again.fingerprint == data.fingerprint
    overlapping = load(fields | {"evaluation": {"dataset": f"{task}&seed=1", "max_rows": 5}}, tmp_path)
    assert overlapping.report.evaluation_rows_trained == 5
    (problem,) = problems({**fields, "dataset": "reasoning_gym:chain_smu"}, tmp_path)
    assert "there is no task 'chain_smu'" in problem


def test_counts_are_taken_once_and_a_damaged_file_of_them_again(config: dict[str, Any], tmp_path: Path) -> None:
    load(config, tmp_path)
    (counts,) = (tmp_path / "cache").glob("prompts-*.npy")
    counts.write_bytes(b"damaged")
    assert load(config, tmp_path).num_rows == 6
    assert counts.read_bytes() != b"damaged"


def test_the_report_says_what_the_run_will_do(config: dict[str, Any], tmp_path: Path) -> None:
    steps = {"prompt_groups_per_step": 4, "epochs": 3, "completions_per_prompt": 8}
    report = load({**config, **steps, "kl_beta": 0.01}, tmp_path).report
    assert (report.max_steps, report.max_completions, report.kl) == (5, 144, "beta 0.01, k3")
    text = report.to_text()
    assert "144 = 18 prompts x 8, each up to 10 tokens" in text
    assert "a run that dies starts over" in text
    assert "| reward | numeric |" in report.to_markdown()
    assert json.loads(json.dumps(report.to_dict()))["max_resume_points"] == 0
    synced = {"weight_sync": {"weight_sync_interval": 0, "dcp_save_interval": 2}, "lora_rank": 0}
    report = load({**config, **steps, **synced}, tmp_path).report
    assert (report.max_resume_points, report.kl) == (2, "off: there is no reference")
    assert "the sampler never gets the trained weights" in report.to_text()


def test_the_example_task_trains_without_its_held_out_problems(config: dict[str, Any], tmp_path: Path) -> None:
    train, held_out = make_rl_task(tmp_path, num_train=30, num_held_out=10, seed=0)
    fields = {**config, "dataset": str(train), "evaluation": {"dataset": str(held_out)}}
    data = load(fields, tmp_path)
    assert (data.num_rows, data.report.evaluation_rows, data.report.evaluation_rows_trained) == (30, 10, 0)


@pytest.mark.parametrize(("name", "reward"), [("countdown", "countdown"), ("deepmath", "math")])
def test_public_rows_load(config: dict[str, Any], tmp_path: Path, name: str, reward: str) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout")
    data = load({**config, "dataset": str(path), "reward": reward, "max_rows": None}, tmp_path)
    assert data.report.rows == len(path.read_text().splitlines())
