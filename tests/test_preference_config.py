"""The configs of DPO and ORPO: defaults, what may be left out, and rules over several fields."""

import pytest
from pydantic import ValidationError

from cookbook.config import (
    DPOConfig,
    ORPOConfig,
    RecipeConfig,
    WeightSyncConfig,
)
from cookbook.errors import ConfigError

BASE = {"log_path": "run", "base_model": "model", "dataset": "pairs.jsonl"}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DPOConfig, {"beta": 0.1, "ref_cache_concurrency": 16, "ref_cache_batch_size": 1}),
        (ORPOConfig, {"orpo_lambda": 1.0, "lr_schedule": "constant", "warmup_ratio": 0, "min_lr_ratio": 0}),
    ],
)
def test_defaults_are_those_of_the_reference(config, fields):
    made = config(**BASE)
    shared = {
        "learning_rate": 1e-5,
        "epochs": 1,
        "batch_size": 4,
        "max_pairs": None,
        "lora_rank": 0,
        "max_seq_len": None,
    }
    for name, value in {**shared, **fields, "grad_accumulation_normalization": None, "step_timeout": 0}.items():
        assert getattr(made, name) == value, name


@pytest.mark.parametrize(
    ("given", "interval"),
    [
        ({}, 0),
        ({"weight_sync": {}}, 0),
        ({"weight_sync": {"dcp_save_interval": 5}}, 0),
        ({"weight_sync": WeightSyncConfig(dcp_save_interval=5)}, 0),
        ({"weight_sync": {"weight_sync_interval": 1}}, 1),
        ({"weight_sync": WeightSyncConfig(weight_sync_interval=1)}, 1),
    ],
)
def test_dpo_syncs_weights_only_when_the_interval_was_set(given, interval):
    config = DPOConfig(**BASE, **given)
    assert config.weight_sync.weight_sync_interval == interval
    assert config.has_deployment == (interval > 0)


def test_what_was_set_in_a_shared_weight_sync_block_is_kept():
    config = DPOConfig(**BASE, weight_sync=WeightSyncConfig(dcp_save_interval=5, dcp_timeout=7))
    assert (config.weight_sync.dcp_save_interval, config.weight_sync.dcp_timeout) == (5, 7)


def test_a_config_survives_being_written_and_read():
    for config in (DPOConfig(**BASE, weight_sync={"weight_sync_interval": 3}), ORPOConfig(**BASE, orpo_lambda=0.5)):
        assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_the_reference_is_a_trainer_of_its_own_unless_there_is_an_adapter():
    assert DPOConfig(**BASE).needs_reference_trainer
    assert not DPOConfig(**BASE, lora_rank=8).needs_reference_trainer


def problems_of(config: type[RecipeConfig], **fields) -> str:
    with pytest.raises((ConfigError, ValidationError)) as caught:
        config(**BASE, **fields)
    return str(caught.value)


def test_a_reference_shape_beside_an_adapter_is_refused():
    told = problems_of(DPOConfig, lora_rank=8, infra={"ref_training_shape_id": "accounts/a/trainingShapes/s"})
    assert "infra.ref_training_shape_id" in told
    assert "lora_rank 8" in told


def test_a_deployment_on_fireworks_needs_hardware_only_where_weights_are_synced():
    infra = {"accelerator_type": "NVIDIA_H100_80GB", "accelerator_count": 1}
    DPOConfig(**BASE, backend="fireworks", infra=infra)
    told = problems_of(DPOConfig, backend="fireworks", infra=infra, weight_sync={"weight_sync_interval": 1})
    assert "deployment_shape" in told


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"deployment": {"replica_count": 2}}, "deployment: is set"),
        ({"weight_sync": {"weight_sync_before_training": True}}, "weight_sync.weight_sync_before_training: is set"),
        ({"evaluation": {"interval": 5}}, "evaluation.interval: is 5"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields, named):
    assert named in problems_of(DPOConfig, **fields)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (DPOConfig, "beta", 0),
        (DPOConfig, "ref_cache_concurrency", 0),
        (DPOConfig, "ref_cache_batch_size", 0),
        (DPOConfig, "batch_size", 0),
        (ORPOConfig, "orpo_lambda", -0.1),
        (ORPOConfig, "lr_schedule", "step"),
        (ORPOConfig, "beta", 0.1),
        (ORPOConfig, "deployment", {}),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(config, field, value):
    assert field in problems_of(config, **{field: value})
