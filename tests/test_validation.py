"""Loading a config: the three sources, and every problem at once with field, value and remedy."""

import json
import shutil
import subprocess
import sys

import pytest

from cookbook.config import RLConfig, SFTConfig, environment
from cookbook.errors import ConfigError
from cookbook.validation import check_inputs, load_config
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def inputs(tmp_path, monkeypatch, model):
    """Fields of a config whose files and model exist."""
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return {"log_path": "run", "base_model": str(model), "dataset": "rows.jsonl"}


def problems(**sources):
    """The problems as text, one each."""
    with pytest.raises(ConfigError) as caught:
        load_config(SFTConfig, **sources)
    return [str(problem) for problem in caught.value.problems]


def yaml_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_a_file_sets_and_python_make_equal_configs(inputs, tmp_path):
    nested = {"weight_sync": {"dcp_save_interval": 5}, "infra": {"extra_args": ["--threads=2", "--x=1"]}}
    built = SFTConfig(**inputs, learning_rate=2e-5, max_seq_len=None, save_final_checkpoint=False, **nested)
    from_file = load_config(
        SFTConfig,
        file=yaml_file(
            tmp_path,
            f"log_path: run\nbase_model: {inputs['base_model']}\ndataset: rows.jsonl\nlearning_rate: 2e-5\n"
            "max_seq_len:\nsave_final_checkpoint: no\n"
            "weight_sync:\n  dcp_save_interval: 5\ninfra: {extra_args: [--threads=2, --x=1]}\n",
        ),
    )
    from_sets = load_config(
        SFTConfig,
        sets=[
            "log_path=run",
            f"base_model={inputs['base_model']}",
            "dataset=rows.jsonl",
            "learning_rate=2e-5",
            "max_seq_len=",
            "save_final_checkpoint=false",
            "weight_sync.dcp_save_interval=5",
            "infra.extra_args=[--threads=2, --x=1]",
        ],
    )
    from_overrides = load_config(
        SFTConfig,
        overrides={**inputs, "learning_rate": 2e-5, "max_seq_len": None, "save_final_checkpoint": False}
        | {"weight_sync.dcp_save_interval": 5, "infra.extra_args": ["--threads=2", "--x=1"]},
    )
    assert built == from_file == from_sets == from_overrides


def test_sets_win_over_the_file_and_overrides_over_sets(inputs, tmp_path):
    file = yaml_file(tmp_path, "epochs: 1\nbatch_size: 1\nseed: 1\nadam: {beta1: 0.5, beta2: 0.5}\n")
    sets = ["batch_size=2", "seed=2", "adam.beta1=0.7", "adam.beta1=0.8"]
    config = load_config(SFTConfig, file=file, sets=sets, overrides={**inputs, "seed": 3})
    assert (config.epochs, config.batch_size, config.seed) == (1, 2, 3)
    assert (config.adam.beta1, config.adam.beta2) == (0.8, 0.5)


def test_every_problem_is_in_one_error(inputs, tmp_path):
    file = yaml_file(
        tmp_path,
        "base_modl: tiny\nlearning_rate: fast\nbatch_size: 0\noutput_model_id: Not_An_Id\nepochs: [1]\n"
        "infra: {training_shape_id: s, node_count: 2}\nevaluation: {dataset: nowhere.jsonl}\n",
    )
    found = problems(file=file, sets=["oops"], overrides={"log_path": "run", "dataset": "gone.jsonl"})
    where = {text.split(": ")[0] for text in found}
    fields = {"base_model", "epochs", "infra", "learning_rate", "batch_size", "base_modl", "output_model_id", "dataset"}
    assert where == {"--set oops", "evaluation.dataset"} | fields
    assert len(found) == len(where)
    with pytest.raises(ConfigError, match=r"^10 problems in the config; nothing was provisioned:\n  - "):
        load_config(SFTConfig, file=file)


