"""The unmodified official SDK, and plain HTTP where the SDK cannot misbehave, against a real trainer worker."""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fireworks.training.sdk import (
    AdamParams,
    Datum,
    FiretitanServiceClient,
    GradAccNormalization,
    ModelInput,
    RequestFailedError,
)

from cookbook.backend.snapshots import load_manifest, verify
from tests.backend.trainer_job import ADAM, datum
from tests.tiny_model import make_tiny_model
from tests.wire.trainer_process import BASE_MODEL, TOKEN, Trainer, spawn, trainer, write_spec

pytestmark = pytest.mark.timeout(240)

TEXTS = ("the quick brown fox", "jumps over", "the lazy dog")
CROSS_ENTROPY = {"loss_fn": "cross_entropy", "data": [datum(text) for text in TEXTS]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Trainer]:
    """One worker of a full-parameter job for the tests that leave it as they found it."""
    with trainer(tmp_path_factory.mktemp("home") / "job-a", tiny) as running:
        yield running


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Trainer]:
    with trainer(tmp_path_factory.mktemp("home") / "job-l", tiny, lora_rank=4) as running:
        yield running


@pytest.fixture
def service(full: Trainer) -> Iterator[FiretitanServiceClient]:
    client = FiretitanServiceClient(base_url=full.base_url, api_key=TOKEN)
    yield client
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 10  # 30 s when telemetry is not accepted


def sdk_datum(text: str, **inputs: list[float]) -> Datum:
    tokens = list(text.encode())
    loss_inputs = inputs or {"weights": [1.0] * (len(tokens) - 1)}
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **loss_inputs},
    )


def test_sdk_trains_saves_and_resumes(service: FiretitanServiceClient) -> None:
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    data = [sdk_datum(text) for text in TEXTS]
    losses = []
    for _ in range(3):
        gradient = client.forward_backward(data, "cross_entropy")
        step = client.optim_step(AdamParams(learning_rate=1e-2), GradAccNormalization.NUM_LOSS_TOKENS)
        losses.append(gradient.result(60).metrics["loss:sum"])
        metrics = step.result(60).metrics
    assert losses[2] < losses[1] < losses[0]
    assert {"grad_norm", "lr", "num_loss_tokens", "num_sequences"} <= set(metrics)
    assert (metrics["num_loss_tokens"], metrics["num_sequences"]) == (18 + 9 + 11, 3)
    assert client.save_state("step-3").result(60).path == "step-3"
    saved_at = client.forward(data, "cross_entropy").result(60)
    client.forward_backward(data, "cross_entropy").result(60)
    client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    assert client.list_checkpoints() == ["step-3"]
    for load in (client.load_state, client.load_state_with_optimizer):
        load("step-3").result(60)
        assert client.forward(data, "cross_entropy").result(60).metrics == saved_at.metrics
    assert client.resolve_checkpoint_path("step-3", "job-a") == "cross_job://job-a/step-3"
    client.load_state_with_optimizer("cross_job://job-a/step-3").result(60)
    first, second = client.save_weights_for_sampler_ext("s"), client.save_weights_for_sampler_ext("t")
    assert (first.path, second.path) == (first.snapshot_name, second.snapshot_name)
    assert service.get_server_capabilities().supported_models[0].max_context_length == 256
    assert client.get_info().model_data.tokenizer_id is not None
    assert client.unload_model().result(60).model_id
    with pytest.raises(Exception, match="unload"):
        client.forward(data, "cross_entropy").result(60)


def test_sampler_saves_are_labelled_base_then_delta(full: Trainer, service: FiretitanServiceClient) -> None:
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    names = [client.save_weights_for_sampler_ext(name).path for name in ("u", "v")]
    folder = full.job_dir.parent / "checkpoints" / "job-a" / "sampler"
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in names]
    assert [manifest["checkpoint_type"] for manifest in manifests] == ["base", "delta"]


