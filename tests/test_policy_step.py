"""policy_step on a real trainer: alignment, both execution paths, the KL term, and what stops a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fireworks.training.sdk import AdamParams, TrainerJobManager

from cookbook.client import ReconnectableClient
from cookbook.data.rollout_datums import completion_logprobs, forward_datums, trained_completions, with_advantages
from cookbook.errors import DataError, RequestRejected, SamplingError, ShapeError
from cookbook.policy_step import PolicyStepResult, policy_step
from cookbook.rollouts.records import Completion, PromptGroup
from tests.losses.test_policy_losses import POLICY_LOSSES, config
from tests.running_backend import MODEL

SGD = AdamParams(learning_rate=1.0, beta1=0.0, beta2=0.0, eps=1e3, weight_decay=0.0)
"""The update is the gradient over 1,000, as no gradient here comes near eps."""

LENGTHS = ((5, (4, 1, 7)), (9, (3, 6, 2)))
"""Two prompts and the lengths of their completions."""


@pytest.fixture
def client(manager: TrainerJobManager, trainer: str) -> Iterator[ReconnectableClient]:
    with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as client:
        yield client


def completion(
    tokens: Sequence[int], reward: float = 0.0, *, injected: Sequence[int] = (), **fields: Any
) -> Completion:
    logprobs = tuple(0.0 if place in injected else -1.0 for place in range(len(tokens)))
    mask = tuple(place not in injected for place in range(len(tokens)))
    known = {"text": "", "finish_reason": "stop", "version": "", "seed": 0, "reward": reward}
    per_token = {"rollout_logprobs": logprobs, "sampling_logprobs": logprobs}
    return Completion(tokens=tuple(tokens), is_sampled=mask, **{**per_token, **known, **fields})


def group(prompt: Sequence[int], *completions: Completion, row: int = 0) -> PromptGroup:
    return with_advantages(PromptGroup(row, row, tuple(prompt), completions), "group_std")


def policy_logprobs(client: ReconnectableClient, groups: Sequence[PromptGroup]) -> list[list[float]]:
    answer = client.forward(forward_datums(groups), "cross_entropy")
    return completion_logprobs(groups, [output["logprobs"].to_torch() for output in answer.loss_fn_outputs])


def with_logprobs(
    groups: Sequence[PromptGroup], rollout: Sequence[Sequence[float]], sampling: Sequence[Sequence[float]]
) -> list[PromptGroup]:
    lists = iter(zip(rollout, sampling, strict=True))

    def filled(completion: Completion) -> Completion:
        first, second = next(lists)
        return replace(completion, rollout_logprobs=tuple(first), sampling_logprobs=tuple(second))

    return [replace(group, completions=tuple(filled(c) for c in group.completions)) for group in groups]


def rollouts(client: ReconnectableClient, *, noise: float = 0.0, rewards: Sequence[float] = (1, 0, 0.3)) -> Any:
    """Groups as if sampled by weights that are `noise` nats a token away; one has injected tokens in its middle."""
    generator = np.random.default_rng(7)
    groups = []
    for row, (num_prompt, lengths) in enumerate(LENGTHS):
        completions = [
            completion(generator.integers(0, 250, length), reward, injected=(2, 3) if length == 7 else ())
            for length, reward in zip(lengths, rewards, strict=True)
        ]
        groups.append(group(generator.integers(0, 250, num_prompt), *completions, row=row))
    exact = policy_logprobs(client, groups)
    rollout = [[x + noise * float(generator.normal()) for x in values] for values in exact]
    sampling = [[x + noise * float(generator.normal()) for x in values] for values in rollout]
    return with_logprobs(groups, rollout, sampling)


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_a_completion_of_one_token_has_exactly_one_trained_position_at_the_end_of_its_prompt() -> None:
    groups = [group([10, 11, 12], completion([20], 1.0), completion([21], 0.0))]
    datum = forward_datums(groups)[0]
    assert datum.model_input.to_ints() == [10, 11, 12]
    assert datum.loss_fn_inputs["target_tokens"].to_numpy().tolist() == [11, 12, 20]
    assert datum.loss_fn_inputs["weights"].to_numpy().tolist() == [0.0, 0.0, 1.0]  # P - 1 = 2


def test_a_completion_is_trained_from_the_end_of_its_prompt_to_its_last_token_but_for_injected_ones() -> None:
    groups = [group([10, 11, 12], completion([20, 21, 22, 23], 1.0, injected=(1,)), completion([24]))]
    datum = forward_datums(groups)[0]
    assert datum.loss_fn_inputs["target_tokens"].to_numpy().tolist() == [11, 12, 20, 21, 22, 23]
    assert datum.loss_fn_inputs["weights"].to_numpy().tolist() == [0, 0, 1, 0, 1, 1]
    trained = trained_completions(groups)[0]
    assert trained.slice_of(torch.arange(6.0)).tolist() == [2, 3, 4, 5]


def test_a_prompt_of_one_token_is_enough() -> None:
    datum = forward_datums([group([10], completion([20], 1.0), completion([21]))])[0]
    assert datum.loss_fn_inputs["weights"].to_numpy().tolist() == [1.0]


@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_a_step_on_one_token_changes_its_probability(client: ReconnectableClient, kl_beta: float) -> None:
    groups = [group([10, 11, 12], completion([20], 1.0), completion([21], 0.0))]
    before = policy_logprobs(client, groups)
    groups = with_logprobs(groups, before, before)
    result = policy_step(client, groups, config(kl_beta=kl_beta), SGD, reference_logprobs=before)
    after = policy_logprobs(client, groups)
    assert after[0][0] > before[0][0] + 1e-4
    assert after[1][0] < before[1][0] - 1e-4
    assert (result.num_loss_tokens, result.num_tokens) == (2, 8)


def test_a_completion_of_injected_tokens_only_is_skipped_and_counted(client: ReconnectableClient) -> None:
    groups = rollouts(client)
    only = [groups[0], replace(groups[1], completions=(*groups[1].completions, completion([1, 2], injected=(0, 1))))]
    counted = policy_step(client, only, config(kl_beta=0.1), SGD, reference_logprobs=policy_logprobs(client, only))
    assert counted.metrics["train/skipped_completions"] == 1
    assert counted.metrics["train/trained_tokens"] == sum(c.num_sampled for g in groups for c in g.completions)


# -- both paths --------------------------------------------------------------------------------------------------------

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in POLICY_LOSSES],
    *[(name, {"anchor_logp": "old_policy"}) for name in ("grpo", "dro", "gspo")],
    ("grpo", {"eps_clip": 0.05, "eps_clip_high": 0.6, "ratio_log_cap": 0.3, "tis": {"level": "sequence"}}),
    ("grpo", {"tis": {"cap": 0.9}, "advantage": "group_mean"}),
    ("dapo", {"dapo": {"eps_clip_c": 1.1, "eps_clip": 0.1}}),
    ("gspo", {"gspo": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01}}),
    ("cispo", {"cispo": {"eps_low": 0.9, "eps_high": 0.1}}),
    ("dro", {"dro": {"beta": 2.0}}),
]


def step_on_a_fresh_model(
    manager: TrainerJobManager, job: str, *, is_builtin: bool, policy_loss: str, **fields: Any
) -> tuple[PolicyStepResult, list[list[float]]]:
    """One step and the logprobs after it. Custom path: by a KL term whose gradient is 0, as reference = policy."""
    with ReconnectableClient(manager, job, MODEL, 4, seed=1) as client:
        groups = rollouts(client, noise=0.4)
        exact = policy_logprobs(client, groups)
        settings = config(policy_loss, **{"kl_beta": 0.0 if is_builtin else 1.0, **fields})
        result = policy_step(client, groups, settings, SGD, reference_logprobs=exact)
        assert result.metrics["policy/builtin"] == float(is_builtin)
        assert result.metrics["kl/mean"] == 0.0
        after = policy_logprobs(client, groups)
        assert max(abs(x - y) for a, b in zip(after, exact, strict=True) for x, y in zip(a, b, strict=True)) > 1e-4
        return result, after


@pytest.mark.parametrize(("policy_loss", "fields"), SETTINGS)
def test_both_paths_accumulate_the_same_gradient(
    manager: TrainerJobManager, trainer: str, policy_loss: str, fields: dict[str, Any]
) -> None:
    fields = {"grad_accumulation_normalization": None, **fields}
    (builtin, after), (custom, after_custom) = (
        step_on_a_fresh_model(manager, trainer, is_builtin=is_builtin, policy_loss=policy_loss, **fields)
        for is_builtin in (True, False)
    )
    assert custom.metrics["train/grad_norm"] == pytest.approx(builtin.metrics["train/grad_norm"], rel=1e-4)
    assert custom.loss_sum == pytest.approx(builtin.loss_sum, rel=1e-5)
    for ours, theirs in zip(after, after_custom, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    shared = set(builtin.metrics) - {"policy/builtin", "train/loss_tokens", "train/grad_norm", "kl/loss_mean"}
    for name in shared:
        assert custom.metrics[name] == pytest.approx(builtin.metrics[name], abs=1e-5), name


@pytest.mark.parametrize("is_builtin", [True, False])
def test_each_path_reports_the_count_that_it_is_normalized_by(
    manager: TrainerJobManager, trainer: str, is_builtin: bool
) -> None:
    raw, mean = (
        step_on_a_fresh_model(
            manager, trainer, is_builtin=is_builtin, policy_loss="grpo", grad_accumulation_normalization=how
        )[0]
        for how in (None, "num_loss_tokens")
    )
    assert mean.metrics["train/grad_norm"] * mean.num_loss_tokens == pytest.approx(raw.metrics["train/grad_norm"])
    clipped = round(mean.metrics["policy/clip_share"] * mean.metrics["train/trained_tokens"])
    assert clipped > 0
    # A kernel counts the tokens with an advantage; a loss from here those with a gradient, and clipped ones have none.
    assert mean.num_loss_tokens == mean.metrics["train/trained_tokens"] - (0 if is_builtin else clipped)


def test_the_trainer_reports_the_loss_that_is_computed_here(client: ReconnectableClient) -> None:
    sent = []
    train_step = client.train_step
    client.train_step = lambda *args, **options: sent.append(train_step(*args, **options)) or sent[-1]  # type: ignore[method-assign]
    result = policy_step(client, rollouts(client, noise=0.4), config(), SGD)
    assert result.loss_sum == pytest.approx(sent[0].loss_sum, rel=1e-5)
    assert sent[0].step == client.step == 1


# -- anchor, temperature, metrics --------------------------------------------------------------------------------------


def test_the_old_policy_as_anchor_makes_every_ratio_one(client: ReconnectableClient) -> None:
    groups = rollouts(client, noise=0.4)
    rollout = policy_step(client, groups, config(anchor_logp="rollout"), SGD)
    assert rollout.metrics["policy/clip_share"] > 0
    for kl_beta in (0.0, 0.1):
        reference = policy_logprobs(client, groups)
        settings = config(anchor_logp="old_policy", kl_beta=kl_beta)
        old = policy_step(client, groups, settings, SGD, reference_logprobs=reference)
        assert old.metrics["policy/clip_share"] == 0


def test_at_another_temperature_only_the_correction_sees_the_distribution_that_was_drawn_from(
    client: ReconnectableClient,
) -> None:
    exact = rollouts(client)
    rollout = [c.rollout_logprobs for g in exact for c in g.completions]
    hotter = with_logprobs(exact, rollout, [[x - math.log(2) for x in values] for values in rollout])
    result = policy_step(client, hotter, config(), SGD)
    assert result.metrics["tis/weight_mean"] == pytest.approx(2.0)
    assert result.metrics["sampler/logprob_gap_max"] == pytest.approx(0.0, abs=1e-5)
    assert result.metrics["policy/clip_share"] == 0


def test_metrics_of_a_known_gap(client: ReconnectableClient) -> None:
    exact = rollouts(client)
    rollout = [c.rollout_logprobs for g in exact for c in g.completions]
    off = [[x - 0.5 for x in values] for values in rollout]
    groups = with_logprobs(exact, off, [[x - 2.0 for x in values] for values in off])
    reference = [[x - 0.25 for x in values] for values in rollout]
    metrics = policy_step(client, groups, config(kl_estimator="k2"), SGD, reference_logprobs=reference).metrics
    for name in ("p50", "p99", "max"):
        assert metrics[f"sampler/logprob_gap_{name}"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["sampler/ratio_outside_share"] == 1.0
    assert metrics["sampler/k3"] == pytest.approx(math.exp(0.5) - 1.5, abs=1e-5)
    assert metrics["tis/weight_mean"] == pytest.approx(5.0)  # exp(2) is above the cap
    assert metrics["tis/truncated_share"] == 1.0
    assert metrics["kl/mean"] == pytest.approx(0.25**2 / 2, abs=1e-5)
    assert metrics["kl/loss_mean"] == 0.0
    exact_policy = [x for c, m in masks(exact, rollout) for x, is_trained in zip(c, m, strict=True) if is_trained]
    assert metrics["policy/logprob"] == pytest.approx(sum(exact_policy) / len(exact_policy), abs=1e-5)


def masks(groups: Sequence[PromptGroup], values: Sequence[Sequence[float]]) -> Iterator[Any]:
    return zip(values, [c.is_sampled for g in groups for c in g.completions], strict=True)


# -- the KL term -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k3", "k2"])
def test_kl_alone_moves_the_weights_to_the_reference_when_all_rewards_are_equal(
    client: ReconnectableClient, estimator: str
) -> None:
    equal = rollouts(client, rewards=(1, 1, 1))
    assert {c.advantage for g in equal for c in g.completions} == {0.0}
    reference = policy_logprobs(client, equal)
    client.train_step(forward_datums(equal), "cross_entropy", AdamParams(learning_rate=0.02))  # away from it
    start = policy_logprobs(client, equal)
    settings = config(kl_beta=1.0, kl_estimator=estimator)
    kls = [
        policy_step(client, equal, settings, AdamParams(learning_rate=1e-3), reference_logprobs=reference).metrics[
            "kl/mean"
        ]
        for _ in range(4)
    ]
    assert kls[-1] < 0.9 * kls[0]
    assert policy_logprobs(client, equal) != start


def test_a_larger_kl_beta_pulls_harder(manager: TrainerJobManager, trainer: str) -> None:
    norms = []
    for kl_beta in (0.01, 0.5):
        with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as client:
            equal = rollouts(client, rewards=(1, 1, 1))
            reference = [[x + 0.3 for x in values] for values in policy_logprobs(client, equal)]
            result = policy_step(client, equal, config(kl_beta=kl_beta), SGD, reference_logprobs=reference)
            norms.append(result.metrics["train/grad_norm"])
    assert norms[1] == pytest.approx(50 * norms[0], rel=1e-3)


# -- what stops a step before the weights change -----------------------------------------------------------------------


def assert_refused(
    client: ReconnectableClient, groups: Sequence[PromptGroup], error: type[Exception], match: str, **options: Any
) -> None:
    """The step is refused, no weight changes, and the next step trains as if nothing had been."""
    kl_beta = options.pop("kl_beta", 0.0)
    good = rollouts(client)
    before = policy_logprobs(client, good)
    with pytest.raises(error, match=match):
        policy_step(client, groups, config(kl_beta=kl_beta), SGD, **options)
    assert client.step == 0
    assert policy_logprobs(client, good) == before
    result = policy_step(client, good, config(), SGD)
    assert result.num_loss_tokens == result.metrics["train/trained_tokens"]


def replaced(groups: Sequence[PromptGroup], **fields: Any) -> list[PromptGroup]:
    """The second group's first completion with other fields."""
    first, second = groups
    completions = (replace(second.completions[0], **fields), *second.completions[1:])
    return [first, replace(second, completions=completions)]


