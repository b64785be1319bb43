"""What operations do to a model: steps, accumulation, refusals, isolation of models from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cookbook.errors import CookbookError, RequestRejected
from tests.backend.trainer_job import TrainerJob, datum, same
from tests.tiny_model import make_tiny_model

DATA = [datum("the quick brown fox"), datum("jumps", [0.5, -1.0, 0.0, 2.0])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> TrainerJob:
    return TrainerJob(tmp_path, tiny)


@pytest.fixture
def lora_job(tmp_path: Path, tiny: Path) -> TrainerJob:
    return TrainerJob(tmp_path, tiny, lora_rank=4)


def test_first_step_follows_adamw_by_hand(job: TrainerJob) -> None:
    model = job.create()
    before = job.weights(model)
    job.forward_backward(model, DATA)
    gradients = job.gradients(model)
    metrics = job.step(model, learning_rate=0.1, weight_decay=0.5, eps=1e-3)
    # After bias correction the first moments are g and g^2: w <- w (1 - lr wd) - lr g / (|g| + eps)
    for name, weight in job.weights(model).items():
        gradient = gradients[name]
        expected = before[name] * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-3)
        assert torch.allclose(weight, expected, atol=1e-6), name
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (metrics["lr"], metrics["num_loss_tokens"], metrics["num_sequences"]) == (0.1, 18 + 3, 2)


@pytest.mark.parametrize(
    ("normalization", "divisor"), [(None, 1), ("none", 1), ("num_loss_tokens", 21), ("num_sequences", 2)]
)
def test_normalization_divides_the_gradient_before_clipping(
    job: TrainerJob, normalization: str | None, divisor: int
) -> None:
    model = job.create()
    job.forward_backward(model, DATA)
    norm = torch.cat([gradient.flatten() for gradient in job.gradients(model).values()]).norm().item()
    metrics = job.step(model, normalization, grad_clip_norm=norm / 4)
    assert metrics["grad_norm"] == pytest.approx(norm / divisor, rel=1e-5)
    assert metrics["grad_norm_post_clip"] == pytest.approx(min(norm / divisor, norm / 4), rel=1e-5)


def test_clipping_scales_the_update_of_the_moments(job: TrainerJob) -> None:
    model = job.create()
    job.forward_backward(model, DATA)
    gradients = job.gradients(model)
    norm = job.step(model, grad_clip_norm=0.5)["grad_norm"]
    moments = job.store.use(model).optimizer.moments()
    expected = gradients["model.norm.weight"] * (0.5 / norm) * 0.1
    assert torch.allclose(moments["exp_avg.model.norm.weight"], expected, rtol=1e-4, atol=1e-9)


def test_gradients_of_two_requests_add_up_to_those_of_one(job: TrainerJob) -> None:
    model = job.create()
    job.forward_backward(model, DATA)
    together = job.gradients(model)
    job.store.use(model).drop_gradients()
    job.forward_backward(model, DATA[:1])
    job.forward_backward(model, DATA[1:])
    for name, gradient in job.gradients(model).items():
        assert torch.allclose(gradient, together[name], atol=1e-4)
    assert job.step(model, "num_sequences")["num_sequences"] == 2


def test_step_clears_the_gradients_and_the_counts(job: TrainerJob) -> None:
    model = job.create()
    job.train(model, DATA, 1)
    assert all(gradient is None for gradient in job.gradients(model).values())
    job.forward_backward(model, DATA[:1])
    assert job.step(model)["num_sequences"] == 1


def test_failed_forward_backward_contributes_nothing(job: TrainerJob) -> None:
    model = job.create()
    job.forward_backward(model, DATA)
    gradients = job.gradients(model)
    fine = datum("a fine one", None, logprobs=[-5.0] * 9, advantages=[1.0] * 9)
    too_large = datum("abc", None, logprobs=[-30.0, -30.0], advantages=[3e38, 3e38])
    with pytest.raises(RequestRejected, match=r"datum 1 has a importance_sampling loss of -inf"):
        job.forward_backward(model, [fine, too_large], "importance_sampling")
    assert same(job.gradients(model), gradients)
    assert job.step(model)["num_sequences"] == 2


def test_step_without_gradients_is_refused(job: TrainerJob) -> None:
    model = job.create()
    with pytest.raises(RequestRejected, match="optim_step without a gradient"):
        job.step(model)


def test_step_after_untrained_data_decays_the_moments_only(job: TrainerJob) -> None:
    model = job.create()
    job.forward_backward(model, [datum("abc", [0.0, 0.0])])
    before = job.weights(model)
    assert job.step(model, "num_loss_tokens")["grad_norm"] == 0.0
    assert same(job.weights(model), before)


def test_gradient_that_is_not_finite_makes_no_step(job: TrainerJob) -> None:
    model = job.create()
    before = job.weights(model)
    job.forward_backward(model, DATA)
    job.store.use(model).parameters["model.norm.weight"].grad[3] = float("inf")
    with pytest.raises(RequestRejected, match="norm of the accumulated gradient is inf"):
        job.step(model)
    assert same(job.weights(model), before)
    with pytest.raises(RequestRejected, match="without a gradient"):
        job.step(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be at least 0 and finite, got -1.0"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"eps": "small"}, "eps must be int or float, got 'small'"),
    ],
)
def test_bad_hyper_parameters_are_named(job: TrainerJob, change: dict[str, Any], message: str) -> None:
    model = job.create()
    job.forward_backward(model, DATA)
    with pytest.raises(RequestRejected, match=message):
        job.step(model, **change)


def test_unknown_normalization_is_refused(job: TrainerJob) -> None:
    with pytest.raises(RequestRejected, match="one of none, num_loss_tokens, num_sequences, got 'mean'"):
        job.step(job.create(), "mean")


def test_lora_trains_only_the_adapter_and_starts_at_the_base(lora_job: TrainerJob) -> None:
    reference, model = lora_job.create_reference(), lora_job.create(4)
    base = lora_job.forward(reference, DATA)["metrics"]["loss:sum"]
    assert lora_job.forward(model, DATA)["metrics"]["loss:sum"] == pytest.approx(base, rel=1e-6)
    lora_job.train(model, DATA[:1], 5)
    assert lora_job.forward(model, DATA[:1])["metrics"]["loss:sum"] < base * 0.8
    assert lora_job.forward(reference, DATA)["metrics"]["loss:sum"] == base


def test_models_do_not_see_each_other(lora_job: TrainerJob) -> None:
    alone = lora_job.create(4, seed=7)
    lora_job.train(alone, DATA, 3)
    first, other, reference = lora_job.create(4, seed=7), lora_job.create(4, seed=8), lora_job.create_reference()
    for _ in range(3):
        lora_job.forward_backward(first, DATA)
        lora_job.forward_backward(other, DATA[:1])
        lora_job.forward(reference, DATA)
        lora_job.step(other)
        lora_job.step(first, "num_loss_tokens")
    assert same(lora_job.weights(first), lora_job.weights(alone))
    assert not same(lora_job.weights(first), lora_job.weights(other))


def test_removed_model_leaves_the_others_and_the_base(lora_job: TrainerJob) -> None:
    first, second = lora_job.create(4), lora_job.create(4)
    lora_job.train(second, DATA, 1)
    before = lora_job.forward(second, DATA)["metrics"]
    lora_job.run("unload_model", first)
    assert lora_job.forward(second, DATA)["metrics"] == before
    lora_job.run("unload_model", second)
    reference = lora_job.create_reference()
    assert not [name for name, _ in lora_job.store.use(reference).decoder.model.named_parameters() if "lora_A." in name]


def test_seed_and_init_method_fix_the_adapter(lora_job: TrainerJob) -> None:
    one, again = lora_job.create(4, seed=1), lora_job.create(4, seed=1)
    nora = lora_job.create(4, seed=1, init_method="nora")
    assert same(lora_job.weights(one), lora_job.weights(again))
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    a = lora_job.weights(one)[name]
    assert torch.allclose(lora_job.weights(nora)[name], a / a.norm(dim=0))


@pytest.mark.parametrize(
    ("switch", "layers"),
    [
        ("train_attn", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("train_mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("train_unembed", {"lm_head"}),
    ],
)
def test_each_group_of_layers_can_be_adapted_alone(lora_job: TrainerJob, switch: str, layers: set[str]) -> None:
    groups = {"train_attn": False, "train_mlp": False, "train_unembed": False, switch: True}
    model = lora_job.create(4, **groups)
    assert {name.split(".lora_")[0].split(".")[-1] for name in lora_job.weights(model)} == layers
    before = lora_job.weights(model)
    lora_job.train(model, DATA, 1)
    assert not same(lora_job.weights(model), before)


def test_alpha_scales_the_adapter(lora_job: TrainerJob) -> None:
    losses = []
    for alpha in (4, 40):
        model = lora_job.create(4, alpha=alpha)
        adapter = {name: torch.full_like(weight, 0.01) for name, weight in lora_job.weights(model).items()}
        lora_job.store.use(model).set_weights(adapter)
        losses.append(lora_job.forward(model, DATA)["metrics"]["loss:sum"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"base_model": "other", "lora_config": {"rank": 4}}, "base_model is 'other', this trainer job was created"),
        ({"lora_config": {"rank": 8}}, "lora rank is 8, this trainer job was created with lora_rank 4"),
        ({"lora_config": {"rank": 4, "init_method": "zero"}}, "init_method must be kaiming or nora, got 'zero'"),
        ({"lora_config": {"rank": 4, "alpha": 0}}, "alpha must be at least 1"),
        ({"lora_config": {"rank": True}}, "rank"),
        ({}, "lora_config is missing"),
        ({"lora_config": {"rank": 4}, "projection_head_dim": 8}, "projection_head_dim is not supported"),
    ],
)
def test_models_that_the_job_is_not_for_are_refused(lora_job: TrainerJob, body: dict[str, Any], message: str) -> None:
    with pytest.raises(CookbookError, match=message):
        lora_job.run("create_model", "model-x", **({"base_model": "accounts/local/models/tiny"} | body))
    with pytest.raises(RequestRejected, match="model-x was not created"):
        lora_job.forward("model-x", DATA)


def test_reference_and_forward_only_models_cannot_be_trained(tmp_path: Path, tiny: Path, job: TrainerJob) -> None:
    forward_only = TrainerJob(tmp_path, tiny, "job-f", forward_only=True)
    for owner, model in ((job, job.create_reference()), (forward_only, forward_only.create())):
        owner.forward(model, DATA)
        with pytest.raises(RequestRejected, match="forward_backward on a model that is only for forward"):
            owner.forward_backward(model, DATA)
        with pytest.raises(RequestRejected, match="optim_step on a model that is only for forward"):
            owner.step(model)


def test_forward_gives_top_k_on_request(job: TrainerJob) -> None:
    output = job.forward(job.create(), DATA, top_k=3)["loss_fn_outputs"][1]
    assert output["top_k_logprobs"]["shape"] == output["top_k_indices"]["shape"] == [4, 3]
    assert (output["top_k_logprobs"]["dtype"], output["top_k_indices"]["dtype"]) == ("float32", "int64")


def change(**fields: Any) -> dict[str, Any]:
    """A good datum of 4 tokens with some of its parts replaced."""
    base = datum("abcde")
    tokens = fields.pop("tokens", None)
    if tokens is not None:
        base["model_input"] = {"chunks": [{"type": "encoded_text", "tokens": tokens}]}
    base["loss_fn_inputs"] |= fields.pop("inputs", {})
    return base | fields


def tensor(data: Any, **fields: Any) -> dict[str, Any]:
    return {"data": data, "dtype": "float32", **fields}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (change(tokens=[1, 2, 3, 264]), r"data\[0\]\.model_input\[3\] is 264, outside the vocabulary 0\.\.263"),
        (change(tokens=[1, 2, 3]), r"target_tokens has shape \(4,\), model_input 3 tokens"),
        (change(tokens=[1, 2, "x", 4]), "element 2 is 'x'"),
        (change(tokens=[1, 2.5, 3, 4]), "flat list of whole numbers; element 1 is 2.5"),
        (change(tokens=[1, [2], 3, 4]), r"element 1 is \[2\]"),
        (change(tokens=[]), "has 0 tokens, this trainer takes 1 to 256"),
        (change(tokens=[1] * 257), "has 257 tokens, this trainer takes 1 to 256"),
        (change(model_input={"chunks": [{"type": "image", "data": ""}]}), "a chunk of type 'image'"),
        (change(model_input=None), "model_input must hold chunks, got None"),
        (change(inputs={"target_tokens": tensor([1, 2, 3, -100])}), r"target_tokens\[3\] is -100"),
        (change(inputs={"weights": tensor([1.0, 1.0])}), r"weights has shape \(2,\), target_tokens \(4,\)"),
        (change(inputs={"weights": tensor([1.0, None, 1.0, 1.0])}), "element 1 is None"),
        (change(inputs={"weights": tensor([1.0, 1e39, 1.0, 1.0])}), r"weights\[1\] is 1e\+39, too large for float32"),
        (change(inputs={"weights": tensor([1.0] * 4, shape=[2, 3])}), "has 4 numbers, its shape"),
        (change(inputs={"weights": tensor([1.0] * 4, shape=["4"])}), "shape must be a list of sizes"),
        (change(inputs={"weights": tensor([1.0], shape=[2, 2], sparse_crow_indices=[0, 9, 1], sparse_col_indices=[0])}),
         "not a valid CSR tensor"),
        (change(inputs={"mask": tensor([1.0] * 4)}), "has mask, which the loss cross_entropy does not take"),
        (change(loss_fn_inputs={}), "must hold target_tokens"),
        ("text", r"data\[0\] must be an object, got 'text'"),
    ],
)  # fmt: skip
def test_bad_datums_are_named_with_field_and_value(job: TrainerJob, bad: Any, message: str) -> None:
    with pytest.raises(RequestRejected, match=message):
        job.forward_backward(job.create(), [bad])


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("huber", {}, "loss_fn 'huber' is not known here. Use one of cispo, cross_entropy"),
        ("cross_entropy", {"top_k": 3}, "top_k: is not a config key of the loss cross_entropy. Allowed keys: none"),
        ("ppo", {}, "lacks advantages, which the loss ppo needs"),
    ],
)
def test_bad_losses_are_named(job: TrainerJob, loss_fn: str, config: dict[str, Any], message: str) -> None:
    data = [datum("abc") | {"loss_fn_inputs": {"target_tokens": tensor([1, 2])}}]
    with pytest.raises(CookbookError, match=message):
        job.forward_backward(job.create(), data, loss_fn, **config)


def test_no_data_is_refused(job: TrainerJob) -> None:
    with pytest.raises(RequestRejected, match="data is empty"):
        job.forward_backward(job.create(), [])


def test_sparse_weights_are_the_dense_ones(job: TrainerJob) -> None:
    model = job.create()
    targets = {"data": [1, 2, 3, 4], "dtype": "int64", "shape": [2, 2]}
    sparse = tensor([5.0, 7.0], shape=[2, 2], sparse_crow_indices=[0, 1, 2], sparse_col_indices=[1, 0])
    dense = tensor([0.0, 5.0, 7.0, 0.0], shape=[2, 2])
    losses = [
        job.forward(model, [change(tokens=[8, 9], inputs={"target_tokens": targets, "weights": weights})])["metrics"]
        for weights in (sparse, dense)
    ]
    assert losses[0] == losses[1]
    assert losses[0]["num_loss_tokens:sum"] == 2


def test_weights_left_out_count_every_target(job: TrainerJob) -> None:
    without = datum("abc") | {"loss_fn_inputs": {"target_tokens": tensor([98, 99])}}
    model = job.create()
    assert job.forward(model, [without])["metrics"] == job.forward(model, [datum("abc")])["metrics"]