def test_sdk_custom_loss_has_the_gradient_of_the_same_loss_on_the_server(service: FiretitanServiceClient) -> None:
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    data = [sdk_datum("the quick"), sdk_datum("brown fox")]
    bare = [Datum(model_input=d.model_input, loss_fn_inputs={"target_tokens": d.loss_fn_inputs["target_tokens"]})
            for d in data]  # fmt: skip

    def loss(_: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return 0.5 * logprobs[0].sum() - 2.0 * logprobs[1].sum(), {"mine:sum": 7.0}

    custom = client.forward_backward_custom(bare, loss).result(60)
    norm = client.optim_step(AdamParams(learning_rate=0.0)).result(60).metrics["grad_norm"]
    same = [sdk_datum("the quick", weights=[-0.5] * 8), sdk_datum("brown fox", weights=[2.0] * 8)]
    direct = client.forward_backward(same, "cross_entropy").result(60)
    assert client.optim_step(AdamParams(learning_rate=0.0)).result(60).metrics["grad_norm"] == pytest.approx(norm, 1e-6)
    assert custom.metrics["mine:sum"] == 7.0
    assert custom.metrics["loss:sum"] == pytest.approx(direct.metrics["loss:sum"], rel=1e-5)
    precomputed = client.forward(bare, "cross_entropy").result(60)
    client.forward_backward_custom(bare, loss, precomputed_forward=precomputed).result(60)
    assert client.optim_step(AdamParams(learning_rate=0.0)).result(60).metrics["grad_norm"] == pytest.approx(norm, 1e-6)


def test_sdk_reference_stays_at_the_base_weights(service: FiretitanServiceClient) -> None:
    policy = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    reference = service.create_reference_client(base_model=BASE_MODEL)
    other = policy.create_base_training_client(base_model=BASE_MODEL)
    data = [sdk_datum(text) for text in TEXTS]
    before = reference.forward(data, "cross_entropy").result(60).metrics["loss:sum"]
    policy.forward_backward(data, "cross_entropy").result(60)
    policy.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    assert policy.forward(data, "cross_entropy").result(60).metrics["loss:sum"] < before
    for frozen in (reference, other):
        assert frozen.forward(data, "cross_entropy").result(60).metrics["loss:sum"] == before
        with pytest.raises(RequestFailedError, match="only for forward"):
            frozen.forward_backward(data, "cross_entropy").result(60)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "dapo", "gspo"])
def test_sdk_policy_losses_run_with_metrics_that_can_be_combined(service: FiretitanServiceClient, loss_fn: Any) -> None:
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    data = [sdk_datum("abcd", logprobs=[-5.0, -5.0, -5.0], advantages=[1.0, 0.0, -1.0])]
    result = client.forward_backward(data, loss_fn).result(60)
    assert all(key.count(":") == 1 for key in result.metrics if key != "response_tokens")
    metrics = client.optim_step(AdamParams(learning_rate=1e-3), "num_loss_tokens").result(60).metrics
    assert metrics["num_loss_tokens"] == 2


def test_sdk_batch_above_the_chunk_limit_is_one_gradient(service: FiretitanServiceClient) -> None:
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    data = [sdk_datum("abc")] * 1300
    forward = client.forward(data, "cross_entropy").result(120)
    result = client.forward_backward(data, "cross_entropy").result(120)
    assert len(forward.loss_fn_outputs) == len(result.loss_fn_outputs) == 1300
    assert result.metrics["num_sequences:sum"] == 1300
    metrics = client.optim_step(AdamParams(learning_rate=1e-3), "num_sequences").result(60).metrics
    assert (metrics["num_sequences"], metrics["num_loss_tokens"]) == (1300, 2600)


def test_sdk_client_stays_usable_after_a_refused_request(service: FiretitanServiceClient) -> None:
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
    with pytest.raises(RequestFailedError, match="has 299 tokens, this trainer takes 1 to 256"):
        client.forward_backward([sdk_datum("x" * 300)], "cross_entropy").result(60)
    with pytest.raises(RequestFailedError, match="optim_step without a gradient"):
        client.optim_step(AdamParams(learning_rate=1e-3)).result(60)
    with pytest.raises(RequestFailedError, match="no checkpoint 'missing'"):
        client.load_state("missing").result(60)
    client.forward_backward([sdk_datum("fine")], "cross_entropy").result(60)
    client.optim_step(AdamParams(learning_rate=1e-3)).result(60)


