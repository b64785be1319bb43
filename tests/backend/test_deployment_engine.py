"""The engine: batching changes no result, prefixes are shared, weights swap between sequences, places are freed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from cookbook.backend.decoder import HuggingFaceDecoder
from cookbook.backend.deployment.cache import CacheShape, DecodeRows, PrefixStore, Prompt
from cookbook.backend.deployment.engine import Engine, EngineClosed, Generated, GenerationRequest, QueueFull
from cookbook.backend.deployment.llama import LlamaModel
from cookbook.errors import ModelError
from tests.tiny_model import make_tiny_model

Start = Callable[..., Engine]
PROMPT = tuple(range(60, 90))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def start(tiny: Path) -> Iterator[Start]:
    engines = []

    def make(folder: Path = tiny, **limits: int) -> Engine:
        settings = {"max_batch": 8, "max_context": 256, "max_waiting": 100} | limits
        engines.append(Engine(lambda: LlamaModel.load(folder, "float32"), "base", **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def _generate(engine: Engine, *requests: GenerationRequest) -> list[Generated]:
    return [ticket.result(60) for ticket in [engine.submit(request) for request in requests]]


@torch.no_grad()
def _trainer_logprobs(folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """(T, V): row t is about token t + 1."""
    decoder = HuggingFaceDecoder.load(folder, "float32")
    return decoder.logits(decoder.hidden_states(torch.tensor([tokens])))[0].log_softmax(-1)


class _Gate:
    """Holds the compute thread inside a sequence's is_complete until opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, tokens: object) -> bool:
        self.reached.set()
        assert self.opened.wait(30)
        return False


def test_greedy_tokens_and_logprobs_are_the_trainers(start: Start, tiny: Path) -> None:
    prompts = [PROMPT[:n] for n in (1, 7, 30, 12, 12)]
    requests = [GenerationRequest(p, 20, temperature=0.0, prompt_logprobs=True, top_logprobs=3) for p in prompts]
    for prompt, generated in zip(prompts, _generate(start(), *requests), strict=True):
        logprobs = _trainer_logprobs(tiny, (*prompt, *generated.tokens))
        best = logprobs[len(prompt) - 1 : -1].topk(3)
        assert generated.tokens == best.indices[:, 0].tolist()
        torch.testing.assert_close(torch.tensor(generated.logprobs), best.values[:, 0], atol=1e-5, rtol=0)
        assert [[token for token, _ in top] for top in generated.top] == best.indices.tolist()
        assert generated.prompt_logprobs[0] is None
        expected = [float(logprobs[t - 1, prompt[t]]) for t in range(1, len(prompt))]
        assert generated.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-5)
        assert generated.sampling_logprobs == [0.0] * 20


def test_sampled_logprobs_are_the_trainers_and_the_seed_decides(start: Start, tiny: Path) -> None:
    engine = start()
    requests = [GenerationRequest(PROMPT, 15, seed=seed) for seed in (1, 2, 1)]
    one, two, again = _generate(engine, *requests)
    assert one.tokens == again.tokens != two.tokens
    logprobs = _trainer_logprobs(tiny, (*PROMPT, *one.tokens))[len(PROMPT) - 1 : -1]
    expected = logprobs.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-5, rtol=0)
    assert one.sampling_logprobs == one.logprobs


def test_a_result_does_not_depend_on_what_else_runs(start: Start) -> None:
    engine = start(max_batch=4)
    requests = [
        GenerationRequest(
            PROMPT[: 3 + n], 5 + 3 * n, seed=n, temperature=(1.0, 0.5, 2.0)[n % 3], top_p=(1.0, 0.9)[n % 2]
        )
        for n in range(11)
    ]
    together = _generate(engine, *requests)
    for request, generated in zip(requests, together, strict=True):
        engine.reset_prefix_cache()
        (alone,) = _generate(engine, request)
        assert alone.tokens == generated.tokens
        assert alone.sampling_logprobs == pytest.approx(generated.sampling_logprobs, abs=1e-4)


def test_each_place_of_a_completion_is_drawn_anew(start: Start) -> None:
    (nearly_uniform,) = _generate(start(), GenerationRequest(PROMPT, 40, temperature=1000.0, seed=3))
    assert len(set(nearly_uniform.tokens)) > 25


def test_rows_keep_their_content_when_others_leave_and_the_cache_grows() -> None:
    shape = CacheShape(num_layers=2, num_heads=1, head_dim=4, dtype=torch.float32)
    rows = DecodeRows(shape, max_rows=4, max_bytes=2**20)
    prompts = []
    for count in (3, 5, 70):
        prompt = Prompt.blank(tuple(range(count)), shape)
        prompt.keys_LGDT.fill_(count)
        prompt.values_LGTD.fill_(-count)
        prompt.filled = count
        prompts.append(prompt)
        rows.append(prompt, 2 * count)
    rows.remove(0)  # the last one, of 70, takes its place
    rows.append(prompts[0], 300)
    for row, prompt in enumerate((prompts[2], prompts[1], prompts[0])):
        kept = rows.copy(row, prompt.tokens)
        assert kept.filled == prompt.filled
        assert torch.equal(kept.keys_LGDT, prompt.keys_LGDT)
        assert torch.equal(kept.values_LGTD, prompt.values_LGTD)


