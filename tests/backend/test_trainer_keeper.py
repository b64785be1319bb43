"""A forward pass that a backward pass follows is made once, and every result has the bits of two passes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from cookbook.backend.trainer import compute
from cookbook.errors import RequestRejected
from tests.backend.trainer_job import TrainerJob, datum, same
from tests.tiny_model import make_tiny_model

PROMPT = "which is the larger number, 31 or 13? "
TEXTS = [PROMPT + "the larger one is 31", PROMPT + "13", "another prompt altogether: yes, it is", "and another one: no"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def masks(texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    """Datums of a custom loss's forward pass: weight 1 on the last five targets."""
    return [datum(text, [0.0] * (len(text) - 6) + [1.0] * 5) for text in texts]


def gradients_of(texts: list[str] = TEXTS, first: float = -0.5) -> list[dict[str, Any]]:
    """Datums of its backward pass."""
    return [datum(text, [0.0] * (len(text) - 6) + [first, 0.25, -1.5, 2.0, 0.125]) for text in texts]


class Passes:
    """Every pass of a model's transformer: whether it was made with a graph."""

    def __init__(self, job: TrainerJob, model: str) -> None:
        self.with_graph: list[bool] = []
        transformer = job.store.use(model).decoder.model.model
        transformer.register_forward_hook(
            lambda module, inputs, output: self.with_graph.append(output.last_hidden_state.requires_grad)
        )


def make(tmp_path: Path, tiny: Path, name: str, rank: int, dtype: str) -> tuple[TrainerJob, str]:
    job = TrainerJob(tmp_path, tiny, f"job-{name}", lora_rank=rank, extra_args=["--compute-dtype", dtype])
    return job, job.create(rank, seed=1)


@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (0, "bfloat16"), (4, "bfloat16")])
@pytest.mark.parametrize("limits", ["whole", "pieces"])
def test_backward_pass_after_its_forward_pass_gives_the_bits_of_one_by_itself(
    tmp_path: Path, tiny: Path, rank: int, dtype: str, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limits == "pieces":  # of two micro-batches the first one is kept
        monkeypatch.setattr(compute, "TOKENS_PER_MICRO_BATCH", 40)
        monkeypatch.setattr(compute, "_POSITIONS_KEPT", 40)
    job, model = make(tmp_path, tiny, "a", rank, dtype)
    passes = Passes(job, model)
    job.train(model, gradients_of(), 1)  # an adapter that is not zero
    alone = job.forward_backward(model, gradients_of())
    expected = job.gradients(model)
    job.step(model, learning_rate=0.0)
    passes.with_graph.clear()
    first = job.forward(model, masks())
    second = job.forward_backward(model, gradients_of())
    again = [] if limits == "whole" else [True]
    assert passes.with_graph == [True, not again, *again]
    assert same(job.gradients(model), expected)
    outputs = [[list(o["logprobs"]["data"]) for o in answer["loss_fn_outputs"]] for answer in (alone, first, second)]
    assert outputs[0] == outputs[1] == outputs[2]
    assert second["metrics"] == alone["metrics"]


def test_a_small_micro_batch_after_one_that_was_not_kept_gives_the_same_bits(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each_alone = functools.partial(compute.micro_batches, budget=1)  # the longest first
    monkeypatch.setattr(compute, "micro_batches", each_alone)
    monkeypatch.setattr(compute, "_POSITIONS_KEPT", 100)
    texts = [letter * length for letter, length in (("a", 60), ("b", 50), ("c", 20))]
    job, model = make(tmp_path, tiny, "a", 0, "float32")
    passes = Passes(job, model)
    job.forward_backward(model, gradients_of(texts))
    expected = job.gradients(model)
    job.step(model, learning_rate=0.0)
    passes.with_graph.clear()
    job.forward(model, masks(texts))
    assert passes.with_graph == [True, False, False]
    job.forward_backward(model, gradients_of(texts))
    assert same(job.gradients(model), expected)


def test_other_trained_targets_are_computed_from_the_same_pass(tmp_path: Path, tiny: Path) -> None:
    job, model = make(tmp_path, tiny, "a", 0, "bfloat16")
    passes = Passes(job, model)
    job.forward_backward(model, gradients_of(first=0.0))
    expected = job.gradients(model)
    job.step(model, learning_rate=0.0)
    job.forward(model, masks())
    passes.with_graph.clear()
    job.forward_backward(model, gradients_of(first=0.0))
    assert passes.with_graph == []
    assert same(job.gradients(model), expected)


@pytest.mark.parametrize("between", ["optim_step", "load_weights", "other data"])
def test_pass_at_other_weights_or_of_other_data_is_never_used(tmp_path: Path, tiny: Path, between: str) -> None:
    runs = []
    for keeps in (True, False):
        job, model = make(tmp_path, tiny, f"job-{keeps}".lower(), 0, "float32")
        job.run("save_weights", model, path="start")
        job.train(model, gradients_of(), 1)
        job.forward_backward(model, gradients_of())
        if keeps:
            job.forward(model, masks())
        if between == "optim_step":
            job.step(model)
        elif between == "load_weights":
            job.run("load_weights", model, path="start")
        job.forward_backward(model, gradients_of(TEXTS[::-1] if between == "other data" else TEXTS))
        runs.append(job.gradients(model))
    assert same(*runs)


def test_passes_that_no_backward_pass_follows_are_made_without_a_graph(tmp_path: Path, tiny: Path) -> None:
    job, model = make(tmp_path, tiny, "a", 0, "float32")
    passes = Passes(job, model)
    for _ in range(3):
        job.forward(model, masks(TEXTS[2:]))
    assert passes.with_graph == [True, False, False]
    passes.with_graph.clear()
    for _ in range(2):  # the first backward pass finds no graph, the second does
        job.forward(model, masks(TEXTS[2:]))
        job.forward_backward(model, gradients_of(TEXTS[2:]))
    assert passes.with_graph == [False, True, True]


def test_reference_on_the_same_base_does_not_disturb_the_pass(tmp_path: Path, tiny: Path) -> None:
    runs = []
    for interleaved in (True, False):
        job, model = make(tmp_path, tiny, f"job-{interleaved}".lower(), 4, "bfloat16")
        reference = job.create_reference()
        job.train(model, gradients_of(), 1)
        passes = Passes(job, model)
        if interleaved:
            job.forward(model, masks())
            job.forward(reference, masks())
            assert passes.with_graph == [True, True, False, False]
        job.forward_backward(model, gradients_of())
        assert len(passes.with_graph) == (4 if interleaved else 2)
        runs.append(job.gradients(model))
    assert same(*runs)


def test_pass_is_freed_with_its_model(tmp_path: Path, tiny: Path) -> None:
    job, model = make(tmp_path, tiny, "a", 4, "float32")
    job.forward(model, masks())
    keeper = job.store.use(model).keeper
    assert keeper._last is not None
    job.run("save_weights", model, path="state-1")
    assert keeper._last is None


def test_failed_backward_pass_leaves_nothing_of_the_pass(tmp_path: Path, tiny: Path) -> None:
    job, model = make(tmp_path, tiny, "a", 0, "float32")
    job.forward(model, masks())
    with pytest.raises(RequestRejected, match="nothing was added to the gradients"):
        job.forward_backward(model, gradients_of(first=3e38))
    job.forward_backward(model, gradients_of())
    expected = job.gradients(model)
    job.step(model, learning_rate=0.0)
    job.forward_backward(model, gradients_of())
    assert same(job.gradients(model), expected)
    assert all(torch.isfinite(gradient).all() for gradient in expected.values() if gradient is not None)