def test_sdk_lora_run_exports_and_loads_an_adapter(lora: Trainer) -> None:
    service = FiretitanServiceClient(base_url=lora.base_url, api_key=TOKEN)
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=4, lora_alpha=8, lora_init_method="nora")
    data = [sdk_datum(text) for text in TEXTS]
    for _ in range(3):
        client.forward_backward(data, "cross_entropy").result(60)
        client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    trained = client.forward(data, "cross_entropy").result(60).metrics
    path = client.save_weights_for_sampler_ext("adapter").path
    client.save_state("lora-3").result(60)
    client.forward_backward(data, "cross_entropy").result(60)
    client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    models = lora.job_dir.parent / "models"
    models.mkdir()
    (models / "mine").symlink_to(lora.job_dir.parent / "checkpoints" / "job-l" / "sampler" / path)
    client.load_adapter("accounts/local/models/mine").result(60)
    assert client.forward(data, "cross_entropy").result(60).metrics == trained
    merged = client.save_weights_for_sampler_ext("whole", checkpoint_type="merged_base")
    assert merged.path == merged.snapshot_name
    reference = service.create_reference_client(base_model=BASE_MODEL)
    assert reference.forward(data, "cross_entropy").result(60).metrics["loss:sum"] > trained["loss:sum"]
    service.close()


def test_stranger_without_the_token_is_refused(full: Trainer) -> None:
    for headers in ({}, {"X-Api-Key": "wrong"}, {"X-Api-Key": TOKEN + "x"}):
        assert httpx.get(f"{full.base_url}/api/v1/healthz", headers=headers).status_code == 401
        answer = httpx.post(f"{full.base_url}/api/v1/create_session", json={}, headers=headers)
        assert (answer.status_code, TOKEN in answer.text) == (401, False)
    assert httpx.get(f"{full.base_url}/api/v1/healthz", headers={"X-Api-Key": TOKEN}).json() == {"status": "ok"}


def test_lost_responses_are_sent_again_without_a_second_effect(full: Trainer) -> None:
    session = full.open_session()
    create = {"session_id": session, "model_seq_id": 0, "base_model": BASE_MODEL, "lora_config": {"rank": 0}}
    ids = {full.post("create_model", create).json()["request_id"] for _ in range(3)}
    assert len(ids) == 1
    model = full.result(ids.pop())["model_id"]
    gradient = {"model_id": model, "seq_id": 1, "forward_backward_input": CROSS_ENTROPY}
    step = {"model_id": model, "seq_id": 2, "adam_params": ADAM}
    for name, body in (("forward_backward", gradient), ("optim_step", step)):
        ids = {full.post(name, body).json()["request_id"] for _ in range(3)}
        assert len(ids) == 1
        request_id = ids.pop()
        assert full.result(request_id) == full.result(request_id)
    forward = {"model_id": model, "seq_id": 3, "forward_input": CROSS_ENTROPY}
    after = full.run("forward", forward)["metrics"]["loss:sum"]
    again = full.run("optim_step", {"model_id": model, "seq_id": 4, "adam_params": ADAM})
    assert again["category"] == "user"  # the gradient was applied once and is gone
    other = full.open_model(full.open_session())
    full.run("forward_backward", gradient | {"model_id": other})
    full.run("optim_step", step | {"model_id": other})
    assert full.run("forward", forward | {"model_id": other})["metrics"]["loss:sum"] == after


def test_number_reused_for_another_request_is_a_failed_future(full: Trainer) -> None:
    model = full.open_model(full.open_session())
    first = {"model_id": model, "seq_id": 1, "forward_input": CROSS_ENTROPY}
    kept = full.post("forward", first).json()["request_id"]
    failed = full.run("optim_step", {"model_id": model, "seq_id": 1, "adam_params": ADAM})
    assert (failed["category"], "used before" in failed["error"]) == ("user", True)
    assert "metrics" in full.result(kept)


