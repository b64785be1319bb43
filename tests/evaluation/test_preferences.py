"""Evaluation on pairs against the model's own logits, computed with transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from fireworks.training.sdk import TrainerJobManager
from transformers import AutoModelForCausalLM

from cookbook.client import ReconnectableClient
from cookbook.data.pairs import RenderedPair
from cookbook.errors import DataError, ShapeError, TrainerLost
from cookbook.evaluation.preferences import PreferenceEvalResult, evaluate_preferences
from cookbook.losses.preference import DPO, ORPO, PairReference
from tests.pairs import make_pair, make_pairs
from tests.running_backend import MODEL, WireBackend
from tests.test_preference_step import responses


@pytest.fixture(scope="module")
def client(manager: TrainerJobManager, trainer: str) -> Iterator[ReconnectableClient]:
    with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as client:
        yield client


@pytest.fixture(scope="module")
def model(backend: WireBackend) -> Any:
    return AutoModelForCausalLM.from_pretrained(backend.home / "models" / "tiny", dtype=torch.float32)


def references(pairs: Sequence[RenderedPair], timeout_s: float | None = None) -> list[PairReference]:
    return [PairReference(-5.0 * pair.chosen.num_trained, -5.5 * pair.rejected.num_trained) for pair in pairs]


def scored(model: Any, pair: RenderedPair) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        chosen, rejected = responses(model, pair)
    return chosen.tolist(), rejected.tolist()


def test_a_model_that_is_its_own_reference_has_margin_0_and_asks_for_nothing(client: ReconnectableClient) -> None:
    result = evaluate_preferences(client, make_pairs(5), DPO(0.1), None, is_reference=True, chunk=2)
    assert (result.margin, result.reward_accuracy, result.loss) == (0.0, 0.5, pytest.approx(math.log(2), abs=1e-12))


def test_reference_logprobs_are_given_the_time_that_is_left(client: ReconnectableClient) -> None:
    given: list[float | None] = []

    def noted(pairs: Sequence[RenderedPair], timeout_s: float | None) -> list[PairReference]:
        given.append(timeout_s)
        return references(pairs)

    evaluate_preferences(client, make_pairs(4), DPO(0.1), noted, chunk=2, timeout_s=100)
    first, second = given
    assert first is not None
    assert second is not None
    assert 0 < second < first < 100


def test_the_numbers_are_those_of_the_models_own_logits(client: ReconnectableClient, model: Any) -> None:
    pairs = make_pairs(6)
    both = [scored(model, pair) for pair in pairs]
    margins = [(sum(c) - r.chosen) - (sum(d) - r.rejected) for (c, d), r in zip(both, references(pairs), strict=True)]
    expected = PreferenceEvalResult(
        loss=sum(math.log1p(math.exp(-0.2 * margin)) for margin in margins) / 6,
        preference_accuracy=sum(sum(c) > sum(d) for c, d in both) / 6,
        preference_accuracy_per_token=sum(sum(c) / len(c) > sum(d) / len(d) for c, d in both) / 6,
        chosen_logprob=sum(sum(c) / len(c) for c, _ in both) / 6,
        rejected_logprob=sum(sum(d) / len(d) for _, d in both) / 6,
        num_pairs=6,
        reward_accuracy=sum(margin > 0 for margin in margins) / 6,
        margin=sum(margins) / 6,
    )
    result = evaluate_preferences(client, iter(pairs), DPO(0.2), references)
    assert result.to_dict() == pytest.approx(expected.to_dict(), rel=1e-4)
    accuracies = (result.preference_accuracy, result.preference_accuracy_per_token, result.reward_accuracy)
    assert len(set(accuracies)) == 3, "the example tells the three accuracies apart"


def test_without_a_reference_there_is_no_reward(client: ReconnectableClient, model: Any) -> None:
    pairs = make_pairs(3)
    result = evaluate_preferences(client, pairs, ORPO(0.0), None)
    nll = [-sum(chosen) / len(chosen) for chosen, _ in (scored(model, pair) for pair in pairs)]
    assert result.loss == pytest.approx(sum(nll) / 3, rel=1e-4)
    assert result.to_dict().keys().isdisjoint({"reward_accuracy", "margin"})


def test_a_tie_counts_half(client: ReconnectableClient) -> None:
    same = make_pair([1, 2, 3], [20, 30], [20, 30])
    result = evaluate_preferences(client, [same], DPO(0.1), lambda pairs, seconds: [PairReference(-1.0, -1.0)])
    accuracies = (result.preference_accuracy, result.preference_accuracy_per_token, result.reward_accuracy)
    assert accuracies == (0.5, 0.5, 0.5)
    assert result.margin == 0
    assert result.loss == pytest.approx(math.log(2))


def test_the_size_of_a_request_does_not_matter(client: ReconnectableClient) -> None:
    pairs = make_pairs(7)
    whole = evaluate_preferences(client, pairs, DPO(0.1), references).to_dict()
    asked: list[int] = []

    def counted(chunk: Sequence[RenderedPair], timeout_s: float | None) -> list[PairReference]:
        asked.append(len(chunk))
        return references(chunk)

    parts = evaluate_preferences(client, pairs, DPO(0.1), counted, chunk=3, timeout_s=60).to_dict()
    assert parts == pytest.approx(whole, rel=1e-5)
    assert asked == [3, 3, 1]


def test_what_cannot_be_evaluated_is_an_error(client: ReconnectableClient) -> None:
    with pytest.raises(DataError, match="no held-out pairs"):
        evaluate_preferences(client, [], ORPO(1.0), None)
    with pytest.raises(ShapeError, match="dpo needs reference logprobs"):
        evaluate_preferences(client, make_pairs(1), DPO(0.1), None)


def test_the_deadline_is_one_for_all_pairs(manager: TrainerJobManager, trainer: str) -> None:
    with ReconnectableClient(manager, trainer, MODEL, 4) as client:
        pairs = (make_pair([1, 2], [3], [4]) for _ in range(100_000))
        with pytest.raises(TrainerLost, match=r"evaluation had finished \d+ pairs|was not answered within"):
            evaluate_preferences(client, pairs, ORPO(1.0), None, chunk=1, timeout_s=0.5)