def test_a_loss_that_is_not_finite_stops_the_custom_path(client: ReconnectableClient) -> None:
    groups = rollouts(client)
    reference = policy_logprobs(client, groups)
    reference[4] = [2000.0] * len(reference[4])
    options = {"kl_beta": 0.1, "reference_logprobs": reference}
    assert_refused(client, groups, RequestRejected, "completion 1 of row 1 has a loss of inf", **options)


def test_a_gradient_beyond_float32_stops_the_custom_path(client: ReconnectableClient) -> None:
    groups = rollouts(client)
    reference = policy_logprobs(client, groups)
    reference[4] = [100.0] * len(reference[4])
    options = {"kl_beta": 0.1, "reference_logprobs": reference}
    assert_refused(client, groups, RequestRejected, "completion 1 of row 1 has a gradient of -inf", **options)


def test_a_loss_that_is_not_finite_stops_the_builtin_path(client: ReconnectableClient) -> None:
    groups = replaced(rollouts(client), advantage=-3e38)  # three tokens of it are more than float32 holds
    assert_refused(client, groups, RequestRejected, "nothing was added to the gradients")


def test_an_advantage_beyond_float32_is_not_sent(client: ReconnectableClient) -> None:
    groups = replaced(rollouts(client), advantage=1e39)
    assert_refused(client, groups, ShapeError, "completion 0 of row 1 has advantages beyond the range of float32")