def test_operations_that_arrive_out_of_order_run_in_order(full: Trainer) -> None:
    in_order, reversed_ = full.open_model(full.open_session()), full.open_model(full.open_session())

    def bodies(model: str) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("forward_backward", {"model_id": model, "seq_id": 1, "forward_backward_input": CROSS_ENTROPY}),
            ("optim_step", {"model_id": model, "seq_id": 2, "adam_params": ADAM}),
            ("forward_backward", {"model_id": model, "seq_id": 3, "forward_backward_input": CROSS_ENTROPY}),
            ("optim_step", {"model_id": model, "seq_id": 4, "adam_params": ADAM}),
            ("forward", {"model_id": model, "seq_id": 5, "forward_input": CROSS_ENTROPY}),
        ]

    expected = [full.run(name, body) for name, body in bodies(in_order)]
    ids = [full.post(name, body).json()["request_id"] for name, body in reversed(bodies(reversed_))]
    assert [full.result(request_id) for request_id in reversed(ids)] == expected


def test_results_do_not_depend_on_what_else_is_queued(full: Trainer) -> None:
    quiet, busy, noise = (full.open_model(full.open_session()) for _ in range(3))

    def train(model: str) -> list[Any]:
        results = []
        for step in range(3):
            gradient = {"model_id": model, "seq_id": 2 * step + 1, "forward_backward_input": CROSS_ENTROPY}
            results.append(full.run("forward_backward", gradient))
            results.append(full.run("optim_step", {"model_id": model, "seq_id": 2 * step + 2, "adam_params": ADAM}))
        return results

    expected = train(quiet)
    for number in range(1, 20):
        other = {"loss_fn": "cross_entropy", "data": [datum("y" * (number + 2))] * number}
        full.post("forward_backward", {"model_id": noise, "seq_id": number, "forward_backward_input": other})
    assert train(busy) == expected


def test_unknown_ids_are_not_found_and_closed_ones_gone(full: Trainer) -> None:
    session = full.open_session()
    model = full.open_model(session)
    forward = {"model_id": model, "seq_id": 1, "forward_input": CROSS_ENTROPY}
    assert full.post("forward", forward | {"model_id": "model-x"}).status_code == 404
    assert full.post("session_heartbeat", {"session_id": "nobody"}).status_code == 404
    assert full.post("retrieve_future", {"request_id": "nothing"}).status_code == 410
    request_id = full.post("forward", forward).json()["request_id"]
    full.result(request_id)
    unload = {"model_id": model, "type": "unload_model"}
    first, second = (full.post("unload_model", unload).json()["request_id"] for _ in range(2))
    assert first == second
    assert full.result(first) == {"model_id": model, "type": "unload_model"}
    assert full.post("forward", forward | {"seq_id": 2}).status_code == 410
    assert full.post("get_info", {"model_id": model}).status_code == 410
    assert full.post("retrieve_future", {"request_id": request_id}).status_code == 410
    assert full.post("session_heartbeat", {"session_id": session}).status_code == 200


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("forward", {"model_id": "m"}),
        ("forward", {"model_id": "m", "seq_id": 0}),
        ("forward", {"model_id": 3, "seq_id": 1}),
        ("create_session", {"user_metadata": {"cookbook_run": "r", "cookbook_epoch": "x"}}),
    ],
)
def test_requests_that_name_no_operation_are_bad_requests(full: Trainer, name: str, body: dict[str, Any]) -> None:
    assert full.post(name, body).status_code == 400


def test_body_that_is_not_json_is_a_bad_request(full: Trainer) -> None:
    url, headers = f"{full.base_url}/api/v1/forward", {"X-Api-Key": TOKEN}
    for content in (b"", b"{", b"[1]", b'{"model_id": NaN}'):
        assert httpx.post(url, content=content, headers=headers).status_code == 400


