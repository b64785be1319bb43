"""preference_step on a real trainer: its gradient against autograd through the plain model, and what stops a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fireworks.training.sdk import AdamParams, TrainerJobManager
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from cookbook.client import ReconnectableClient
from cookbook.data.pair_datums import pair_datums, response_logprobs
from cookbook.data.pairs import RenderedPair
from cookbook.data.rendering import RenderedRow
from cookbook.errors import DataError, RequestRejected, ShapeError
from cookbook.losses.preference import DPO, ORPO, PairReference, PreferenceObjective
from cookbook.preference_step import PreferenceStepResult, preference_step
from tests.losses.test_preference import GOLDEN, plain_loss
from tests.pairs import make_pair
from tests.running_backend import MODEL, WireBackend

JOB = "preference-full"
SGD = AdamParams(learning_rate=1.0, beta1=0.0, beta2=0.0, eps=1e3, weight_decay=0.0)
"""The update is the gradient over 1,000, and the first moment is the gradient."""
OBJECTIVES = (DPO(0.1), DPO(0.7), ORPO(1.0), ORPO(0.3))


def with_a_tool_turn() -> RenderedPair:
    """Responses of two turns, with tokens between them that are not trained; the first token of both is the same."""

    def side(tokens: list[int], weights: list[int]) -> RenderedRow:
        return RenderedRow(np.array(tokens, np.int32), np.array(weights, np.float32))

    chosen = side([256, 5, 6, 7, 40, 41, 8, 9, 42, 43], [0, 0, 0, 0, 1, 1, 0, 0, 1, 1])
    rejected = side([256, 5, 6, 7, 40, 50, 8, 9, 10, 51], [0, 0, 0, 0, 1, 1, 0, 0, 0, 1])
    return RenderedPair(chosen, rejected, 4)


PAIRS = (
    make_pair([10, 11, 12], [20], [21]),
    make_pair([256, 100, 101, 102, 103], [60, 61, 62, 63, 64], [70, 71]),
    with_a_tool_turn(),
)
REFERENCES = (PairReference(-6.0, -5.5), PairReference(-30.0, -9.0), PairReference(-22.5, -18.0))


@pytest.fixture(scope="module")
def job(start_trainer: Callable[..., str]) -> str:
    return start_trainer(JOB, 0)


@pytest.fixture
def connect(manager: TrainerJobManager, job: str) -> Iterator[Callable[[], ReconnectableClient]]:
    """Opens a session with a fresh full-parameter model."""
    clients: list[ReconnectableClient] = []

    def connect() -> ReconnectableClient:
        clients.append(ReconnectableClient(manager, job, MODEL, 0))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Callable[[], ReconnectableClient]) -> ReconnectableClient:
    return connect()


@pytest.fixture(scope="module")
def model(backend: WireBackend) -> Any:
    return AutoModelForCausalLM.from_pretrained(backend.home / "models" / "tiny", dtype=torch.float32)


def step(
    client: ReconnectableClient,
    objective: PreferenceObjective,
    pairs: Sequence[RenderedPair] = PAIRS,
    references: Sequence[PairReference] | None = REFERENCES,
    normalization: str | None = None,
) -> PreferenceStepResult:
    return preference_step(
        client,
        pairs,
        objective,
        SGD,
        references=references,
        grad_accumulation_normalization=normalization,
        timeout_s=60,
    )


def applied_gradient(backend: WireBackend, client: ReconnectableClient, name: str) -> dict[str, Tensor]:
    """The gradient of the last step, by the parameter's name: the first moments of Adam in a saved state."""
    client.save_state(name)
    found = {}
    for path in (backend.home / "checkpoints" / JOB / "state" / name).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.startswith("optimizer.exp_avg."):
                    found[key.removeprefix("optimizer.exp_avg.")] = file.get_tensor(key)
    return found


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)]).double()


def responses(model: Any, pair: RenderedPair) -> tuple[Tensor, Tensor]:
    """Logprobs of the response tokens of both answers, by plain indexing, float64."""
    found = []
    for row in (pair.chosen, pair.rejected):
        tokens = torch.tensor(row.tokens, dtype=torch.int64)
        logprobs = torch.log_softmax(model(tokens[None]).logits[0].double(), dim=-1)
        places = [place for place, weight in enumerate(row.weights.tolist()) if weight == 1]
        found.append(torch.stack([logprobs[place - 1, tokens[place]] for place in places]))
    return found[0], found[1]


