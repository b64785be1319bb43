"""RLConfig: defaults of the public recipe, and the rules over several fields."""

import pytest
from pydantic import ValidationError

from cookbook.config import CISPOConfig, DAPOConfig, DROConfig, GSPOConfig, RLConfig, TISConfig

REQUIRED = {"log_path": "runs/a", "base_model": "tiny", "dataset": "rows.jsonl", "reward": "exact"}


def problems_of(**fields):
    with pytest.raises(ValidationError) as caught:
        RLConfig(**REQUIRED, **fields)
    (error,) = caught.value.errors()
    return {problem.where: problem.what for problem in error["ctx"]["error"].problems}


def test_rl_has_the_defaults_of_the_public_recipe():
    config = RLConfig(**REQUIRED)
    assert (config.learning_rate, config.epochs, config.max_rows) == (1e-5, 1, 100)
    assert (config.prompt_groups_per_step, config.completions_per_prompt) == (1, 4)
    assert (config.policy_loss, config.kl_beta, config.temperature) == ("grpo", 0.001, 1.0)
    assert (config.max_completion_tokens, config.eps_clip, config.eps_clip_high, config.ratio_log_cap) == (
        *(1024, 0.2, None, 20),
    )
    assert config.grad_accumulation_normalization == "num_loss_tokens"
    assert config.weight_sync.weight_sync_interval == 1


def test_the_blocks_of_the_losses_have_the_defaults_of_the_public_recipe():
    assert TISConfig().model_dump() == {"cap": 5.0, "level": "token"}
    assert DAPOConfig().model_dump() == {
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "eps_clip_c": None,
        "ratio_log_cap": 20,
    }
    assert GSPOConfig().model_dump() == {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "seq_ratio_log_cap": 10}
    assert CISPOConfig().model_dump() == {"eps_low": 0.2, "eps_high": 0.28, "ratio_log_cap": 20}
    assert DROConfig().model_dump() == {"beta": 0.05}


def test_a_group_of_one_has_no_advantage():
    assert "group of one has advantage 0" in problems_of(completions_per_prompt=1)["completions_per_prompt"]


def test_an_explicit_kl_term_needs_a_reference_and_the_default_one_is_off_without():
    assert "there is no reference" in problems_of(kl_beta=0.1)["kl_beta"]
    assert RLConfig(**REQUIRED).active_kl_beta == 0.0
    lora = RLConfig(**REQUIRED, lora_rank=8)
    assert (lora.active_kl_beta, lora.needs_reference_trainer) == (0.001, False)
    shape = RLConfig(**REQUIRED, kl_beta=0.1, infra={"ref_training_shape_id": "accounts/a/trainingShapes/s"})
    assert (shape.active_kl_beta, shape.needs_reference_trainer) == (0.1, True)


def test_evaluation_needs_a_sampler_with_the_weights_of_its_step():
    evaluation = {"dataset": "held.jsonl", "interval": 3}
    found = problems_of(evaluation=evaluation, weight_sync={"weight_sync_interval": 2})
    assert "not a multiple" in found["evaluation.interval"]
    found = problems_of(evaluation=evaluation, weight_sync={"weight_sync_interval": 0})
    assert "never gets the trained weights" in found["evaluation.dataset"]
    RLConfig(**REQUIRED, evaluation=evaluation, weight_sync={"weight_sync_interval": 3})


def test_what_is_not_there_is_refused_and_all_at_once():
    found = problems_of(router_replay=True, policy_base_url="http://x", completions_per_prompt=1)
    assert set(found) == {"router_replay", "policy_base_url", "completions_per_prompt"}
