"""Held-out evaluation against the model's own logits, computed with transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cookbook.client import ReconnectableClient
from cookbook.data.rendering import RenderedRow
from cookbook.errors import DataError, TrainerLost
from cookbook.evaluation import EvalResult, evaluate_held_out
from tests.running_backend import MODEL


def row(tokens, weights):
    return RenderedRow(np.array(tokens, dtype=np.int32), np.array(weights, dtype=np.float32))


@pytest.fixture(scope="module")
def client(manager, trainer):
    with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as client:
        yield client


@pytest.fixture(scope="module")
def model(backend):
    return AutoModelForCausalLM.from_pretrained(backend.home / "models" / "tiny", dtype=torch.float32)


def greedy(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def logprob(model, tokens, position):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, position - 1]
    return float(torch.log_softmax(logits.double(), -1)[tokens[position]])


def test_the_numbers_are_those_of_the_models_own_logits(client, model):
    exact = greedy(model, [10, 20, 30], 3)  # what the model says by itself
    half = [*greedy(model, [40, 50, 60], 1), 7]  # its first answer token, then a wrong one
    while half[-1] == greedy(model, half[:-1], 1)[-1]:
        half[-1] += 1
    rows = [
        row(exact, [0, 0, 0, 1, 1, 1]),
        row(half, [0, 0, 0, 1, 1]),
        row([1, 2, 3], [0, 0, 0]),  # nothing trained: counted nowhere
    ]
    nll = -sum(logprob(model, exact, n) for n in (3, 4, 5)) - sum(logprob(model, half, n) for n in (3, 4))
    expected = EvalResult(loss=nll / 5, token_accuracy=4 / 5, exact_match=1 / 2, num_tokens=5, num_rows=2)
    result = evaluate_held_out(client, iter(rows))
    assert result.to_dict() == pytest.approx(expected.to_dict(), rel=1e-4)


def test_the_size_of_a_request_does_not_matter(client):
    rng = np.random.default_rng(0)
    rows = [row(rng.integers(0, 250, 9), [0, 0, 0, 0, *rng.integers(0, 2, 5)]) for _ in range(7)]
    whole = evaluate_held_out(client, rows).to_dict()
    assert evaluate_held_out(client, rows, chunk=2, timeout_s=60).to_dict() == pytest.approx(whole)


def test_rows_without_anything_to_predict_are_an_error(client):
    with pytest.raises(DataError, match="no held-out row has a trained token"):
        evaluate_held_out(client, [row([1, 2], [0, 0])])


def test_the_deadline_is_one_for_all_rows(manager, trainer):
    with ReconnectableClient(manager, trainer, MODEL, 4) as client:
        rows = (row([1, 2, 3], [0, 1, 1]) for _ in range(100_000))
        with pytest.raises(TrainerLost, match=r"evaluation had finished \d+ rows|was not answered within"):
            evaluate_held_out(client, rows, chunk=1, timeout_s=0.5)