@pytest.mark.parametrize("missing", [math.nan, None, -math.inf])
def test_a_missing_logprob_names_its_row(client: ReconnectableClient, missing: Any) -> None:
    groups = replaced(rollouts(client), rollout_logprobs=(-1.0, missing, -1.0))
    match = r"completion 0 of row 1: rollout_logprobs\[1\] is .*: 1 of 3 sampled tokens lack"
    assert_refused(client, groups, SamplingError, match)


def test_a_missing_logprob_of_an_injected_token_does_not_matter(client: ReconnectableClient) -> None:
    clean = rollouts(client)
    injected = next(c for g in clean for c in g.completions if not all(c.is_sampled))
    nan = tuple(x if ok else math.nan for x, ok in zip(injected.rollout_logprobs, injected.is_sampled, strict=True))
    dirty = replace(injected, rollout_logprobs=nan, sampling_logprobs=nan)
    first = replace(clean[0], completions=tuple(dirty if c is injected else c for c in clean[0].completions))
    assert policy_step(client, [first, clean[1]], config(), SGD).num_loss_tokens > 0


def test_groups_that_cannot_be_trained_name_their_row(client: ReconnectableClient) -> None:
    groups = rollouts(client)
    unset = replace(
        groups[1], completions=tuple(replace(completion, advantage=0.0) for completion in groups[1].completions)
    )
    assert_refused(client, [groups[0], unset], DataError, "row 1 have rewards .* and no advantages")
    with pytest.raises(DataError, match="row 0 has an empty prompt"):
        policy_step(client, [replace(groups[0], prompt_tokens=())], config(), SGD)
    with pytest.raises(DataError, match="row 1 has advantages that are not finite"):
        policy_step(client, replaced(groups, advantage=math.nan), config(), SGD)
    nothing = group([1, 2], completion([3], injected=(0,)), completion([4], injected=(0,)), row=5)
    with pytest.raises(DataError, match=r"none of the 2 completions of the step has a sampled token \(rows \[5\]\)"):
        policy_step(client, [nothing], config(), SGD)


