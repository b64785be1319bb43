"""The configs: defaults of the public reference, rules between fields, the learning-rate schedule, the environment."""

import math
import pickle

import pytest
from pydantic import ValidationError

from cookbook.config import (
    DeployConfig,
    InfraConfig,
    RetryConfig,
    SFTConfig,
    WandBConfig,
    WeightSyncConfig,
    environment,
)

REQUIRED = {"log_path": "runs/a", "base_model": "tiny", "dataset": "rows.jsonl"}


def test_shared_blocks_have_the_defaults_of_the_public_reference():
    assert InfraConfig().model_dump(exclude={"purpose"}) == {
        "training_shape_id": None,
        "ref_training_shape_id": None,
        "region": None,
        "accelerator_type": None,
        "accelerator_count": None,
        "node_count": None,
        "custom_image_tag": None,
        "trainer_timeout_s": 3600,
        "extra_args": None,
    }
    assert DeployConfig().model_dump(exclude={"replica_count"}) == {
        "deployment_id": None,
        "tokenizer_model": None,
        "deployment_shape": None,
        "deployment_region": None,
        "hot_load_bucket_type": "FW_HOSTED",
        "deployment_accelerator_type": None,
        "deployment_timeout_s": 5400,
        "deployment_extra_args": None,
        "sample_timeout": 600,
        "disable_speculative_decoding": True,
        "extra_values": None,
    }
    assert WeightSyncConfig().model_dump() == {
        "weight_sync_interval": 1,
        "dcp_save_interval": 0,
        "dcp_timeout": 2700,
        "first_checkpoint_type": "base",
        "weight_sync_before_training": False,
        "weight_sync_timeout": 600,
    }
    assert WandBConfig().model_dump() == {"entity": None, "project": None, "run_name": None}


def test_sft_has_the_defaults_of_the_public_recipe():
    config = SFTConfig(**REQUIRED)
    assert (config.learning_rate, config.epochs, config.batch_size) == (1e-4, 3, 32)
    assert (config.adam.beta1, config.adam.beta2, config.adam.eps, config.adam.weight_decay) == (0.9, 0.999, 1e-8, 0.01)
    assert config.grad_accumulation_normalization is None
    assert config.max_seq_len is None
    assert config.train_on_what == "all_assistant_messages"
    assert config.step_timeout_s == 3600


def test_a_config_is_frozen_compares_by_value_and_survives_pickle_and_json():
    config = SFTConfig(**REQUIRED, infra={"extra_args": ["--threads=1"]})
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 2
    assert pickle.loads(pickle.dumps(config)) == config
    assert SFTConfig.model_validate_json(config.model_dump_json()) == config


def test_choices_stay_strings_and_show_in_the_schema():
    field = SFTConfig.model_json_schema()["properties"]["train_on_what"]
    assert field["type"] == "string"
    assert field["enum"] == ["all_assistant_messages", "last_assistant_message", "all_messages"]
    with pytest.raises(ValidationError, match="must be one of all_assistant_messages"):
        SFTConfig(**REQUIRED, train_on_what="everything")


def test_a_shape_owns_its_hardware():
    with pytest.raises(ValidationError, match="node_count=2 cannot be set together with training_shape_id='s'"):
        InfraConfig(training_shape_id="s", node_count=2)
    with pytest.raises(ValidationError, match="deployment_shape='s'"):
        DeployConfig(deployment_shape="s", deployment_accelerator_type="H100")


def test_a_manual_launch_on_fireworks_needs_an_accelerator():
    with pytest.raises(ValidationError, match=r"infra\.accelerator_type and infra\.accelerator_count not set"):
        SFTConfig(**REQUIRED, backend="fireworks")
    SFTConfig(**REQUIRED, backend="fireworks", infra={"accelerator_type": "H100", "accelerator_count": 8})
    SFTConfig(**REQUIRED, backend="fireworks", infra={"training_shape_id": "accounts/fireworks/trainingShapes/x"})


def test_promoting_needs_a_final_checkpoint_and_an_id_that_can_be_one():
    with pytest.raises(ValidationError, match="needs a final checkpoint"):
        SFTConfig(**REQUIRED, output_model_id="mine", save_final_checkpoint=False)
    for bad in ("Mine", "-a", "a-", "a" * 64, "a_b", ""):
        with pytest.raises(ValidationError, match="is not a model id"):
            SFTConfig(**REQUIRED, output_model_id=bad)
    SFTConfig(**REQUIRED, output_model_id="a" * 63)


def test_init_from_checkpoint_is_a_name_or_a_job_and_a_name():
    SFTConfig(**REQUIRED, init_from_checkpoint="step-50")
    SFTConfig(**REQUIRED, init_from_checkpoint="job-abc:step-50")
    with pytest.raises(ValidationError, match="is not a checkpoint"):
        SFTConfig(**REQUIRED, init_from_checkpoint="a:b:c")


def rates(total, **fields):
    config = SFTConfig(**REQUIRED, learning_rate=1.0, **fields)
    return [config.learning_rate_at(step, total) for step in range(total)]


def test_the_constant_schedule_stays_at_the_peak():
    assert rates(4) == [1.0] * 4


def test_the_linear_schedule_would_reach_the_minimum_after_the_last_step():
    assert rates(4, lr_schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_the_cosine_schedule_is_half_way_in_the_middle():
    expected = [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]
    assert rates(4, lr_schedule="cosine") == pytest.approx(expected)


def test_the_warm_up_rises_linearly_and_the_first_step_already_moves():
    assert rates(10, warmup_ratio=0.3)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_finite_rates(schedule, total):
    values = rates(total, lr_schedule=schedule, warmup_ratio=0.5)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)
    assert values[0] > 0


def test_retry_pauses_double_up_to_the_longest():
    assert RetryConfig(attempts=5, initial_delay_s=2, max_delay_s=9).delays() == [2, 4, 8, 9]
    assert RetryConfig(attempts=1).delays() == []


def test_the_environment_is_read_when_asked_and_never_shows_a_key(monkeypatch, tmp_path):
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path))
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw-sentinel")
    monkeypatch.setenv("COOKBOOK_STATUS_FILE", "status.json")
    monkeypatch.setenv("WANDB_API_KEY", "wb-sentinel")
    env = environment()
    assert (env.home, env.fireworks_api_key) == (tmp_path.resolve(), "fw-sentinel")
    assert env.runner_files == {"status_file": "status.json"}
    assert env.wandb_key_present
    assert "sentinel" not in repr(env)
    monkeypatch.setenv("FIREWORKS_API_KEY", "")
    assert environment().fireworks_api_key is None


def test_a_wandb_key_in_the_netrc_file_counts(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password sentinel\n")
    netrc.chmod(0o600)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(netrc))
    assert environment().wandb_key_present
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert not environment().wandb_key_present
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    assert not environment().wandb_key_present
