"""Policy losses from a config to d loss / d logprob: hand-worked numbers, closed forms, and every coefficient live."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cookbook.config import CISPOConfig, DAPOConfig, DROConfig, GSPOConfig, RLConfig, TISConfig
from cookbook.errors import ConfigError, ShapeError
from cookbook.losses.correction import gap_metrics, tis_weights
from cookbook.losses.kl import kl_terms
from cookbook.losses.policy_losses import CompletionTokens, PolicyLossOutput, PolicyObjective, Tis, policy_loss
from cookbook.policy_step import policy_objective

POLICY_LOSSES = ("grpo", "importance_sampling", "dapo", "dro", "gspo", "reinforce", "cispo")


def config(policy_loss: str = "grpo", **fields: Any) -> RLConfig:
    fixed = {"log_path": "unused", "base_model": "m", "dataset": "d.jsonl", "reward": "exact", "lora_rank": 4}
    return RLConfig.model_validate({**fixed, "policy_loss": policy_loss, "kl_beta": 0.0, **fields})


@dataclass(frozen=True)
class Example:
    """One completion: policy l, anchor o, sampled b, reference r, mask m, advantage A."""

    policy: list[float]
    old: list[float]
    sampling: list[float]
    reference: list[float]
    mask: list[bool]
    advantage: float

    def tokens(self, policy: Tensor, *, with_reference: bool = True) -> CompletionTokens:
        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        reference = tensor(self.reference) if with_reference else None
        mask = torch.tensor(self.mask)
        return CompletionTokens(policy, tensor(self.old), tensor(self.sampling), mask, self.advantage, reference)


def evaluate(objective: PolicyObjective, example: Example, **options: bool) -> tuple[PolicyLossOutput, list[float]]:
    leaf = torch.tensor(example.policy, dtype=torch.float64, requires_grad=True)
    output = policy_loss(objective, example.tokens(leaf, **options))
    output.loss.backward()
    assert leaf.grad is not None
    return output, leaf.grad.tolist()


# Ratios 1.5, 0.5, 1.1, 0.9, 1 after o; token 3 is injected and holds numbers that must not enter anywhere.
LOG_RATIOS = [math.log(1.5), math.log(0.5), math.log(1.1), 5.0, math.log(0.9), 0.0]
OLD = [-1.0, -2.0, -0.5, -9.0, -3.0, -0.1]
GAPS = [0.1, -0.3, 2.0, 30.0, 0.0, -0.05]  # o - b: exp(2) = 7.4 is above the cap of 5
MASK = [True, True, True, False, True, True]
UP = Example(
    policy=[o + d for o, d in zip(OLD, LOG_RATIOS, strict=True)],
    old=OLD,
    sampling=[o - g for o, g in zip(OLD, GAPS, strict=True)],
    reference=[-1.2, -2.2, -0.1, 50.0, -3.3, -0.4],
    mask=MASK,
    advantage=1.25,
)
DOWN = replace(UP, advantage=-0.75)
LOW = replace(UP, policy=[o - d for o, d in zip(OLD, LOG_RATIOS, strict=True)])
EXAMPLES = (UP, DOWN, LOW, replace(LOW, advantage=-0.75))


# -- closed-form gradients, written down a second time -----------------------------------------------------------------


def weights(settings: RLConfig, example: Example) -> list[float]:
    """w: min(exp(o - b), cap), or of the mean over the mask."""
    gaps = [o - b for o, b in zip(example.old, example.sampling, strict=True)]
    if settings.tis.level == "sequence":
        gaps = [sum(g for g, m in zip(gaps, example.mask, strict=True) if m) / sum(example.mask)] * len(gaps)
    return [min(math.exp(max(-20.0, min(20.0, gap))), settings.tis.cap) for gap in gaps]


def closed_form(settings: RLConfig, example: Example) -> list[float]:
    """g_t = d loss / d l_t of every policy loss, from the formulas on paper."""
    A = example.advantage
    active = [d for d, m in zip(LOG_RATIOS, example.mask, strict=True) if m]
    mean = sum(active) / len(active) * (1 if example.policy == UP.policy else -1)
    gradient = []
    for l, o, b, w, m in zip(  # noqa: E741  # the letters of the formulas
        example.policy, example.old, example.sampling, weights(settings, example), example.mask, strict=True
    ):
        rho = math.exp(l - o)
        match settings.policy_loss:
            case "grpo" | "dapo" | "gspo":
                low, high, cap = 0.8, 1.2, math.inf
                if settings.policy_loss == "dapo":
                    high, cap = 1.28, settings.dapo.eps_clip_c or math.inf
                ratio = math.exp(mean) if settings.policy_loss == "gspo" else rho
                is_clipped = (A > 0 and ratio > high) or (A < 0 and (ratio < low or ratio > cap))
                g = 0.0 if is_clipped else -A * ratio * w
            case "importance_sampling":
                g = -A * rho * w
            case "cispo":
                g = -A * max(0.8, min(1.28, rho)) * w
            case "dro":
                g = -(A * w - 0.05 * (l - o))
            case "reinforce":
                g = -A * math.exp(l - b)
        gradient.append(g if m else 0.0)
    return gradient


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_gradient_is_the_closed_form(name: str, level: str, example: Example) -> None:
    settings = config(name, tis={"level": level})
    objective = policy_objective(settings)
    used = replace(example, old=example.sampling) if objective.anchor == "sampling" else example
    assert evaluate(objective, used)[1] == pytest.approx(closed_form(settings, example), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("example", EXAMPLES)
def test_dual_clip_gradient_is_the_closed_form(example: Example) -> None:
    settings = config("dapo", dapo={"eps_clip_c": 1.3})
    assert evaluate(policy_objective(settings), example)[1] == pytest.approx(closed_form(settings, example))


def test_grpo_by_hand() -> None:
    example = Example([0.5, -0.5, 0.0], [0.0, 0.0, -9.0], [0.0, 0.0, 7.0], [0.0] * 3, [True, True, False], 2.0)
    output, gradient = evaluate(policy_objective(config()), example)
    # r = 1.6487 is clipped to 1.2, r = 0.60653 is not; the third token is injected
    assert output.loss.item() == pytest.approx(-(1.2 + math.exp(-0.5)) * 2)
    assert gradient == pytest.approx([0.0, -2 * math.exp(-0.5), 0.0])
    assert output.sums["clipped"] == 1.0
    assert output.sums["tis_weight"] == 2.0


@pytest.mark.parametrize("estimator", ["k3", "k2"])
def test_kl_adds_its_closed_form_on_every_trained_token(estimator: str) -> None:
    with_kl = policy_objective(config(kl_beta=0.3, kl_estimator=estimator))
    without = policy_objective(config())
    pairs = zip(evaluate(with_kl, UP)[1], evaluate(without, UP)[1], strict=True)
    added = [a - b for a, b in pairs]
    gaps = [r - l for r, l in zip(UP.reference, UP.policy, strict=True)]  # noqa: E741
    expected = [1 - math.exp(gap) if estimator == "k3" else -gap for gap in gaps]
    assert added == pytest.approx([0.3 * g if m else 0.0 for g, m in zip(expected, MASK, strict=True)])


@pytest.mark.parametrize("estimator", ["k3", "k2"])
def test_kl_alone_has_a_gradient_when_all_rewards_are_equal(estimator: str) -> None:
    objective = policy_objective(config(kl_beta=0.3, kl_estimator=estimator))
    _, gradient = evaluate(objective, replace(UP, advantage=0.0))
    signs = [math.copysign(1, l - r) for l, r in zip(UP.policy, UP.reference, strict=True)]  # noqa: E741
    assert [g * s > 0 for g, s in zip(gradient, signs, strict=True)] == MASK  # a descent step moves l towards r


def test_kl_is_measured_when_it_is_off() -> None:
    output, gradient = evaluate(policy_objective(config(kl_estimator="k2")), UP)
    pairs = zip(UP.policy, UP.reference, MASK, strict=True)
    assert output.sums["kl"] == pytest.approx(sum((l - r) ** 2 / 2 for l, r, m in pairs if m))  # noqa: E741
    assert gradient == evaluate(policy_objective(config()), UP, with_reference=False)[1]


def test_kl_terms_by_hand() -> None:
    policy, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(2)])
    assert kl_terms(policy, reference, "k3").tolist() == pytest.approx([0.0, 2 - math.log(2) - 1])
    assert kl_terms(policy, reference, "k2").tolist() == pytest.approx([0.0, math.log(2) ** 2 / 2])


def test_expected_k3_gradient_is_that_of_forward_kl_and_k2_of_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(-1)
    for estimator in ("k3", "k2"):
        policy = logits.log_softmax(-1)
        expected = (
            policy.detach().exp() * kl_terms(policy, reference, estimator)
        ).sum()  # samples come from the policy
        (ours,) = torch.autograd.grad(expected, logits)
        policy = logits.log_softmax(-1)
        forward = (reference.exp() * (reference - policy)).sum()
        reverse = (policy.exp() * (policy - reference)).sum()
        (theirs,) = torch.autograd.grad(forward if estimator == "k3" else reverse, logits)
        assert torch.allclose(ours, theirs)


SMOOTH = [("importance_sampling", {}), ("dro", {}), ("reinforce", {}), ("grpo", {"kl_beta": 0.5})]


@pytest.mark.parametrize("estimator", ["k3", "k2"])
@pytest.mark.parametrize(("name", "fields"), SMOOTH)
def test_gradient_matches_finite_differences(name: str, fields: dict[str, float], estimator: str) -> None:
    objective = policy_objective(config(name, **{"kl_beta": 0.2, "kl_estimator": estimator, **fields}))
    for example in EXAMPLES:
        leaf = torch.tensor(example.policy, dtype=torch.float64, requires_grad=True)
        loss = lambda policy, example=example: policy_loss(objective, example.tokens(policy)).loss  # noqa: E731
        assert torch.autograd.gradcheck(loss, leaf)


# -- the correction ----------------------------------------------------------------------------------------------------


def test_tis_weights_by_hand() -> None:
    old, sampling = torch.tensor([0.0, math.log(8.0), -9.0]), torch.zeros(3)
    mask = torch.tensor([True, True, False])
    token, is_cut = tis_weights(old, sampling, mask, cap=5.0, level="token")
    assert token.tolist() == pytest.approx([1.0, 5.0, 0.0])
    assert is_cut.tolist() == [False, True, False]
    sequence, is_cut = tis_weights(old, sampling, mask, cap=5.0, level="sequence")
    assert sequence.tolist() == pytest.approx([math.sqrt(8.0)] * 2 + [0.0])  # geometric mean of 1 and 8
    assert not is_cut.any()


def test_tis_without_a_trained_token_is_refused() -> None:
    with pytest.raises(ShapeError, match="without a trained token"):
        tis_weights(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.bool), cap=5.0, level="token")


def test_gap_metrics_by_hand() -> None:
    metrics = gap_metrics(torch.tensor([-1.0, -1.0, -1.0, -2.0]), torch.tensor([-1.0, -1.0, -1.05, -1.0]))
    assert metrics["sampler/logprob_gap_p50"] == pytest.approx(0.025)
    assert metrics["sampler/logprob_gap_max"] == pytest.approx(1.0)
    assert metrics["sampler/ratio_outside_share"] == 0.25
    assert metrics["sampler/k3"] == pytest.approx((math.exp(0.05) - 1.05 + math.exp(-1.0)) / 4, rel=1e-4)


# -- from the config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "kernel"),
    [
        ("grpo", {}, "ppo"),
        ("importance_sampling", {}, "importance_sampling"),
        ("dapo", {}, "ppo"),
        ("dapo", {"dapo": {"eps_clip_c": 3.0}}, "dapo"),
        ("dro", {}, "dro"),
        ("gspo", {}, "gspo"),
        ("cispo", {}, "cispo"),
        ("reinforce", {}, "importance_sampling"),
    ],
)
def test_each_loss_has_its_kernel(name: str, fields: dict[str, Any], kernel: str) -> None:
    objective = policy_objective(config(name, **fields))
    assert (objective.kernel, objective.is_builtin) == (kernel, True)
    assert not policy_objective(config(name, kl_beta=0.1, **fields)).is_builtin


def test_clip_bounds_on_the_wire_are_ratios() -> None:
    keys = policy_objective(config(eps_clip=0.1, eps_clip_high=0.3)).kernel_config
    assert keys == pytest.approx({"clip_low_threshold": 0.9, "clip_high_threshold": 1.3, "ratio_log_cap": 20.0})
    assert policy_objective(config(eps_clip=0.1)).kernel_config["clip_high_threshold"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("anchor_logp", "interval", "expected"),
    [("auto", 1, "rollout"), ("auto", 2, "old_policy"), ("auto", 0, "old_policy")]
    + [("rollout", 4, "rollout"), ("old_policy", 1, "old_policy")],
)
def test_the_anchor_is_the_rollout_only_where_one_update_follows_one_sync(
    anchor_logp: str, interval: int, expected: str
) -> None:
    settings = config(anchor_logp=anchor_logp, weight_sync={"weight_sync_interval": interval})
    assert policy_objective(settings).anchor == expected
    assert policy_objective(settings.model_copy(update={"policy_loss": "reinforce"})).anchor == "sampling"


KNOBS = [
    *[("grpo", key, value) for key, value in (("eps_clip", 0.05), ("eps_clip_high", 0.6), ("ratio_log_cap", 0.01))],
    ("importance_sampling", "ratio_log_cap", 0.01),
    ("reinforce", "ratio_log_cap", 0.01),
    *[(name, "tis.cap", 0.5) for name in POLICY_LOSSES if name != "reinforce"],
    *[(name, "tis.level", "sequence") for name in POLICY_LOSSES if name != "reinforce"],
    *[(name, "kl_beta", 0.1) for name in POLICY_LOSSES],
    ("dapo", "dapo.eps_clip", 0.05),
    ("dapo", "dapo.eps_clip_high", 0.6),
    ("dapo", "dapo.eps_clip_c", 1.05),
    ("dapo", "dapo.ratio_log_cap", 0.01),
    ("gspo", "gspo.clip_ratio_low", 0.001),
    ("gspo", "gspo.clip_ratio_high", 0.001),
    ("gspo", "gspo.seq_ratio_log_cap", 0.01),
    ("cispo", "cispo.eps_low", 0.05),
    ("cispo", "cispo.eps_high", 0.6),
    ("cispo", "cispo.ratio_log_cap", 0.01),
    ("dro", "dro.beta", 0.5),
]


@pytest.mark.parametrize(("name", "field", "value"), KNOBS)
def test_every_coefficient_changes_the_update(name: str, field: str, value: float | str) -> None:
    block, _, key = field.rpartition(".")
    changed = {block: {key: value}} if block else {key: value}

    # A second look for gspo, whose mean ratio of these examples is within the bounds otherwise.
    def gradients(**fields: Any) -> list[list[float]]:
        objective = policy_objective(config(name, **fields))
        anchored = [replace(e, old=e.sampling) if objective.anchor == "sampling" else e for e in EXAMPLES]
        return [evaluate(objective, example)[1] for example in anchored]

    assert gradients(**changed) != gradients()


def test_kl_estimator_changes_the_update() -> None:
    k3, k2 = (policy_objective(config(kl_beta=0.1, kl_estimator=name)) for name in ("k3", "k2"))
    assert evaluate(k3, UP)[1] != evaluate(k2, UP)[1]


def test_every_field_of_the_loss_blocks_has_a_knob_test() -> None:
    blocks = {"tis": TISConfig, "dapo": DAPOConfig, "gspo": GSPOConfig, "cispo": CISPOConfig, "dro": DROConfig}
    fields = {f"{block}.{key}" for block, model in blocks.items() for key in model.model_fields}
    assert fields == {field for _, field, _ in KNOBS if "." in field}


# -- what cannot be evaluated ------------------------------------------------------------------------------------------


def test_a_kl_term_without_reference_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"kl_beta is 0\.3, but there are no reference_logprobs"):
        evaluate(policy_objective(config(kl_beta=0.3)), UP, with_reference=False)


def test_a_reference_of_another_length_is_refused() -> None:
    with pytest.raises(ShapeError, match="reference_logprobs has 2 numbers for a completion of 6 tokens"):
        evaluate(policy_objective(config(kl_beta=0.3)), replace(UP, reference=[0.0, 0.0]))


def test_an_objective_with_an_unknown_kernel_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon: is not a config key of the loss ppo"):
        PolicyObjective("grpo", "ppo", {"epsilon": 0.2}, "rollout", Tis(5.0, "token"))