def test_newer_epoch_of_a_run_fences_the_older_one_off(full: Trainer) -> None:
    old = full.open_session(cookbook_run="run-9", cookbook_epoch="1")
    model = full.open_model(old)
    waiting = full.post("optim_step", {"model_id": model, "seq_id": 2, "adam_params": ADAM}).json()["request_id"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        poll = pool.submit(full.post, "retrieve_future", {"request_id": waiting})
        newer = full.open_session(cookbook_run="run-9", cookbook_epoch="2")
        assert poll.result(30).status_code == 410  # at once, not after the long poll
    assert full.post("session_heartbeat", {"session_id": old}).status_code == 410
    forward = {"model_id": model, "seq_id": 1, "forward_input": CROSS_ENTROPY}
    refused = full.post("forward", forward)
    assert (refused.status_code, "Reconnect" in refused.json()["detail"]) == (410, True)
    older = {"user_metadata": {"cookbook_run": "run-9", "cookbook_epoch": "1"}}
    assert full.post("create_session", older).status_code == 410
    assert full.post("session_heartbeat", {"session_id": newer}).status_code == 200


def test_server_answers_while_it_computes(full: Trainer) -> None:
    model = full.open_model(full.open_session())
    long = {"loss_fn": "cross_entropy", "data": [datum("z" * 250)] * 150}
    ids = [
        full.post("forward_backward", {"model_id": model, "seq_id": n, "forward_backward_input": long}).json()
        for n in (1, 2)
    ]
    slowest = 0.0
    future: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        poll = pool.submit(full.result, ids[-1]["request_id"])
        while not poll.done():
            started = time.monotonic()
            assert httpx.get(f"{full.base_url}/api/v1/healthz", headers={"X-Api-Key": TOKEN}).status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.02)
        future = poll.result()
    assert future["metrics"]["num_sequences:sum"] == 150
    assert slowest < 2.0


def test_full_disk_fails_the_save_and_leaves_nothing(tmp_path: Path, tiny: Path) -> None:
    with trainer(tmp_path / "job-d", tiny) as running:
        model = running.open_model(running.open_session())
        # No file of this process may grow above 100 kB, as on a disk that is full; the weights need 460 kB.
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        saves = [("save_weights", "step-1"), ("save_weights_for_sampler", "s1")]
        for number, (name, path) in enumerate(saves, start=1):
            failed = running.run(name, {"model_id": model, "seq_id": number, "path": path})
            assert failed["category"] == "user", failed
            assert f"'{path}' was not saved, there is no room for it: File too large" in failed["error"]
        checkpoints = tmp_path / "checkpoints" / "job-d"
        assert [path for path in checkpoints.rglob("*") if path.is_file()] == []
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        saved = running.run("save_weights", {"model_id": model, "seq_id": 3, "path": "step-1"})
        assert saved == {"path": "step-1", "type": "save_weights"}