def plain_gradient(model: Any, objective: PreferenceObjective, pairs: Sequence[RenderedPair]) -> tuple[float, Any]:
    model.zero_grad()
    terms = [
        plain_loss(objective, *responses(model, pair), found) for pair, found in zip(pairs, REFERENCES, strict=True)
    ]
    loss = torch.stack(terms).mean()
    torch.autograd.backward(loss)
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def policy_sums(client: ReconnectableClient, pairs: Sequence[RenderedPair]) -> list[PairReference]:
    answer = client.forward(pair_datums(pairs), "cross_entropy")
    logprobs = [output["logprobs"].to_torch() for output in answer.loss_fn_outputs]
    return [
        PairReference(math.fsum(chosen.tolist()), math.fsum(rejected.tolist()))
        for chosen, rejected in response_logprobs(pairs, logprobs)
    ]


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_an_answer_of_one_token_is_the_one_position_at_the_end_of_its_prompt() -> None:
    chosen, rejected = pair_datums(PAIRS[:1])
    assert chosen.model_input.to_ints() == rejected.model_input.to_ints() == [10, 11, 12]
    assert chosen.loss_fn_inputs["target_tokens"].to_numpy().tolist() == [11, 12, 20]
    assert chosen.loss_fn_inputs["weights"].to_numpy().tolist() == [0.0, 0.0, 1.0]  # P - 1 = 2
    ((one, other),) = response_logprobs(PAIRS[:1], [torch.arange(3.0), torch.arange(3.0, 6.0)])
    assert (one.tolist(), other.tolist()) == ([2.0], [5.0])


def test_tokens_between_the_turns_of_a_response_are_not_trained() -> None:
    ((chosen, rejected),) = response_logprobs([PAIRS[2]], [torch.arange(9.0), torch.arange(9.0)])
    assert (chosen.tolist(), rejected.tolist()) == ([3, 4, 7, 8], [3, 4, 8])


@pytest.mark.parametrize("objective", [DPO(0.5), ORPO(1.0)], ids=str)
def test_a_step_on_answers_of_one_token_moves_them_apart(
    client: ReconnectableClient, objective: PreferenceObjective
) -> None:
    before = policy_sums(client, PAIRS[:1])
    result = step(client, objective, PAIRS[:1], before)
    (after,) = policy_sums(client, PAIRS[:1])
    assert after.chosen > before[0].chosen + 1e-3
    assert after.chosen - after.rejected > before[0].chosen - before[0].rejected + 1e-3
    assert (result.num_pairs, result.num_tokens, result.num_trained) == (1, 8, 2)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_gradient_is_that_of_autograd_through_the_plain_model(
    backend: WireBackend, client: ReconnectableClient, model: Any, objective: PreferenceObjective
) -> None:
    result = step(client, objective)
    ours = applied_gradient(backend, client, f"g{OBJECTIVES.index(objective)}")
    loss, theirs = plain_gradient(model, objective, PAIRS)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert result.metrics["train/grad_norm"] == pytest.approx(float(flat(theirs).norm()), rel=1e-4)


def test_a_batch_is_the_mean_of_its_pairs(backend: WireBackend, connect: Callable[[], ReconnectableClient]) -> None:
    objective = DPO(0.3)
    gradients, results = [], []
    for number, (pair, reference) in enumerate(zip(PAIRS, REFERENCES, strict=True)):
        alone = connect()
        results.append(step(alone, objective, [pair], [reference]))
        gradients.append(flat(applied_gradient(backend, alone, f"one{number}")))
    together = connect()
    result = step(together, objective)
    assert result.loss == pytest.approx(sum(one.loss for one in results) / 3, rel=1e-6)
    for name in results[0].metrics.keys() - {"train/grad_norm"}:
        assert result.metrics[name] == pytest.approx(sum(one.metrics[name] for one in results) / 3, abs=1e-5), name
    torch.testing.assert_close(
        flat(applied_gradient(backend, together, "three")), torch.stack(gradients).mean(0), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    ("normalization", "divisor"), [("none", 3), ("num_sequences", 6), ("num_loss_tokens", 1 + 1 + 5 + 2 + 4 + 3)]
)
def test_where_the_trainer_normalizes_it_gets_the_sum_over_pairs(
    backend: WireBackend, connect: Callable[[], ReconnectableClient], normalization: str, divisor: int
) -> None:
    mean, other = connect(), connect()
    result = step(mean, ORPO(1.0))
    assert step(other, ORPO(1.0), normalization=normalization).loss == result.loss
    gradients = [flat(applied_gradient(backend, client, f"n{i}{divisor}")) for i, client in enumerate((mean, other))]
    torch.testing.assert_close(gradients[1] * divisor / 3, gradients[0], rtol=1e-3, atol=1e-6)


