"""DPO and ORPO of one pair: hand-worked numbers, closed forms against autograd, ties, clamps, and TRL's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cookbook.config import DPOConfig, ORPOConfig
from cookbook.errors import ShapeError
from cookbook.losses.preference import DPO, ORPO, PairLoss, PairReference, PreferenceObjective, objective_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_preference.json").read_text())
CHOSEN, REJECTED = [-0.3, -2.0, -0.01], [-1.5, -0.2, -4.0, -0.7]
REFERENCE = PairReference(-3.1, -5.0)
OBJECTIVES = (DPO(0.1), DPO(2.5), ORPO(1.0), ORPO(0.2), ORPO(0.0))


def evaluate(
    objective: PreferenceObjective,
    chosen: list[float] = CHOSEN,
    rejected: list[float] = REJECTED,
    reference: PairReference | None = REFERENCE,
) -> PairLoss:
    return objective.evaluate(
        torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64), reference
    )


def plain_loss(objective: PreferenceObjective, chosen: Tensor, rejected: Tensor, reference: PairReference) -> Tensor:
    """The same formula once more, for autograd, from the papers and without any care for rounding."""
    if isinstance(objective, DPO):
        margin = (chosen.sum() - reference.chosen) - (rejected.sum() - reference.rejected)
        return -logsigmoid(objective.beta * margin)
    assert isinstance(objective, ORPO)
    odds = [p / (1 - p) for p in (chosen.mean().exp(), rejected.mean().exp())]
    return -chosen.mean() - objective.orpo_lambda * logsigmoid(torch.log(odds[0] / odds[1]))


def config(cls: type[DPOConfig] | type[ORPOConfig], **fields: Any) -> Any:
    return cls.model_validate({"log_path": "unused", "base_model": "m", "dataset": "d.jsonl", **fields})


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    # chosen: -3 - -3.5 = 0.5; rejected: -4 - -3 = -1; D = 1.5, and with beta 2 the sigmoid's argument is 3
    pair = evaluate(DPO(2.0), [-1.0, -2.0], [-4.0], PairReference(-3.5, -3.0))
    assert pair.loss == pytest.approx(0.0485873516)  # log(1 + e^-3)
    assert pair.chosen_gradient.tolist() == pytest.approx([-0.0948517464] * 2)  # -2 / (1 + e^3)
    assert pair.rejected_gradient.tolist() == pytest.approx([0.0948517464])
    assert pair.metrics == pytest.approx(
        {
            "preference/margin": 1.5,
            "preference/accuracy": 1.0,
            "preference/chosen_reward": 1.0,
            "preference/rejected_reward": -2.0,
            "preference/chosen_logprob": -1.5,
            "preference/rejected_logprob": -4.0,
            "preference/chosen_tokens": 2.0,
            "preference/rejected_tokens": 1.0,
        }
    )


def test_orpo_by_hand() -> None:
    # mean probabilities 0.8 and 0.2: odds 4 and 1/4, odds ratio 16; -log sigmoid(log 16) = log(17/16)
    pair = evaluate(ORPO(2.0), [math.log(0.8)] * 2, [math.log(0.4), math.log(0.1)], None)
    nll, odds_ratio_loss = -math.log(0.8), math.log(17 / 16)
    assert pair.loss == pytest.approx(nll + 2 * odds_ratio_loss)
    assert pair.chosen_gradient.tolist() == pytest.approx([-(1 + 2 / 17 / 0.2) / 2] * 2)
    assert pair.rejected_gradient.tolist() == pytest.approx([2 / 17 / 0.8 / 2] * 2)
    assert pair.metrics == pytest.approx(
        {
            "preference/margin": math.log(16),
            "preference/accuracy": 1.0,
            "preference/chosen_reward": 2 * math.log(0.8),
            "preference/rejected_reward": 2 * math.log(0.2),
            "preference/chosen_logprob": math.log(0.8),
            "preference/rejected_logprob": math.log(0.2),
            "preference/chosen_tokens": 2.0,
            "preference/rejected_tokens": 2.0,
            "orpo/nll": nll,
            "orpo/odds_ratio_loss": odds_ratio_loss,
        }
    )


def test_the_dpo_loss_is_log_two_where_the_policy_equals_the_reference() -> None:
    pair = evaluate(DPO(0.3), reference=PairReference(math.fsum(CHOSEN), math.fsum(REJECTED)))
    assert pair.loss == pytest.approx(math.log(2))
    assert pair.metrics["preference/margin"] == 0


def test_dpo_sums_over_tokens_and_orpo_takes_their_mean() -> None:
    twice = PairReference(2 * REFERENCE.chosen, REFERENCE.rejected)
    once, doubled = evaluate(DPO(1.0)), evaluate(DPO(1.0), CHOSEN * 2, reference=twice)
    assert doubled.metrics["preference/chosen_reward"] == pytest.approx(2 * once.metrics["preference/chosen_reward"])
    assert evaluate(ORPO(1.0), CHOSEN * 2, REJECTED * 3).loss == pytest.approx(evaluate(ORPO(1.0)).loss)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_tie_counts_half(objective: PreferenceObjective) -> None:
    tie = evaluate(objective, CHOSEN, CHOSEN, PairReference(-2.0, -2.0)).metrics
    assert (tie["preference/margin"], tie["preference/accuracy"]) == (0.0, 0.5)
    lost = evaluate(objective, REJECTED, CHOSEN, PairReference(-2.0, -2.0)).metrics
    assert (lost["preference/margin"] < 0, lost["preference/accuracy"]) == (True, 0.0)


def test_a_margin_of_zero_does_not_depend_on_the_order_of_a_sum() -> None:
    values = [-1e-9, -30.0, -1e-7, -0.1, -12.3, -1e-8] * 50
    exact = PairReference(math.fsum(values), -1.0)
    assert evaluate(DPO(1.0), sorted(values), [-1.0], exact).metrics["preference/accuracy"] == 0.5


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("sides", [(CHOSEN, REJECTED), (REJECTED, CHOSEN), ([-0.5], [-0.02]), ([-9.0] * 40, [-0.5])])
def test_the_closed_form_is_the_gradient_of_the_loss(
    objective: PreferenceObjective, sides: tuple[list[float], list[float]]
) -> None:
    chosen, rejected = (torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in sides)
    loss = plain_loss(objective, chosen, rejected, REFERENCE)
    gradients = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    pair = evaluate(objective, *sides)
    assert pair.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(pair.chosen_gradient, gradients[0], rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(pair.rejected_gradient, gradients[1], rtol=1e-9, atol=1e-300)


def test_every_coefficient_changes_the_gradient() -> None:
    for cls in (DPO, ORPO):
        first, second = evaluate(cls(0.5)), evaluate(cls(0.6))
        assert not torch.allclose(first.chosen_gradient, second.chosen_gradient, rtol=1e-3)
        assert not torch.allclose(first.rejected_gradient, second.rejected_gradient, rtol=1e-3)


def test_orpo_without_its_odds_term_is_the_loss_of_the_chosen_answer() -> None:
    pair = evaluate(ORPO(0.0))
    assert pair.loss == pytest.approx(-sum(CHOSEN) / 3)
    assert pair.chosen_gradient.tolist() == pytest.approx([-1 / 3] * 3)
    assert pair.rejected_gradient.tolist() == [0.0] * 4


@pytest.mark.parametrize("extreme", [(-800.0, -1e-3), (-1e-3, -800.0)])
def test_a_dpo_gradient_stays_finite_and_is_not_lost_at_extreme_margins(extreme: tuple[float, float]) -> None:
    pair = evaluate(DPO(1.0), [extreme[0]], [extreme[1]], PairReference(-1.0, -1.0))
    margin = extreme[0] - extreme[1]
    assert pair.loss == pytest.approx(max(-margin, 0.0), abs=1e-12)
    assert float(pair.rejected_gradient) == pytest.approx(float(margin < 0), abs=1e-12)


def test_orpo_is_finite_for_a_certain_and_for_an_impossible_answer() -> None:
    certain = evaluate(ORPO(1.0), [0.0, 0.0], [-90.0])
    # The clamps: logit(-1e-6) = 13.8155, logit(-50) = -50. Behind them only the likelihood has a gradient.
    assert certain.metrics["preference/margin"] == pytest.approx(13.8155096 + 50)
    assert certain.metrics["orpo/nll"] == 0
    assert certain.chosen_gradient.tolist() == [-0.5, -0.5]
    assert certain.rejected_gradient.tolist() == [0.0]
    lost = evaluate(ORPO(1.0), [-90.0], [0.0])
    assert lost.loss == pytest.approx(90 + 13.8155096 + 50)


def test_logprobs_of_the_trainer_are_evaluated_in_double_precision() -> None:
    pair = DPO(0.1).evaluate(torch.full((3000,), -0.1), torch.tensor([-300.0]), PairReference(0.0, 0.0))
    assert pair.chosen_gradient.dtype == torch.float64
    assert pair.metrics["preference/margin"] == pytest.approx(300 - 3000 * float(torch.tensor(0.1)), abs=1e-9)


# -- what cannot be evaluated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_answer_without_tokens_is_an_error(objective: PreferenceObjective) -> None:
    with pytest.raises(ShapeError, match=r"the rejected answer's logprobs have shape \(0,\)"):
        evaluate(objective, CHOSEN, [])


def test_dpo_without_a_reference_is_an_error() -> None:
    with pytest.raises(ShapeError, match="DPO needs the reference logprobs"):
        evaluate(DPO(0.1), reference=None)


def test_a_config_gives_its_objective() -> None:
    assert objective_of(config(DPOConfig, beta=0.7)) == DPO(0.7)
    assert objective_of(config(ORPOConfig, orpo_lambda=0.3)) == ORPO(0.3)


# -- TRL ---------------------------------------------------------------------------------------------------------------


def golden_pairs(case: dict[str, Any], objective: PreferenceObjective) -> list[PairLoss]:
    references = case.get("references", [(0.0, 0.0)] * len(case["chosen"]))
    sides = zip(case["chosen"], case["rejected"], references, strict=True)
    return [evaluate(objective, chosen, rejected, PairReference(*found)) for chosen, rejected, found in sides]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("case", GOLDEN["dpo"], ids=lambda case: f"beta {case['beta']}")
def test_dpo_equals_that_of_trl(case: dict[str, Any]) -> None:
    pairs = golden_pairs(case, DPO(case["beta"]))
    assert mean([pair.loss for pair in pairs]) == pytest.approx(case["loss"], rel=1e-12)
    for side in ("chosen", "rejected"):
        for pair, theirs in zip(pairs, case[f"{side}_gradients"], strict=True):
            ours = getattr(pair, f"{side}_gradient") / len(pairs)
            assert ours.tolist() == pytest.approx(theirs, rel=1e-9)
        reward = mean([pair.metrics[f"preference/{side}_reward"] for pair in pairs])
        assert reward == pytest.approx(case["logged"][f"rewards/{side}"], rel=1e-9)
    accuracy = mean([pair.metrics["preference/accuracy"] for pair in pairs])
    assert accuracy == pytest.approx(case["logged"]["rewards/accuracies"])


@pytest.mark.parametrize("case", GOLDEN["orpo"], ids=lambda case: f"beta {case['beta']}")
def test_orpo_equals_that_of_trl_but_for_the_span_of_its_likelihood(case: dict[str, Any]) -> None:
    """TRL: beta is lambda; the likelihood is the token mean over prompts and chosen answers of the whole batch."""
    pairs = golden_pairs(case, ORPO(case["beta"]))
    logged = case["logged"]
    margins = mean([pair.metrics["preference/margin"] for pair in pairs])
    assert margins == pytest.approx(logged["log_odds_chosen"], rel=1e-5)
    odds_ratio_loss = mean([pair.metrics["orpo/odds_ratio_loss"] for pair in pairs])
    assert -odds_ratio_loss == pytest.approx(logged["log_odds_ratio"], rel=1e-5)
    likelihood = [value for side in (case["prompts"], case["chosen"]) for row in side for value in row]
    their_nll = -mean(likelihood)
    assert their_nll == pytest.approx(logged["nll_loss"], rel=1e-6)
    our_nll = mean([pair.metrics["orpo/nll"] for pair in pairs])
    ours = mean([pair.loss for pair in pairs])
    assert ours - our_nll + their_nll == pytest.approx(case["loss"], rel=1e-5)
    for pair, chosen, rejected in zip(pairs, case["chosen_gradients"], case["rejected_gradients"], strict=True):
        # Theirs is d/dl of -sum(l) / all tokens in place of -sum(l) / n_c / pairs.
        converted = pair.chosen_gradient / len(pairs) + 1 / len(chosen) / len(pairs) - 1 / len(likelihood)
        assert converted.tolist() == pytest.approx(chosen, rel=1e-4)
        assert (pair.rejected_gradient / len(pairs)).tolist() == pytest.approx(rejected, rel=1e-4)