def test_rows_fit_up_to_their_number_and_memory_but_one_always_does() -> None:
    shape = CacheShape(num_layers=1, num_heads=1, head_dim=4, dtype=torch.float32)
    rows = DecodeRows(shape, max_rows=3, max_bytes=4 * 64 * shape.bytes_per_position)
    blank = Prompt.blank((1,), shape)
    assert rows.fits(10_000)
    rows.append(blank, 64)
    assert rows.fits(128)
    assert not rows.fits(129)
    rows.append(blank, 64)
    rows.append(blank, 64)
    assert not rows.fits(1)


def test_prefixes_beyond_their_memory_are_forgotten_oldest_first() -> None:
    shape = CacheShape(num_layers=1, num_heads=1, head_dim=4, dtype=torch.float32)
    store = PrefixStore(max_bytes=20 * shape.bytes_per_position)
    for first in range(3):
        prompt = Prompt.blank((first, *range(7)), shape)
        prompt.filled = 8
        store.put(prompt)
        assert store.longest((0, 0, 1, 9))[1] == 3  # each use keeps it
    assert store.longest((1, 0, 1, 9)) == (None, 0)
    assert store.longest((2, 0, 1, 9))[1] == 3


def test_without_a_seed_completions_differ(start: Start) -> None:
    one, two = _generate(start(), *[GenerationRequest(PROMPT, 12)] * 2)
    assert one.tokens != two.tokens


def test_one_prompt_is_prefilled_once(start: Start) -> None:
    engine = start()
    first, *others = _generate(engine, *[GenerationRequest(PROMPT, 4, seed=n) for n in range(12)])
    assert first.cached_prompt_tokens == 0
    assert [generated.cached_prompt_tokens for generated in others] == [len(PROMPT)] * 11


def test_the_next_turn_reuses_prompt_and_completion_with_the_same_result(start: Start) -> None:
    engine = start()
    (first,) = _generate(engine, GenerationRequest(PROMPT, 10, seed=1))
    turn = GenerationRequest((*PROMPT, *first.tokens, 5, 6, 7), 10, temperature=0.0)
    (cached,) = _generate(engine, turn)
    assert cached.cached_prompt_tokens == len(PROMPT) + 9  # the tenth token was drawn, but never fed to the model
    engine.reset_prefix_cache()
    (fresh,) = _generate(engine, turn)
    assert fresh.cached_prompt_tokens == 0
    assert fresh.tokens == cached.tokens
    assert fresh.logprobs == pytest.approx(cached.logprobs, abs=1e-5)


def test_a_long_prompt_in_pieces_gives_the_same(tmp_path: Path, start: Start) -> None:
    folder = make_tiny_model(tmp_path / "long", max_position_embeddings=4096)
    prompt = tuple(n % 250 for n in range(2500))
    engine = start(folder, max_context=4096)
    generated, short = _generate(engine, GenerationRequest(prompt, 5, temperature=0.0), GenerationRequest(PROMPT, 40))
    best = _trainer_logprobs(folder, (*prompt, *generated.tokens))[len(prompt) - 1 : -1].max(-1)
    assert generated.tokens == best.indices.tolist()
    assert generated.logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(short.tokens) == 40


def test_eos_max_tokens_is_complete_and_the_context_end_a_completion(start: Start) -> None:
    engine = start(max_context=40)
    plain, stopped, completed, cut, nothing = _generate(
        engine,
        GenerationRequest(PROMPT, 8, temperature=0.0),
        GenerationRequest(PROMPT, 8, seed=1, eos_tokens=frozenset(range(264))),
        GenerationRequest(PROMPT, 8, is_complete=lambda tokens: len(tokens) == 3),
        GenerationRequest(PROMPT, 100),
        GenerationRequest(PROMPT, 0, prompt_logprobs=True),
    )
    assert (len(plain.tokens), plain.finish_reason) == (8, "length")
    assert (len(stopped.tokens), stopped.finish_reason) == (1, "stop")
    assert (len(completed.tokens), completed.finish_reason) == (3, "stop")
    assert (len(cut.tokens), cut.finish_reason) == (10, "length")
    assert (nothing.tokens, nothing.finish_reason, len(nothing.prompt_logprobs)) == ([], "length", 30)