def test_lack_of_memory_fails_the_request_and_keeps_what_was_gathered(tmp_path: Path) -> None:
    # The logits of a full micro-batch take 160 MB, more than the address space that a process keeps in reserve.
    wide = make_tiny_model(tmp_path / "model", vocab_size=20_000)
    with trainer(tmp_path / "job-m", wide) as running:
        model = running.open_model(running.open_session())

        def gradient(number: int, data: list[dict[str, Any]]) -> dict[str, Any]:
            given = {"loss_fn": "cross_entropy", "data": data}
            body = {"model_id": model, "seq_id": number, "forward_backward_input": given}
            return running.run("forward_backward", body)

        assert "metrics" in gradient(1, CROSS_ENTROPY["data"])
        used = int(Path(f"/proc/{running.process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(running.process.pid, resource.RLIMIT_AS, (used + 2_000_000, resource.RLIM_INFINITY))
        failed = gradient(2, [datum(letter * 250) for letter in "abcdefghijklmnop"])  # no prefix to share
        resource.prlimit(running.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert (failed["category"], "out of memory" in failed["error"]) == ("server", True), failed
        step = {"model_id": model, "seq_id": 3, "adam_params": ADAM}
        answer = running.run("optim_step", step)
        assert answer["metrics"]["num_sequences"] == 3, running.log()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose state takes a moment to write: 31 MB."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wide", vocab_size=120_000)


def wait_until_written_to(folder: Path) -> None:
    """Until a save into this folder is under way."""
    deadline = time.monotonic() + 30
    while not any(folder.glob(".writing-*/*.safetensors")):
        assert time.monotonic() < deadline


def test_a_worker_killed_while_it_writes_leaves_the_checkpoint_before_and_nothing_half_written(
    tmp_path: Path, wide: Path
) -> None:
    states = tmp_path / "checkpoints" / "job-k" / "state"
    with trainer(tmp_path / "job-k", wide) as first:
        model = first.open_model(first.open_session())
        first.run("save_weights", {"model_id": model, "seq_id": 1, "path": "step-0"})
        first.post("save_weights", {"model_id": model, "seq_id": 2, "path": "step-1"})
        wait_until_written_to(states)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(10)
    assert sorted(path.name[:9] for path in states.iterdir()) == [".writing-", "step-0"]
    with trainer(tmp_path / "job-k", wide) as second:
        assert [path.name for path in states.iterdir()] == ["step-0"]
        forward = {"model_id": model, "seq_id": 3, "forward_input": CROSS_ENTROPY}
        assert second.post("forward", forward).status_code == 410
        resumed = second.open_model(second.open_session())
        load = {"model_id": resumed, "seq_id": 1, "path": "step-0", "optimizer": True}
        assert second.run("load_weights", load) == {"path": "step-0", "type": "load_weights"}

        second.post("save_weights", {"model_id": resumed, "seq_id": 2, "path": "step-2"})
        wait_until_written_to(states)
        listed = httpx.get(f"{second.base_url}/api/v1/list_checkpoints", headers={"X-Api-Key": TOKEN}).json()
        assert listed == {"checkpoints": ["step-0", "step-2"]}
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(20) == 0
    assert sorted(path.name for path in states.iterdir()) == ["step-0", "step-2"]  # it has finished what it had begun
    verify(states / "step-2", load_manifest(states / "step-2"))


def test_idle_worker_ends_itself_and_says_why(tmp_path: Path, tiny: Path) -> None:
    with trainer(tmp_path / "job-i", tiny, inactivity_timeout_s=2.0) as running:
        session = running.open_session()
        for _ in range(6):  # heartbeats are activity, health probes are not
            running.post("session_heartbeat", {"session_id": session})
            time.sleep(0.5)
        assert running.process.poll() is None
        assert running.process.wait(20) == 0
        reason = json.loads((running.job_dir / "exit.json").read_text())["reason"]
        assert reason == "no requests for 2 s (inactivity timeout)"


def test_worker_told_to_stop_ends_at_once_with_polls_open(tmp_path: Path, tiny: Path) -> None:
    with trainer(tmp_path / "job-t", tiny) as running, concurrent.futures.ThreadPoolExecutor() as pool:
        model = running.open_model(running.open_session())
        waiting = running.post("forward", {"model_id": model, "seq_id": 2}).json()["request_id"]
        poll = pool.submit(running.post, "retrieve_future", {"request_id": waiting})
        time.sleep(0.3)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(10) == 0
        assert json.loads((running.job_dir / "exit.json").read_text()) == {"reason": "told to stop"}
        assert poll.exception(10) is not None or poll.result().status_code >= 500


def test_job_that_cannot_be_served_ends_with_one_clear_line(tmp_path: Path) -> None:
    write_spec(tmp_path / "job-x", tmp_path / "no-such-model")
    process: subprocess.Popen[bytes] = spawn(tmp_path / "job-x")
    assert process.wait(90) == 2
    last = (tmp_path / "job-x" / "worker.log").read_text().strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "no-such-model is not a Hugging Face model folder" in last
    assert TOKEN not in last