def test_reference_logprobs_that_do_not_fit_are_refused(client: ReconnectableClient) -> None:
    groups = rollouts(client)
    good = policy_logprobs(client, groups)
    options: dict[str, Any] = {"kl_beta": 0.1}
    assert_refused(client, groups, ShapeError, "kl_beta is 0.1, but there are no reference_logprobs", **options)
    for reference, match in (
        (good[:-1], "there are 6 completions and 5 lists"),
        ([*good[:-1], [-1.0]], "completion 2 of row 1 has 2 tokens and 1 reference_logprobs"),
        ([*good[:-1], [-1.0, math.nan]], "completion 2 of row 1 has reference_logprobs that are not finite"),
    ):
        with pytest.raises(ShapeError, match=match):
            policy_step(client, groups, config(kl_beta=0.1), SGD, reference_logprobs=reference)


def test_answers_that_do_not_fit_their_datums_are_refused() -> None:
    groups = [group([10, 11, 12], completion([20], 1.0), completion([21]))]
    with pytest.raises(ShapeError, match="there are 2 datums and 1 answers"):
        completion_logprobs(groups, [torch.zeros(3)])
    with pytest.raises(ShapeError, match=r"completion 0 of row 0 has 3 target tokens and logprobs of shape \(2,\)"):
        completion_logprobs(groups, [torch.zeros(2), torch.zeros(3)])