def test_tokens_are_told_as_they_come(start: Start) -> None:
    seen: list[tuple[int, float]] = []
    generated = start().submit(GenerationRequest(PROMPT, 6), lambda *told: seen.append(told)).result(60)
    assert seen == list(zip(generated.tokens, generated.logprobs, strict=True))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest((), 5), "prompt is empty"),
        (GenerationRequest((1,) * 256, 5), "256 tokens and leaves no room in a context of 256"),
        (GenerationRequest((1, 264), 5), "token id outside 0 to 263"),
        (GenerationRequest((1,), 5, top_p=0.0), "top_p is out of range, got 0.0"),
        (GenerationRequest((1,), 5, temperature=float("nan")), "temperature is out of range"),
    ],
)
def test_what_can_never_be_served_is_refused(start: Start, request_: GenerationRequest, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start().submit(request_)


def test_too_many_waiting_are_refused(start: Start) -> None:
    engine, gate = start(max_batch=1, max_waiting=2), _Gate()
    running = engine.submit(GenerationRequest(PROMPT, 3, is_complete=gate))
    assert gate.reached.wait(30)
    waiting = [engine.submit(GenerationRequest(PROMPT, 3)) for _ in range(2)]
    assert (engine.running, engine.waiting) == (1, 2)
    with pytest.raises(QueueFull, match="limit is 2"):
        engine.submit(GenerationRequest(PROMPT, 3))
    gate.opened.set()
    assert all(len(ticket.result(60).tokens) == 3 for ticket in [running, *waiting])


def test_cancelling_frees_the_place_of_running_and_waiting(start: Start) -> None:
    engine, gate = start(max_batch=1), _Gate()
    running = engine.submit(GenerationRequest(PROMPT, 200, is_complete=gate))
    assert gate.reached.wait(30)
    waiting = engine.submit(GenerationRequest(PROMPT, 3))
    last = engine.submit(GenerationRequest(PROMPT, 3))
    assert running.cancel()
    assert waiting.cancel()
    gate.opened.set()
    assert len(last.result(60).tokens) == 3
    with pytest.raises(CancelledError):
        running.result(0)
    assert (engine.running, engine.waiting) == (0, 0)


def test_weights_are_swapped_between_sequences(start: Start, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=7)
    engine, gate = start(), _Gate()
    ask = GenerationRequest(PROMPT, 6, temperature=0.0)
    (before,) = _generate(engine, ask)
    flying = engine.submit(GenerationRequest(PROMPT, 6, temperature=0.0, is_complete=gate))
    assert gate.reached.wait(30)
    swap = threading.Thread(target=lambda: engine.load("two", lambda _: LlamaModel.load(other, "float32"), 60))
    swap.start()
    while not engine.is_loading:
        threading.Event().wait(0.01)
    queued = engine.submit(ask)
    gate.opened.set()
    swap.join(60)
    assert (flying.result(60).tokens, flying.result().version) == (before.tokens, "base")
    after = queued.result(60)
    assert (after.version, engine.version, after.cached_prompt_tokens) == ("two", "two", 0)
    assert after.tokens == _trainer_logprobs(other, (*PROMPT, *after.tokens))[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert after.tokens != before.tokens


def test_a_failed_load_keeps_the_old_weights(start: Start, tmp_path: Path) -> None:
    engine = start()
    wide = make_tiny_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(ModelError, match="cannot read"):
        engine.load("two", lambda _: LlamaModel.load(tmp_path / "nothing", "float32"), 60)
    with pytest.raises(ValueError, match="another kind of model"):
        engine.load("two", lambda _: LlamaModel.load(wide, "float32"), 60)
    (generated,) = _generate(engine, GenerationRequest(PROMPT, 3))
    assert (generated.version, engine.version, engine.is_loading) == ("base", "base", False)


def test_a_load_that_waits_too_long_never_happens(start: Start, tiny: Path) -> None:
    engine, gate = start(), _Gate()
    flying = engine.submit(GenerationRequest(PROMPT, 3, is_complete=gate))
    assert gate.reached.wait(30)
    with pytest.raises(TimeoutError, match=r"not loaded within 0\.05 s: 1 sequences"):
        engine.load("two", lambda _: LlamaModel.load(tiny, "float32"), 0.05)
    gate.opened.set()
    assert flying.result(60).version == "base"
    assert _generate(engine, GenerationRequest(PROMPT, 3))[0].version == "base"
    engine.load("three", lambda _: None, 60)
    assert engine.version == "three"


def test_an_exception_in_a_callback_fails_that_request_alone(start: Start) -> None:
    engine = start()
    other = engine.submit(GenerationRequest(PROMPT, 50))

    def broken(tokens: object) -> bool:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        engine.submit(GenerationRequest(PROMPT, 3, is_complete=broken)).result(60)
    with pytest.raises(TypeError):
        engine.submit(GenerationRequest(PROMPT, 3), lambda: None).result(60)  # type: ignore[arg-type, misc]
    assert len(other.result(60).tokens) == 50
    assert len(_generate(engine, GenerationRequest(PROMPT, 3))[0].tokens) == 3


def test_a_model_that_cannot_be_loaded_fails_the_constructor(tmp_path: Path, start: Start) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        start(tmp_path)


def test_closing_fails_what_is_unanswered(start: Start) -> None:
    engine, gate = start(max_batch=1), _Gate()
    tickets = [
        engine.submit(GenerationRequest(PROMPT, 50, is_complete=gate)),
        engine.submit(GenerationRequest(PROMPT, 3)),
    ]
    assert gate.reached.wait(30)
    threading.Timer(0.1, gate.opened.set).start()
    engine.close()
    for ticket in tickets:
        with pytest.raises(EngineClosed):
            ticket.result(30)
    with pytest.raises(EngineClosed):
        engine.submit(GenerationRequest(PROMPT, 3))
