"""Loss kernels against numbers worked by hand, closed-form gradients and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cookbook.errors import ConfigError, ShapeError
from cookbook.losses import KERNELS, LossInput, LossOutput

POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "dapo", "gspo")


def evaluate(
    name: str, policy: list[float], old: list[float], advantages: list[float], **config: float
) -> tuple[LossOutput, Tensor]:
    """The kernel's output and its gradient with respect to the policy's logprobs, in float64."""
    leaf = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    datum = LossInput(
        leaf,
        old_logprobs=torch.tensor(old, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
    )
    kernel = KERNELS[name]
    output = kernel.formula(datum, kernel.check_config(config))
    output.loss.backward()
    assert leaf.grad is not None
    return output, leaf.grad


def cross_entropy(logprobs: Tensor, weights: Tensor) -> LossOutput:
    return KERNELS["cross_entropy"].formula(LossInput(logprobs, weights=weights), {})


def test_cross_entropy_is_the_raw_weighted_sum() -> None:
    # -(2 * -1.5 + 0 * -9 + 0.25 * -4) = 3 + 0 + 1
    output = cross_entropy(torch.tensor([-1.5, -9.0, -4.0]), torch.tensor([2.0, 0.0, 0.25]))
    assert output.loss.item() == 4.0


def test_cross_entropy_keeps_negative_fractional_and_large_weights_exactly() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    weights = torch.tensor([-0.7, 1234.5, 1e-9])
    cross_entropy(logprobs, weights).loss.backward()
    assert torch.equal(logprobs.grad, -weights)


def test_cross_entropy_counts_negative_weights_as_loss_tokens() -> None:
    datum = LossInput(torch.tensor([[-1.0, -2.0]]), weights=torch.tensor([[-0.5, 0.0]]))
    assert KERNELS["cross_entropy"].loss_tokens(datum).tolist() == [[True, False]]


def test_cross_entropy_needs_weights_of_the_targets_shape() -> None:
    with pytest.raises(ShapeError, match=r"weights has shape \(2,\), the target tokens \(3,\)"):
        cross_entropy(torch.zeros(3), torch.zeros(2))


# Ratios by hand: exp(log 1.5) = 1.5, exp(log 0.5) = 0.5, exp(0) = 1. Columns: policy = log ratio, old = 0.
RATIOS = [math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5), 0.0, math.log(1.5)]
ADVANTAGES = [2.0, 2.0, -2.0, -2.0, 3.0, 0.0]
OLD = [0.0] * 6


def test_importance_sampling_is_ratio_times_advantage() -> None:
    output, gradient = evaluate("importance_sampling", RATIOS, OLD, ADVANTAGES)
    # -(1.5*2 + 0.5*2 - 1.5*2 - 0.5*2 + 1*3 + 0) = -3
    assert output.loss.item() == pytest.approx(-3.0)
    assert gradient.tolist() == pytest.approx([-3.0, -1.0, 3.0, 1.0, -3.0, 0.0])


def test_ppo_clips_only_where_the_objective_would_profit() -> None:
    output, gradient = evaluate("ppo", RATIOS, OLD, ADVANTAGES)
    # A=2: min(3, 1.2*2)=2.4 and min(1, 0.8*2)=1; A=-2: min(-3, -2.4)=-3 and min(-1, -1.6)=-1.6; then 3 and 0
    assert output.loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6 + 3.0))
    assert gradient.tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0, -3.0, 0.0])
    assert output.metrics == {"clipped_tokens:sum": 2.0}


def test_dapo_without_dual_clip_is_ppo_with_a_wider_upper_bound() -> None:
    output, gradient = evaluate("dapo", RATIOS, OLD, ADVANTAGES)
    assert output.loss.item() == pytest.approx(-(1.28 * 2 + 1.0 - 3.0 - 1.6 + 3.0))
    assert gradient.tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0, -3.0, 0.0])


def test_dapo_dual_clip_caps_the_loss_of_bad_tokens_with_large_ratios() -> None:
    # A=-2, r=4, c=3: surrogate loss 8 is capped at 6 and carries no gradient; at r=2 it is 4, below the cap
    output, gradient = evaluate("dapo", [math.log(4.0), math.log(2.0)], [0.0, 0.0], [-2.0, -2.0], eps_clip_c=3.0)
    assert output.loss.item() == pytest.approx(6.0 + 4.0)
    assert gradient.tolist() == pytest.approx([0.0, 4.0])
    assert output.metrics == {"clipped_tokens:sum": 1.0}


def test_cispo_clips_the_weight_and_never_drops_the_gradient() -> None:
    output, gradient = evaluate("cispo", RATIOS, OLD, ADVANTAGES)
    # d loss / d l = -A clip(r, 0.8, 1.28); loss = sum of that times l
    expected = [-2 * 1.28, -2 * 0.8, 2 * 1.28, 2 * 0.8, -3.0, 0.0]
    assert gradient.tolist() == pytest.approx(expected)
    assert output.loss.item() == pytest.approx(sum(g * logp for g, logp in zip(expected, RATIOS, strict=True)))


def test_dro_adds_a_quadratic_pull_only_where_the_advantage_is_not_zero() -> None:
    output, gradient = evaluate("dro", [-1.0, -1.0], [-3.0, -3.0], [2.0, 0.0], beta=0.5)
    # -( -1*2 - 0.25 * 2^2 ) = 3; gradient -(2 - 0.5*2) = -1; the second token is masked
    assert output.loss.item() == pytest.approx(3.0)
    assert gradient.tolist() == pytest.approx([-1.0, 0.0])


def test_gspo_uses_one_ratio_for_the_sequence_over_its_loss_tokens() -> None:
    # mean of 0.3 and -0.1 over the two loss tokens = 0.1; the masked token's 9.0 must not enter
    ratio = math.exp(0.1)
    output, gradient = evaluate(
        "gspo", [0.3, 9.0, -0.1], [0.0] * 3, [2.0, 0.0, -1.0], clip_low_threshold=0.8, clip_high_threshold=1.2
    )
    assert output.loss.item() == pytest.approx(-ratio * 2 + ratio)
    assert gradient.tolist() == pytest.approx([-2 * ratio, 0.0, ratio])


def test_gspo_clips_all_tokens_of_a_sequence_together() -> None:
    output, gradient = evaluate("gspo", [0.5, 0.1], [0.0, 0.0], [1.0, 1.0])
    assert gradient.tolist() == [0.0, 0.0]
    assert output.loss.item() == pytest.approx(-2 * (1 + 4e-4))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_datum_without_loss_tokens_contributes_nothing(name: str) -> None:
    output, gradient = evaluate(name, [-1.0, -2.0], [-50.0, 0.0], [0.0, 0.0])
    assert output.loss.item() == 0.0
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name != "gspo"])  # whose unit is the sequence
def test_token_level_losses_are_additive_over_chunks(name: str) -> None:
    first = ([-0.2, -1.0], [-0.4, -0.9], [1.0, -0.5])
    second = ([-2.0, -0.3], [-1.9, -0.35], [-1.0, 0.25])
    separate = [evaluate(name, *datum) for datum in (first, second)]
    joined_output, joined_gradient = evaluate(name, *(a + b for a, b in zip(first, second, strict=True)))
    assert joined_output.loss.item() == pytest.approx(sum(output.loss.item() for output, _ in separate))
    assert torch.allclose(joined_gradient, torch.cat([gradient for _, gradient in separate]))


# Both sides of every bound, none on a kink.
GRADCHECK = {
    "importance_sampling": {},
    "ppo": {},
    "dro": {"beta": 0.3},
    "dapo": {"eps_clip_c": 2.0},
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradient_matches_finite_differences(name: str) -> None:
    kernel = KERNELS[name]
    config = kernel.check_config(GRADCHECK[name])
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(12, dtype=torch.float64, generator=generator)
    advantages = torch.randn(12, dtype=torch.float64, generator=generator)
    policy = (old + torch.randn(12, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: kernel.formula(LossInput(leaf, old_logprobs=old, advantages=advantages), config).loss, policy
    )


KNOBS = [
    ("importance_sampling", "ratio_log_cap", 0.1),
    ("ppo", "clip_low_threshold", 0.9),
    ("ppo", "clip_high_threshold", 1.1),
    ("ppo", "ratio_log_cap", 0.1),
    ("cispo", "clip_low_threshold", 0.9),
    ("cispo", "clip_high_threshold", 1.1),
    ("cispo", "ratio_log_cap", 0.1),
    ("dro", "beta", 0.5),
    ("dapo", "clip_low_threshold", 0.9),
    ("dapo", "clip_high_threshold", 1.1),
    ("dapo", "ratio_log_cap", 0.1),
    ("dapo", "eps_clip_c", 1.2),
    ("gspo", "clip_low_threshold", 0.7),
    ("gspo", "clip_high_threshold", 1.4),
    ("gspo", "seq_ratio_log_cap", 0.0),
]


@pytest.mark.parametrize(("name", "key", "value"), KNOBS)
def test_every_config_key_changes_the_loss(name: str, key: str, value: float) -> None:
    # Sequence mean of l - o: +0.17 with A > 0 mostly, and -0.17 with A < 0 mostly
    high = (RATIOS[:5], OLD[:5], [2.0, 2.0, -1.0, -1.0, 3.0])
    low = ([-ratio for ratio in RATIOS[:5]], OLD[:5], [-2.0, -2.0, 1.0, 1.0, -3.0])

    def losses(**config: float) -> list[float]:
        return [evaluate(name, *datum, **config)[0].loss.item() for datum in (high, low)]

    assert losses(**{key: value}) != losses()


def test_every_config_key_has_a_knob_test() -> None:
    assert {(name, key) for name, key, _ in KNOBS} == {
        (name, key) for name, kernel in KERNELS.items() for key in kernel.config_keys
    }


def test_unknown_config_keys_are_named_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match=r"epsilon: is not a config key of the loss ppo\. Allowed keys: clip_high"):
        KERNELS["ppo"].check_config({"epsilon": 0.2})


@pytest.mark.parametrize("value", [float("nan"), -1.0, "0.8", True, None])
def test_config_values_out_of_range_are_refused_with_their_value(value: object) -> None:
    with pytest.raises(ConfigError, match="clip_low_threshold: must be a number in range"):
        KERNELS["ppo"].check_config({"clip_low_threshold": value})


def test_crossed_clip_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2\.0 is above clip_high_threshold, 1\.2"):
        KERNELS["ppo"].check_config({"clip_low_threshold": 2.0})


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_missing_advantages_are_an_error(name: str) -> None:
    kernel = KERNELS[name]
    with pytest.raises(ShapeError, match="advantages is missing"):
        kernel.formula(LossInput(torch.zeros(2), old_logprobs=torch.zeros(2)), kernel.check_config({}))