def test_a_policy_that_is_its_own_reference_has_loss_log_two_and_only_ties(client: ReconnectableClient) -> None:
    result = step(client, DPO(0.1), references=policy_sums(client, PAIRS))
    assert result.loss == pytest.approx(math.log(2))
    assert (result.metrics["preference/margin"], result.metrics["preference/accuracy"]) == (0.0, 0.5)


def test_a_step_of_dpo_on_tokens_equals_that_of_trl(client: ReconnectableClient) -> None:
    theirs = GOLDEN["dpo_of_model"]
    pairs = [make_pair(*tokens) for tokens in GOLDEN["tokens"]]
    references = [PairReference(*sums) for sums in GOLDEN["references"]]
    result = step(client, DPO(theirs["beta"]), pairs, references)
    assert result.loss == pytest.approx(theirs["loss"], rel=1e-5)
    assert result.metrics["train/grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_step_of_orpo_on_tokens_equals_that_of_trl_but_for_the_likelihood(client: ReconnectableClient) -> None:
    theirs = GOLDEN["orpo_of_model"]
    pairs = [make_pair(*tokens) for tokens in GOLDEN["tokens"]]
    answer = client.forward(pair_datums(pairs), "cross_entropy")
    chosen = [output["logprobs"].to_torch() for output in answer.loss_fn_outputs[::2]]  # with the prompt
    their_nll = -float(torch.cat(chosen).mean())
    assert their_nll == pytest.approx(theirs["logged"]["nll_loss"], rel=1e-5)
    result = step(client, ORPO(theirs["beta"]), pairs, None)
    assert result.metrics["preference/margin"] == pytest.approx(theirs["logged"]["log_odds_chosen"], rel=1e-4)
    assert result.loss - result.metrics["orpo/nll"] + their_nll == pytest.approx(theirs["loss"], rel=1e-5)


# -- what stops a step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "3 pairs have no references"),
        (REFERENCES[:2], "3 pairs have 2 references"),
        ((*REFERENCES[:2], PairReference(-1.0, float("nan"))), r"pair 2 \(of 3\) has reference logprobs -1.0 and nan"),
    ],
)
def test_dpo_needs_a_finite_reference_for_each_pair(
    client: ReconnectableClient, references: Sequence[PairReference] | None, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        step(client, DPO(0.1), references=references)


def test_no_pairs_and_empty_answers_are_errors(client: ReconnectableClient) -> None:
    with pytest.raises(DataError, match="there are no pairs"):
        step(client, ORPO(1.0), [], None)
    with pytest.raises(DataError, match=r"the rejected answer of pair 1 \(of 2\) has no response token"):
        step(client, ORPO(1.0), [PAIRS[0], make_pair([1, 2], [3], [])], None)


def test_a_gradient_that_is_not_finite_stops_the_step_and_leaves_the_weights(client: ReconnectableClient) -> None:
    before = policy_sums(client, PAIRS)
    far = [PairReference(0.0, -1e3)] * 3  # sigmoid(-beta D) = 1
    with pytest.raises(RequestRejected, match=r"pair 0 \(of 3, digest [0-9a-f]{16}\) has a gradient of -inf"):
        step(client, DPO(1e40), references=far)
    assert policy_sums(client, PAIRS) == before
    assert math.isfinite(step(client, DPO(0.1)).loss)  # the session is usable, and kept no gradient


def test_answers_of_the_trainer_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 pairs are 6 datums, and there are 5 answers"):
        response_logprobs(PAIRS, [torch.zeros(3)] * 5)
    with pytest.raises(ShapeError, match=r"3 target tokens has logprobs of shape \(4,\)"):
        response_logprobs(PAIRS[:1], [torch.zeros(4)] * 2)