def test_a_missing_required_field_says_what_it_is(inputs):
    del inputs["dataset"]
    assert problems(overrides=inputs) == ["dataset: is required, but not set. JSONL file with the training rows."]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("learning_rte=1", "learning_rte: is not a field, got 1. Did you mean learning_rate?"),
        (
            "dcp_save_interval=1",
            "dcp_save_interval: is not a field, got 1. Did you mean weight_sync.dcp_save_interval?",
        ),
        ("infra.extra_arg=[a]", "infra.extra_arg: is not a field, got ['a']. Did you mean infra.extra_args?"),
        ("wandb.zzz=1", "wandb.zzz: is not a field, got 1. Known here: wandb.entity, wandb.project, wandb.run_name."),
    ],
)
def test_an_unknown_field_names_the_closest_known_one(inputs, item, expected):
    assert problems(sets=[item], overrides=inputs) == [expected]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("epochs=many", "epochs: must be a valid integer, unable to parse string as an integer, got 'many'."),
        ("epochs=0", "epochs: must be greater than or equal to 1, got 0."),
        ("epochs=1.5", "epochs: must be a valid integer, got a number with a fractional part, got 1.5."),
        ("learning_rate=.nan", "learning_rate: must be a finite number, got nan."),
        ("adam.beta1=1", "adam.beta1: must be less than 1, got 1."),
        ("adam=3", "adam: must be a block of fields, got 3."),
        ("infra.extra_args=[1]", "infra.extra_args.0: must be a valid string, got 1."),
        ("backend=aws", "backend: must be one of embedded, fireworks, got 'aws'."),
        ("dataset=5", "dataset: must be a valid string, got 5."),
        ("dataset=", "dataset: must be a valid string, got None."),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed_and_what_the_field_means(inputs, item, expected):
    (problem,) = problems(sets=[item], overrides={k: v for k, v in inputs.items() if not item.startswith(k)})
    assert problem.startswith(expected)
    field = SFTConfig.model_fields[item.partition("=")[0].partition(".")[0]]
    assert field.description.split(":")[0] in problem or "." in item


def test_a_long_value_is_shortened(inputs):
    (problem,) = problems(sets=[f"epochs={'x' * 5000}"], overrides=inputs)
    assert len(problem) < 400


def test_a_shape_with_hardware_set_by_hand_names_the_fields(inputs):
    sets = ["infra.training_shape_id=s", "infra.accelerator_type=H100", "infra.accelerator_count=8"]
    (problem,) = problems(sets=sets, overrides=inputs)
    assert "accelerator_type='H100', accelerator_count=8 cannot be set together with training_shape_id='s'" in problem


