"""The unmodified official sampler against a real deployment worker, with transformers as the judge of its numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from fireworks.training.sdk import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    FixedConcurrencyController,
    SampledCompletion,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_model import make_tiny_model
from tests.wire.deployment_process import (
    DEPLOYMENT,
    Deployment,
    closed,
    deployment,
    write_lora_snapshot,
    write_model_snapshot,
)
from tests.wire.trainer_process import TOKEN

pytestmark = pytest.mark.timeout(240)

PROMPT = list(b"the quick brown fox")
Answer = TypeVar("Answer")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("home") / "dep-a", tiny) as running:
        yield running


@pytest.fixture
def run(worker: Deployment, tiny: Path) -> Callable[..., Any]:
    """Runs something with a sampler of its own."""

    def run(use: Callable[[DeploymentSampler], Awaitable[Answer]], **options: Any) -> Answer:
        async def with_sampler() -> Answer:
            sampler = DeploymentSampler(
                inference_url=worker.base_url,
                model=DEPLOYMENT,
                api_key=TOKEN,
                tokenizer=AutoTokenizer.from_pretrained(tiny),
                **options,
            )
            try:
                return await use(sampler)
            finally:
                await closed(sampler)

        return asyncio.run(with_sampler())

    return run


@pytest.fixture
def sample(run: Callable[..., Any]) -> Callable[..., list[SampledCompletion]]:
    return lambda **options: run(lambda sampler: sampler.sample_with_prompt_tokens(PROMPT, **options))


def log_probabilities(folder: Path, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """(T - 1, V) of each next token, under transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return torch.log_softmax(logits / temperature, dim=-1)


def of_tokens(logprobs_TV: torch.Tensor, tokens: list[int]) -> list[float]:
    return logprobs_TV[range(len(tokens) - 1), tokens[1:]].tolist()


def test_both_kinds_of_logprobs_are_those_of_the_model(sample: Callable[..., Any], tiny: Path) -> None:
    completions = sample(n=3, max_tokens=24, temperature=0.7, logprobs=True)
    assert len({tuple(each.full_tokens) for each in completions}) == 3
    for each in completions:
        assert each.prompt_len == len(PROMPT)
        assert each.full_tokens[: each.prompt_len] == PROMPT
        raw = of_tokens(log_probabilities(tiny, each.full_tokens), each.full_tokens)[each.prompt_len - 1 :]
        drawn = of_tokens(log_probabilities(tiny, each.full_tokens, 0.7), each.full_tokens)[each.prompt_len - 1 :]
        assert each.inference_logprobs == pytest.approx(raw, abs=1e-4)
        assert each.sampling_logprobs == pytest.approx(drawn, abs=1e-4)


def test_echoed_logprobs_align_with_training(sample: Callable[..., Any], tiny: Path) -> None:
    (completion,) = sample(max_tokens=6, logprobs=True, echo=True)
    assert completion.logprobs_echoed
    assert completion.echoed_prompt_logprob_count == len(PROMPT) - 1
    expected = of_tokens(log_probabilities(tiny, completion.full_tokens), completion.full_tokens)
    assert completion.inference_logprobs == pytest.approx(expected, abs=1e-4)


def test_alternatives_are_the_most_probable_tokens(sample: Callable[..., Any], tiny: Path) -> None:
    (completion,) = sample(max_tokens=5, logprobs=True, top_logprobs=3)
    expected = log_probabilities(tiny, completion.full_tokens)[len(PROMPT) - 1 :].topk(3)
    assert completion.inference_topk_token_ids == expected.indices.tolist()
    assert torch.allclose(torch.tensor(completion.inference_topk_logprobs), expected.values, atol=1e-4)


def test_greedy_takes_the_most_probable_token_with_certainty(sample: Callable[..., Any], tiny: Path) -> None:
    (completion,) = sample(max_tokens=12, temperature=0.0, logprobs=True)
    best = log_probabilities(tiny, completion.full_tokens).argmax(-1).tolist()
    assert completion.full_tokens[len(PROMPT) :] == best[len(PROMPT) - 1 :]
    assert completion.sampling_logprobs == [0.0] * completion.completion_len


