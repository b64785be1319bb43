"""Logprobs and gradients of the chunked head and the micro-batches are those of plain autograd on the whole."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

from cookbook.backend import branches
from cookbook.backend.decoder import HuggingFaceDecoder
from cookbook.backend.trainer import compute, head
from cookbook.backend.trainer.compute import Datum, forward, forward_backward, micro_batches, top_k
from cookbook.errors import RequestRejected
from cookbook.losses import KERNELS, LossInput
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def decoder(tiny: Path) -> HuggingFaceDecoder:
    decoder = HuggingFaceDecoder.load(tiny, "float32")
    decoder.model.requires_grad_(True)
    return decoder


def make_data(kernel: str, lengths: tuple[int, ...] = (7, 19, 3, 12), seed: int = 0) -> list[Datum]:
    """Random datums; about a third of the positions is untrained, weights and advantages have both signs."""
    generator = torch.Generator().manual_seed(seed)

    def values(length: int) -> Tensor:
        keep = torch.rand(length, generator=generator) > 0.3
        return torch.randn(length, generator=generator) * 3 * keep

    data = []
    for length in lengths:
        tokens = torch.randint(260, (length + 1,), generator=generator)
        if kernel == "cross_entropy":
            inputs = {"weights": values(length)}
        else:
            inputs = {"old_logprobs": -5 * torch.rand(length, generator=generator), "advantages": values(length)}
        data.append(Datum(tokens[:-1], tokens[1:], inputs))
    return data


def reference(tiny: Path, data: list[Datum], kernel: str) -> tuple[list[Tensor], float, dict[str, Tensor]]:
    """Logprobs, loss and gradients by transformers and autograd, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    config = KERNELS[kernel].check_config({})
    logprobs, loss = [], torch.zeros(())
    for datum in data:
        row = model(datum.tokens[None]).logits[0].log_softmax(-1).gather(-1, datum.targets[:, None])[:, 0]
        loss = loss + KERNELS[kernel].formula(LossInput(row, **datum.loss_inputs), config).loss
        logprobs.append(row.detach())
    loss.backward()
    return logprobs, loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("limits", ["whole", "pieces", "recomputed"])
def test_loss_and_gradients_match_plain_autograd(
    tiny: Path, decoder: HuggingFaceDecoder, kernel: str, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limits != "whole":  # 2 rows of 12 or 7 tokens a micro-batch, 5 positions a chunk of the head
        monkeypatch.setattr(compute, "TOKENS_PER_MICRO_BATCH", 24)
        monkeypatch.setattr(head, "_LOGITS_PER_CHUNK", 5 * decoder.vocab_size)
    if limits == "recomputed":  # one chunk is kept from the forward to the backward pass, the others are not
        monkeypatch.setattr(head, "_LOGITS_KEPT", 5 * decoder.vocab_size)
    data = make_data(kernel)
    logprobs, loss, gradients = reference(tiny, data, kernel)
    result = forward_backward(decoder, data, KERNELS[kernel], KERNELS[kernel].check_config({}))
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-4)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    for name, parameter in decoder.model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-3 * gradients[name].abs().max()), name


