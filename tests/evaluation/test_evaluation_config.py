"""The config of an evaluation: what it decides, and that all its problems come at once."""

import pytest
from pydantic import ValidationError

from cookbook.errors import ConfigError
from cookbook.evaluation_config import EvaluationConfig, load_evaluation_config
from tests.tiny_model import make_tiny_model


def config(**fields):
    return EvaluationConfig(**{"log_path": "runs/e", "model": "a", "dataset": "rows.jsonl", **fields})


def problems(**fields):
    with pytest.raises(ValidationError) as caught:
        config(**fields)
    return {problem.where for problem in caught.value.errors()[0]["ctx"]["error"].problems}


def test_one_answer_is_greedy_and_more_are_drawn_at_temperature_1():
    assert config().sampling_temperature == 0.0
    assert config(samples_per_row=2).sampling_temperature == 1.0
    assert config(samples_per_row=2, temperature=0.5).sampling_temperature == 0.5


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"pass_at": [1, 4], "samples_per_row": 3, "reward": "exact"}, {"pass_at"}),
        ({"pass_at": [2, 2], "samples_per_row": 3, "reward": "exact"}, {"pass_at"}),
        ({"pass_at": [2], "samples_per_row": 3}, {"pass_at"}),
        ({"pass_threshold": 0.5}, {"pass_threshold"}),
        ({"temperature": 0, "samples_per_row": 2}, {"temperature"}),
        ({"judge": "m:f"}, {"judge"}),
        ({"against": "a"}, {"against"}),
        ({"backend": "fireworks"}, {"tokenizer_model", "model", "deployment"}),
        ({"temperature": 0, "samples_per_row": 2, "judge": "m:f", "pass_at": [9]}, {"temperature", "judge", "pass_at"}),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, where):
    assert problems(**fields) == where


def test_a_whole_config_as_a_form_sends_it_is_accepted():
    assert EvaluationConfig(**config().model_dump()) == config()


def test_an_adopted_deployment_serves_the_model_and_may_be_compared_with_its_base():
    adopted = config(against="a", deployment={"deployment_id": "d"})
    assert adopted.deployment_of("model").deployment_id == "d"
    assert adopted.deployment_of("against").deployment_id is None


def test_where_and_how_fast_it_runs_is_no_part_of_the_numbers_but_what_is_served_is():
    plain = config().numbers()
    assert config(log_path="b", timeout_s=5, concurrency={"max_window": 3}, wandb={"project": "p"}).numbers() == plain
    assert config(deployment={"sample_timeout": 5}).numbers() == plain
    assert config(seed=1).numbers() != plain
    assert config(deployment={"deployment_id": "d"}).numbers() != plain
    assert config(deployment={"deployment_extra_args": ["--threads=1"], "replica_count": 2}).numbers() == plain
    for served in (
        {"deployment": {"deployment_extra_args": ["--compute-dtype=float32"]}},
        {"deployment": {"deployment_shape": "accounts/a/deploymentShapes/s"}},
        {"deployment": {"deployment_accelerator_type": "H200"}},
        {"deployment": {"extra_values": {"a": "b"}}},
        {"infra": {"training_shape_id": "accounts/a/trainingShapes/s"}},
    ):
        assert config(**served).numbers() != plain
        assert config(**served).served("model") != config().served("model")


def test_answers_are_wanted_where_something_is_measured_on_them():
    assert not config().wants_answers
    assert config(reward="exact").wants_answers
    assert config(against="b").wants_answers


def test_all_problems_of_fields_rules_files_and_models_come_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path))
    overrides = {"log_path": str(tmp_path / "e"), "model": "nope", "dataset": "none.jsonl", "reward": "exct"}
    overrides |= {"judge": "exact", "seed": -1, "temprature": 1}
    with pytest.raises(ConfigError) as caught:
        load_evaluation_config(overrides=overrides)
    told = [(problem.where, problem.what + problem.remedy) for problem in caught.value.problems]
    assert {where for where, _ in told} == {"model", "dataset", "reward", "judge", "seed", "temprature"}
    assert any("Did you mean temperature?" in text for _, text in told)


def test_a_config_file_sets_and_options_are_read_in_this_order(tmp_path, monkeypatch):
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path))
    make_tiny_model(tmp_path / "models" / "tiny")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    file = tmp_path / "eval.yaml"
    file.write_text(f"log_path: {tmp_path / 'e'}\nmodel: other\ndataset: {rows}\nseed: 1\nmax_rows: 5\n")
    loaded = load_evaluation_config(file=file, sets=["seed=2"], overrides={"model": "tiny"})
    assert (loaded.model, loaded.seed, loaded.max_rows) == ("tiny", 2, 5)