def test_a_seed_gives_the_same_tokens_whatever_else_is_sampled(run: Callable[..., Any]) -> None:
    async def alone(sampler: DeploymentSampler) -> list[list[int]]:
        one_by_one = [await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=20, seed=seed) for seed in range(6)]
        return [each[0].full_tokens for each in one_by_one]

    async def together(sampler: DeploymentSampler) -> list[list[int]]:
        others = [sampler.sample_with_prompt_tokens(PROMPT[:n], max_tokens=9) for n in range(3, 15)]
        wanted = [sampler.sample_with_prompt_tokens(PROMPT, max_tokens=20, seed=seed) for seed in range(6)]
        return [each[0].full_tokens for each in (await asyncio.gather(*others, *wanted))[len(others) :]]

    first = run(alone)
    assert first == run(together)
    assert len(set(map(tuple, first))) == 6


def test_stop_strings_and_stop_tokens_end_a_completion(sample: Callable[..., Any]) -> None:
    (free,) = sample(max_tokens=40, seed=21, ignore_eos=True)
    tokens = free.full_tokens[len(PROMPT) :]
    place = next(n for n, token in enumerate(tokens) if n > 5 and 32 < token < 127)
    for stop in ([chr(tokens[place])], [tokens[place]]):
        (stopped,) = sample(max_tokens=40, seed=21, ignore_eos=True, stop=stop)
        first = tokens.index(tokens[place])
        assert stopped.finish_reason == "stop"
        assert stopped.full_tokens[len(PROMPT) :] == tokens[: first + 1]
        assert stopped.text == bytes(tokens[:first]).decode(errors="replace")


def test_messages_are_sampled_from(run: Callable[..., Any]) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    completions = run(lambda sampler: sampler.sample_with_tokens(messages, n=2, max_tokens=5))
    assert len(completions) == 2
    assert bytes(completions[0].full_tokens[1:6]) != b""
    assert completions[0].prompt_len == completions[1].prompt_len > 20


def test_many_at_once_are_all_answered_and_steer_the_concurrency(run: Callable[..., Any]) -> None:
    async def many(sampler: DeploymentSampler) -> tuple[int, list[Any]]:
        groups = [
            sampler.sample_with_prompt_tokens(PROMPT[:n], n=8, max_tokens=12, logprobs=True) for n in range(4, 14)
        ]
        completions = [each for group in await asyncio.gather(*groups) for each in group]
        return len(completions), sampler.drain_metrics()

    count, metrics = run(many, concurrency_controller=AdaptiveConcurrencyController(initial_window=64))
    assert count == len(metrics) == 80
    for each in metrics:
        assert each.prefill_queue_duration >= 0
        assert each.num_concurrent_requests >= 1
        assert each.http_status_code == 200
        assert each.error is None


def test_the_same_prompt_is_computed_once(run: Callable[..., Any]) -> None:
    prompt = list(b"a prompt that nobody has asked for yet, long enough to share")

    async def group(sampler: DeploymentSampler) -> list[Any]:
        await sampler.sample_with_prompt_tokens(prompt, n=4, max_tokens=2)
        return sampler.drain_metrics()

    metrics = run(group, concurrency_controller=FixedConcurrencyController(4))
    assert sorted(each.cached_prompt_tokens == len(prompt) for each in metrics) == [False, True, True, True]


def test_a_request_that_cannot_succeed_is_not_tried_again(run: Callable[..., Any]) -> None:
    async def refused(sampler: DeploymentSampler) -> Any:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await sampler.sample_with_prompt_tokens([1] * 600, max_tokens=2)
        return caught.value

    error = run(refused)
    assert error.response.status_code == 400
    assert "600 tokens" in error.response.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # the head has an adapter, as trained ones do
def test_the_snapshot_that_sampled_is_in_the_result(run: Callable[..., Any], worker: Deployment, tiny: Path) -> None:
    async def result(sampler: DeploymentSampler) -> Any:
        return await sampler.sample_with_prompt_tokens_result(PROMPT, max_tokens=4, logprobs=True, echo=True)

    assert run(result).upstream_response_id.partition(".")[2] == ""
    full = write_model_snapshot(worker.checkpoints, "step-1.full")
    lora = write_lora_snapshot(worker.checkpoints, "step-2", tiny)
    for name, folder in (("step-1.full", full), ("step-2", lora)):
        assert worker.load(name)["current_snapshot_identity"] == name
        sampled = run(result)
        assert sampled.upstream_response_id.partition(".")[2] == name
        (completion,) = sampled.completions
        expected = of_tokens(log_probabilities(folder, completion.full_tokens), completion.full_tokens)
        assert completion.inference_logprobs == pytest.approx(expected, abs=2e-3)