def test_bfloat16_gradients_point_where_float32_ones_do(tiny: Path, decoder: HuggingFaceDecoder) -> None:
    data = make_data("cross_entropy")
    rounded = HuggingFaceDecoder.load(tiny, "bfloat16")
    rounded.model.requires_grad_(True)
    results = [forward_backward(d, data, KERNELS["cross_entropy"], {}) for d in (decoder, rounded)]
    assert results[0].metrics["loss:sum"] == pytest.approx(results[1].metrics["loss:sum"], rel=0.02)
    for exact, ours in zip(decoder.model.parameters(), rounded.model.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.cosine_similarity(exact.grad.flatten(), ours.grad.flatten(), dim=0) > 0.999


def test_bfloat16_compute_sees_steps_too_small_for_a_bfloat16_weight(tiny: Path) -> None:
    data, falls = make_data("cross_entropy"), []
    for dtype in ("float32", "bfloat16"):
        decoder = HuggingFaceDecoder.load(tiny, dtype)
        weights = [p for name, p in decoder.model.named_parameters() if name.endswith("proj.weight")]
        for weight in weights:
            weight.copy_(weight.bfloat16()).requires_grad_(True)
        before = forward_backward(decoder, data, KERNELS["cross_entropy"], {}).metrics["loss:sum"]
        with torch.no_grad():
            for weight in weights:  # at most a quarter of a digit
                weight.sub_(1e-3 * weight.abs() * weight.grad.sign())
        falls.append(before - forward(decoder, data, KERNELS["cross_entropy"], {}).metrics["loss:sum"])
    assert falls[1] == pytest.approx(falls[0], rel=0.2)


def test_several_targets_a_position_each_count(tiny: Path, decoder: HuggingFaceDecoder) -> None:
    targets = torch.tensor([[1, 2], [3, 3], [4, 5]])
    weights = torch.tensor([[0.5, -1.0], [2.0, 1.0], [0.0, 0.0]])
    datum = Datum(torch.tensor([10, 11, 12]), targets, {"weights": weights})
    model = AutoModelForCausalLM.from_pretrained(tiny)
    expected = model(datum.tokens[None]).logits[0].log_softmax(-1).gather(-1, targets)
    (-(weights * expected).sum()).backward()
    result = forward_backward(decoder, [datum], KERNELS["cross_entropy"], {})
    assert torch.allclose(result.logprobs[0], expected, atol=1e-4)
    assert (result.num_loss_tokens, result.num_sequences) == (4, 1)
    ours, theirs = decoder.model.model.norm.weight.grad, model.model.norm.weight.grad
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_both_passes_of_a_client_side_loss_see_the_same_logprobs(decoder: HuggingFaceDecoder) -> None:
    trained = make_data("cross_entropy", (20, 30, 5))
    untrained = [Datum(d.tokens, d.targets, {"weights": torch.zeros(len(d.tokens))}) for d in trained]
    first = forward(decoder, untrained, KERNELS["cross_entropy"], {})
    second = forward_backward(decoder, trained, KERNELS["cross_entropy"], {})
    for one, two in zip(first.logprobs, second.logprobs, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_same_data_gives_the_same_bits(decoder: HuggingFaceDecoder) -> None:
    data = make_data("cross_entropy", (20, 30, 5))
    runs = []
    for _ in range(2):
        decoder.model.zero_grad(set_to_none=True)
        result = forward_backward(decoder, data, KERNELS["cross_entropy"], {})
        runs.append([*result.logprobs, *(parameter.grad for parameter in decoder.model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_untrained_datum_adds_no_gradient_and_counts_nothing(decoder: HuggingFaceDecoder) -> None:
    datum = Datum(torch.tensor([1, 2]), torch.tensor([2, 3]), {"weights": torch.zeros(2)})
    result = forward_backward(decoder, [datum], KERNELS["cross_entropy"], {})
    assert (result.num_loss_tokens, result.num_sequences, result.metrics["loss:sum"]) == (0, 0, 0.0)
    assert all(parameter.grad is None for parameter in decoder.model.parameters())


def test_metric_keys_say_how_chunks_are_combined(decoder: HuggingFaceDecoder) -> None:
    result = forward(decoder, make_data("ppo"), KERNELS["ppo"], KERNELS["ppo"].check_config({}))
    assert set(result.metrics) == {"loss:sum", "num_loss_tokens:sum", "num_sequences:sum", "clipped_tokens:sum"}


def test_top_k_is_the_head_of_the_sorted_distribution(tiny: Path, decoder: HuggingFaceDecoder) -> None:
    data = make_data("cross_entropy", (4, 9))
    result = top_k(decoder, data, 3)
    with torch.no_grad():
        expected = decoder.model(data[1].tokens[None]).logits[0].log_softmax(-1).topk(3)
    assert torch.equal(result.indices[1], expected.indices)
    assert torch.allclose(result.logprobs[1], expected.values, atol=1e-4)


def test_result_that_is_not_finite_is_refused(decoder: HuggingFaceDecoder) -> None:
    with torch.no_grad():
        decoder.model.model.norm.weight.mul_(float("nan"))
    with pytest.raises(RequestRejected, match="datum 0 has a cross_entropy loss of nan"):
        forward_backward(decoder, make_data("cross_entropy", (3,)), KERNELS["cross_entropy"], {})


def test_micro_batches_keep_the_budget_and_every_row() -> None:
    lengths = [3, 50, 10, 10, 9, 200, 1]
    groups = micro_batches(lengths, 60)
    assert sorted(row for group in groups for row in group) == list(range(7))
    assert groups == [[5], [1], [2, 3, 4, 0, 6]]
    assert all(len(group) == 1 or len(group) * max(lengths[row] for row in group) <= 60 for group in groups)


def make_groups(sizes: tuple[tuple[int, tuple[int, ...]], ...], seed: int = 0) -> list[Datum]:
    """Datums for ppo: for each size a prompt of that many tokens, with completions of these lengths; shuffled."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for prompt_length, lengths in sizes:
        prompt = torch.randint(260, (prompt_length,), generator=generator)
        for length in lengths:
            tokens = torch.cat([prompt, torch.randint(260, (length,), generator=generator)])
            is_completion = torch.arange(1, len(tokens)) >= prompt_length
            inputs = {
                "old_logprobs": -5 * torch.rand(len(tokens) - 1, generator=generator) * is_completion,
                "advantages": torch.randn(1, generator=generator) * is_completion,
            }
            data.append(Datum(tokens[:-1], tokens[1:], inputs))
    return [data[row] for row in torch.randperm(len(data), generator=generator).tolist()]


GROUPS = ((20, (6, 9, 2, 12)), (31, (5, 5, 5)), (3, (17,)), (40, (2, 30)))


def count_positions(decoder: HuggingFaceDecoder) -> list[int]:
    """Filled with the number of positions of each pass through the transformer."""
    counts: list[int] = []
    transformer = decoder.model.model

    def count(module: object, arguments: object, keywords: dict[str, Tensor]) -> None:
        counts.append(keywords["input_ids"].numel())

    transformer.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("limits", ["whole", "pieces"])
def test_completions_of_one_prompt_give_the_same_gradients_with_the_prompt_computed_once(
    tiny: Path, decoder: HuggingFaceDecoder, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limits == "pieces":  # groups are cut, and so is the head; long prefixes have another attention
        monkeypatch.setattr(branches, "_MAX_EXPLICIT", 35)
        monkeypatch.setattr(compute, "TOKENS_PER_MICRO_BATCH", 40)
        monkeypatch.setattr(head, "_LOGITS_PER_CHUNK", 5 * decoder.vocab_size)
    data = make_groups(GROUPS)
    logprobs, loss, gradients = reference(tiny, data, "ppo")
    counts = count_positions(decoder)
    result = forward_backward(decoder, data, KERNELS["ppo"], KERNELS["ppo"].check_config({}))
    if limits == "whole":
        assert sum(counts) == sum(len(d.tokens) for d in data) - 3 * 20 - 2 * 31 - 40
    assert sum(counts) < sum(len(d.tokens) for d in data)
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for name, parameter in decoder.model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5 * gradients[name].abs().max()), name


def test_shared_and_unshared_passes_agree_in_bfloat16_as_far_as_bfloat16_goes(tiny: Path) -> None:
    data, runs = make_groups(GROUPS), []
    for shares in (True, False):
        decoder = HuggingFaceDecoder.load(tiny, "bfloat16")
        assert decoder.shares_prefixes
        decoder.shares_prefixes = shares
        decoder.model.requires_grad_(True)
        result = forward_backward(decoder, data, KERNELS["ppo"], KERNELS["ppo"].check_config({}))
        runs.append((torch.cat(result.logprobs), [p.grad.flatten() for p in decoder.model.parameters()]))
    assert (runs[0][0] - runs[1][0]).abs().max() < 0.05
    for one, two in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.cosine_similarity(one, two, dim=0) > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_without_a_large_common_prefix_give_the_same_bits_as_without_sharing(tiny: Path, dtype: Any) -> None:
    data = make_data("cross_entropy", (20, 30, 5, 30))
    system = torch.arange(6)  # as a short system prompt: too small a share of each row
    data = [
        Datum(torch.cat([system, d.tokens]), torch.cat([system, d.targets]), {"weights": torch.ones(len(d.tokens) + 6)})
        for d in data
    ]
    runs = []
    for shares in (True, False):
        decoder = HuggingFaceDecoder.load(tiny, dtype)
        if not shares:
            decoder.shares_prefixes = False
            decoder.model.set_attn_implementation("sdpa")
        decoder.model.requires_grad_(True)
        result = forward_backward(decoder, data, KERNELS["cross_entropy"], {})
        runs.append([*result.logprobs, *(parameter.grad for parameter in decoder.model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_weights_rounded_once_a_request_give_the_same_bits_and_are_rounded_anew_in_the_next(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "TOKENS_PER_MICRO_BATCH", 24)
    data = make_data("cross_entropy")
    decoder = HuggingFaceDecoder.load(tiny, "bfloat16")
    decoder.model.requires_grad_(True)
    runs = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(decoder, "fixed_weights", nullcontext)
        decoder.model.zero_grad(set_to_none=True)
        result = forward_backward(decoder, data, KERNELS["cross_entropy"], {})
        runs.append([*result.logprobs, *(parameter.grad for parameter in decoder.model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    monkeypatch.undo()
    with torch.no_grad():
        decoder.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    changed = forward(decoder, data, KERNELS["cross_entropy"], {})
    assert not torch.allclose(changed.logprobs[0], runs[0][0], atol=1e-3)


def test_windowed_attention_is_not_taken_for_plain_attention(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    decoder = HuggingFaceDecoder(AutoModelForCausalLM.from_config(config), "float32")
    decoder.share_prefixes()
    assert not decoder.shares_prefixes


def test_attention_that_is_found_different_by_a_try_is_not_replaced(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for layer in model.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, plain=plain, forest=None, **kwargs: plain(*args, **kwargs)
    decoder = HuggingFaceDecoder(model, "float32")
    decoder.share_prefixes()
    assert not decoder.shares_prefixes
    assert model.config._attn_implementation == "sdpa"
