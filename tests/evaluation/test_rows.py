"""What an evaluation reads: prompts without their answers, reference answers as tokens, and every problem at once."""

import json

import pytest

from cookbook.errors import ConfigError
from cookbook.evaluation.rows import load_evaluation_data
from cookbook.evaluation_config import EvaluationConfig
from tests.tiny_model import make_tiny_adapter, make_tiny_model

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "four"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "tiny")
    make_tiny_adapter(folder / "adapter", base=folder / "tiny")
    make_tiny_model(folder / "short", max_position_embeddings=64)
    return folder


def load(models, tmp_path, rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    given = {"log_path": "e", "model": "tiny", "dataset": str(path), "max_completion_tokens": 20, **fields}
    return load_evaluation_data(EvaluationConfig(**given), models, tmp_path / "cache")


def problems(*arguments, **fields):
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **fields)
    return caught.value.problems


def bytes_of(tokens):
    return bytes(token for token in tokens if token < 256).decode()


def test_an_answer_at_the_end_is_the_reference_and_is_cut_off_for_the_prompt(models, tmp_path):
    data = load(models, tmp_path, [{"messages": [USER, ANSWER]}, {"messages": [USER]}], reward="format:four")
    first, second = data.rows["model"]
    assert first.messages == second.messages == (USER,)
    assert first.prompt_tokens == second.prompt_tokens
    assert bytes_of(first.prompt_tokens) == "user\n2+2?\nassistant\n"
    assert second.reference is None
    reference = first.reference
    assert reference.tokens[: len(first.prompt_tokens)] == first.prompt_tokens
    trained = [token for token, weight in zip(reference.tokens, reference.weights, strict=True) if weight]
    assert (bytes_of(trained), len(trained)) == ("four", 5)  # with the end of the turn
    assert first.fields["messages"][-1] == ANSWER


def test_rows_that_are_not_answered_need_no_room_for_an_answer(models, tmp_path):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [{"role": "user", "content": "x" * 600}]}]
    assert load(models, tmp_path, rows, max_completion_tokens=500).num_rows == 2
    assert "2 of 2 rows" in problems(models, tmp_path, rows, max_completion_tokens=500, reward="format:a")[0].what


def test_only_the_last_answer_is_the_reference(models, tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "no"}, USER, ANSWER]}]
    reference = load(models, tmp_path, rows).references("model")[0]
    assert sum(reference.weights) == 5
    assert reference.text == "four"


def test_an_adapter_is_read_with_the_tokenizer_and_the_context_of_its_base(models, tmp_path):
    data = load(models, tmp_path, [{"messages": [USER, ANSWER]}], model="adapter", against="tiny")
    assert data.rows["model"][0].reference.tokens == data.rows["against"][0].reference.tokens
    assert data.same_tokens


def test_rows_that_cannot_be_used_are_all_named_and_none_is_dropped(models, tmp_path):
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [ANSWER]},
        "no json",
        {"messages": [{"role": "user", "content": "x" * 600}]},
        {"messages": [USER, {"role": "assistant", "content": "x" * 600}]},
    ]
    (problem,) = problems(models, tmp_path, rows, reward="format:four")
    assert problem.where == "dataset"
    for text in ("4 of 5 rows", "line 2) is an answer without a question", "line 3) is not JSON", "line 5) has 6"):
        assert text in problem.what
    assert "line 4) has a prompt of 6" in problem.what


def test_the_shorter_context_of_the_two_models_counts(models, tmp_path):
    told = problems(models, tmp_path, [{"messages": [USER, ANSWER]}], against="short", max_completion_tokens=60)
    assert "the limit is 64" in told[0].what


def test_a_broken_reward_and_a_broken_judge_show_before_anything_starts(models, tmp_path):
    fields = {"against": "adapter", "judge": "tests.evaluation.test_rows:broken", "reward": "tests.evaluation:none"}
    told = problems(models, tmp_path, [{"messages": [USER]}], **fields)
    assert [problem.where for problem in told] == ["reward"]
    del fields["reward"]
    (problem,) = problems(models, tmp_path, [{"messages": [USER]}], **fields)
    assert (problem.where, "ZeroDivisionError" in problem.what) == ("judge", True)


def broken(row, answer, other):
    return 1 / 0


def test_a_reward_that_can_never_score_a_row_names_it(models, tmp_path):
    (problem,) = problems(models, tmp_path, [{"messages": [USER]}], reward="exact")
    assert "row 0" in problem.what
    assert "ground_truth" in problem.what


def test_rows_without_references_need_something_to_measure(models, tmp_path):
    (problem,) = problems(models, tmp_path, [{"messages": [USER]}])
    assert "nothing to measure" in problem.what


def test_a_max_seq_len_above_the_context_is_refused(models, tmp_path):
    assert "max_seq_len=600" in problems(models, tmp_path, [{"messages": [USER, ANSWER]}], max_seq_len=600)[0].what