def test_a_rule_is_not_reported_on_a_field_that_is_wrong_by_itself(inputs):
    sets = ["backend=fireworks", "infra.training_shape_id=5", "base_model=accounts/fireworks/models/x"]
    found = problems(sets=sets, overrides={k: v for k, v in inputs.items() if k != "base_model"})
    assert [text.split(": ")[0] for text in found] == ["infra.training_shape_id", "tokenizer_model"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "config.yaml, line 3: is not valid YAML:"),
        ("epochs: 1\nseed: 2\nepochs: 3\n", "config.yaml, line 3: is not valid YAML: 'epochs' is given twice."),
        ("adam: {beta1: 0.5,\n  beta1: 0.6}\n", "config.yaml, line 2: is not valid YAML: 'beta1' is given twice."),
        ("- epochs\n", "config.yaml: holds ['epochs'], not a mapping."),
        ("just text\n", "config.yaml: holds 'just text', not a mapping."),
        ("x: !!python/object/apply:os.system [ls]\n", "config.yaml, line 1: is not valid YAML:"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_named_with_its_line(inputs, tmp_path, text, expected):
    found = problems(file=yaml_file(tmp_path, text), overrides=inputs)
    assert len(found) == 1
    assert expected in found[0]


def test_files_that_cannot_be_read_are_named(inputs, tmp_path):
    (found,) = problems(file=tmp_path / "absent.yaml", overrides=inputs)
    assert "absent.yaml: there is no such file." in found
    (found,) = problems(file=tmp_path, overrides=inputs)
    assert "cannot be read" in found
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    (found,) = problems(file=tmp_path / "binary.yaml", overrides=inputs)
    assert "is not UTF-8" in found


def test_an_empty_file_sets_nothing(inputs, tmp_path):
    assert load_config(SFTConfig, file=yaml_file(tmp_path, "# nothing\n"), overrides=inputs) == SFTConfig(**inputs)


def test_yaml_merges_work(inputs, tmp_path):
    file = yaml_file(tmp_path, "adam:\n  <<: {beta1: 0.5, beta2: 0.5}\n  beta2: 0.6\n")
    adam = load_config(SFTConfig, file=file, overrides=inputs).adam
    assert (adam.beta1, adam.beta2) == (0.5, 0.6)


@pytest.mark.parametrize("item", ["epochs", "=1", ".a=1", "a.=1", "adam..beta1=1", ""])
def test_a_set_without_key_and_value_is_explained(inputs, item):
    (problem,) = problems(sets=[item], overrides=inputs)
    assert problem.startswith(f"--set {item}: is not KEY=VALUE.")


def test_a_set_whose_value_is_no_yaml_is_explained(inputs):
    (problem,) = problems(sets=["infra.extra_args=[a"], overrides=inputs)
    assert "the value is not valid YAML" in problem
    assert "in quotes" in problem


def test_a_set_below_a_field_that_is_no_block_is_explained(inputs):
    found = problems(sets=["epochs=1", "epochs.more=2"], overrides=inputs)
    assert found == ["--set epochs.more=2: epochs is 1, not a block of fields. Remove epochs or write it as one."]


def test_a_value_with_an_equals_sign_keeps_it(inputs):
    config = load_config(SFTConfig, sets=["infra.purpose=a=b"], overrides=inputs)
    assert config.infra.purpose == "a=b"


# What the config points at ------------------------------------------------------------------------------------------


def test_a_missing_an_empty_and_a_folder_as_data_set_are_told_apart(inputs, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (absent,) = problems(overrides={**inputs, "dataset": "absent.jsonl"})
    assert absent.startswith(f"dataset: there is no file 'absent.jsonl' (looked in {tmp_path}).")
    (empty,) = problems(overrides={**inputs, "dataset": "empty.jsonl"})
    assert empty.startswith("dataset: 'empty.jsonl' has no rows.")
    (folder,) = problems(overrides={**inputs, "dataset": str(tmp_path)})
    assert "is a folder" in folder


def test_a_model_that_is_not_there_says_how_to_get_it(inputs):
    (known,) = problems(overrides={**inputs, "base_model": "smollm2-135m-instruct"})
    assert "cookbook models pull smollm2-135m-instruct" in known
    (unknown,) = problems(overrides={**inputs, "base_model": "nonsense"})
    assert unknown.startswith("base_model: no model 'nonsense'")


def test_a_model_folder_without_weights_is_named(inputs, model, tmp_path):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (problem,) = problems(overrides={**inputs, "base_model": str(tmp_path / "model")})
    assert problem.startswith("base_model:")
    assert "safetensors" in problem


def test_a_tokenizer_that_is_not_there_is_named(inputs):
    (problem,) = problems(overrides={**inputs, "tokenizer_model": "nonsense"})
    assert problem.startswith("tokenizer_model: no model 'nonsense'")


def test_a_hub_name_is_left_to_the_hub(inputs):
    assert load_config(SFTConfig, overrides={**inputs, "base_model": "organization/model"})


def test_a_fireworks_model_needs_the_name_of_its_tokenizer(inputs):
    fields = {**inputs, "base_model": "accounts/fireworks/models/qwen3-8b", "backend": "fireworks"}
    (problem,) = problems(overrides={**fields, "infra.training_shape_id": "s"})
    assert problem.startswith("tokenizer_model: is None, and base_model 'accounts/fireworks/models/qwen3-8b'")


def test_a_log_path_that_is_a_file_is_refused(inputs, tmp_path):
    (tmp_path / "taken").write_text("")
    (problem,) = problems(overrides={**inputs, "log_path": "taken/run"})
    assert problem.startswith(f"log_path: {tmp_path / 'taken'} is a file")


def test_wandb_without_a_key_is_a_problem_unless_it_is_offline(inputs, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    fields = {**inputs, "wandb.project": "p"}
    (problem,) = problems(overrides=fields)
    assert problem.startswith("wandb.project: 'p' is set, but W&B has no key")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert load_config(SFTConfig, overrides=fields).wandb.project == "p"


def test_a_config_made_in_python_is_checked_by_the_same_function(inputs):
    config = SFTConfig(**{**inputs, "dataset": "absent.jsonl"})
    assert [problem.where for problem in check_inputs(config, environment())] == ["dataset"]


def test_validation_is_imported_without_torch_transformers_and_prefect():
    code = "import sys, cookbook.validation; print({'torch', 'transformers', 'prefect', 'wandb'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_problems_of_rows_come_in_the_same_error_as_those_of_fields(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}]}\nnot json\n')
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"messages": []}\n')
    sets = [
        f"base_model={model}",
        f"dataset={rows}",
        f"evaluation.dataset={held_out}",
        f"log_path={tmp_path / 'run'}",
        "learning_rte=1",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(SFTConfig, sets=sets)
    text = str(caught.value)
    assert "learning_rte" in text
    assert "row 0" in text
    assert "row 1" in text
    assert [p.where for p in caught.value.problems] == ["learning_rte", "dataset", "evaluation.dataset"]


# RL -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rl_inputs(inputs, tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}], "ground_truth": "1"}
    (tmp_path / "rl.jsonl").write_text(json.dumps(row) + "\n")
    return {**inputs, "dataset": "rl.jsonl", "reward": "numeric", "max_completion_tokens": 8}


def rl_problems(**sources):
    with pytest.raises(ConfigError) as caught:
        load_config(RLConfig, **sources)
    return [str(problem) for problem in caught.value.problems]


def test_an_rl_config_may_name_procedural_tasks_and_rewards_of_ones_own(rl_inputs):
    task = "reasoning_gym:chain_sum?size=10"
    fields = {**rl_inputs, "dataset": task, "evaluation.dataset": f"{task}&seed=1000", "reward": "my_rewards:score"}
    assert load_config(RLConfig, overrides=fields).reward == "my_rewards:score"


def test_the_inputs_of_an_rl_config_are_checked_together(rl_inputs, tmp_path):
    (tmp_path / "taken").write_text("")
    fields = {"dataset": "reasoning_gym:?x", "reward": "cuntdown", "evaluation.dataset": "absent.jsonl"}
    fields |= {"trajectory_dir": "taken/rollouts", "deployment.tokenizer_model": "nonsense", "lora_rnak": 3}
    found = {text.partition(": ")[0]: text for text in rl_problems(overrides={**rl_inputs, **fields})}
    assert set(found) == {*fields}
    assert "is not a task. Write reasoning_gym:NAME" in found["dataset"]
    assert found["reward"] == "reward: there is no reward 'cuntdown'. Did you mean countdown?"
    assert "there is no file 'absent.jsonl'" in found["evaluation.dataset"]
    assert "taken is a file" in found["trajectory_dir"]
    assert "no model 'nonsense'" in found["deployment.tokenizer_model"]


def test_problems_of_rl_rows_come_in_the_same_error_as_those_of_fields(rl_inputs, tmp_path):
    (tmp_path / "rl.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    found = rl_problems(overrides={**rl_inputs, "lora_rnak": 3})
    assert [text.partition(": ")[0] for text in found] == ["lora_rnak", "dataset"]
    assert "row 0 (rl.jsonl, line 1) has no ground_truth" in found[1]


def test_a_fireworks_rl_config_needs_the_name_of_its_tokenizer_once(rl_inputs):
    fields = {**rl_inputs, "base_model": "accounts/fireworks/models/qwen3-8b", "backend": "fireworks"}
    (problem,) = rl_problems(overrides={**fields, "infra.training_shape_id": "s"})
    assert problem.startswith("deployment.tokenizer_model: is None")
