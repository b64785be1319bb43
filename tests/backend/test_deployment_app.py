"""Completions, chat and hot load over HTTP as plain clients see them, and what becomes of clients that go away."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fireworks.training.sdk import DeploymentSampler
from transformers import AutoTokenizer

from cookbook.backend.snapshots import SnapshotInUse, delete_snapshot, snapshot_dir
from tests.backend.deployment_server import Served, served, wait_until
from tests.tiny_model import make_tiny_model
from tests.wire.deployment_process import DEPLOYMENT, JOB, closed, write_lora_snapshot, write_model_snapshot
from tests.wire.trainer_process import TOKEN

pytestmark = pytest.mark.timeout(120)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LINK = {"x-cookbook-trainer-job": f"accounts/local/rlorTrainerJobs/{JOB}"}
HELLO = list(b"hello")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Served]:
    """For tests that leave the weights as they are."""
    with served(tmp_path_factory.mktemp("home") / "dep-a", tiny) as running:
        yield running


def completion(server: Served, **body: Any) -> dict[str, Any]:
    answer = server.post(COMPLETIONS, {"model": DEPLOYMENT, "prompt": HELLO, "max_tokens": 8} | body)
    return dict(answer.raise_for_status().json())


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, which must end as streams do."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *data, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in data]


def load(server: Served, identity: str, **headers: str) -> dict[str, Any]:
    answer = server.post("/hot_load", {"identity": identity, "reset_prompt_cache": True}, **(LINK | headers))
    return dict(answer.raise_for_status().json()["replicas"][0])


def test_an_answer_names_its_model_snapshot_usage_and_times(shared: Served) -> None:
    answer = completion(shared, seed=1, ignore_eos=True)
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion"
    assert (answer["model"], answer["snapshot_identity"], choice["snapshot_identity"]) == (DEPLOYMENT, "", "")
    assert answer["id"].startswith("cmpl-")
    assert answer["id"].endswith(".")
    assert choice["finish_reason"] == "length"
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": None,
    }
    times = {name: float(value) for name, value in answer["perf_metrics"].items() if name != "deployment"}
    assert 0 <= times["prefill-queue-duration"] < times["server-processing-time"] < 30


def test_queue_time_is_the_time_spent_queued(shared: Served) -> None:
    with ThreadPoolExecutor(1) as pool, shared.held():
        waiting = pool.submit(completion, shared)
        wait_until(lambda: shared.engine.waiting == 1)
        threading.Event().wait(0.3)
    assert float(waiting.result()["perf_metrics"]["prefill-queue-duration"]) >= 0.3


def test_every_prompt_gets_n_choices_in_order_with_seeds_of_their_own(shared: Served) -> None:
    together = completion(shared, prompt=["one", HELLO], n=2, seed=5, return_token_ids=True)["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2, 3]
    alone = [
        completion(shared, prompt=prompt, seed=seed, return_token_ids=True)["choices"][0]
        for prompt in ("one", HELLO)
        for seed in (5, 6)
    ]
    assert [choice["token_ids"] for choice in together] == [choice["token_ids"] for choice in alone]
    assert alone[0]["token_ids"] != alone[1]["token_ids"]


def test_usage_counts_a_prompt_once_for_its_choices(shared: Served) -> None:
    usage = completion(shared, prompt=[[1] * 5, [2] * 9], n=3, max_tokens=2, ignore_eos=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (14, 12)


def test_a_stream_is_the_whole_answer_in_pieces(shared: Served) -> None:
    body = {"prompt": HELLO, "max_tokens": 40, "seed": 3, "ignore_eos": True}
    whole = completion(shared, **body)
    chunks = events(shared.post(COMPLETIONS, body | {"stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert len(chunks) > 10
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }


def test_pieces_are_sent_while_the_completion_grows(shared: Served) -> None:
    body = {"prompt": HELLO, "max_tokens": 30, "seed": 3, "ignore_eos": True, "stream": True}
    with shared.slowed(), shared.client() as client, client.stream("POST", COMPLETIONS, json=body) as answer:
        parts = answer.iter_bytes()
        next(parts)
        assert shared.engine.running == 2
        assert sum(1 for _ in parts) > 10


def test_usage_comes_in_an_event_of_its_own_when_asked_for(shared: Served) -> None:
    body = {"prompt": HELLO, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *_, finish, last = events(shared.post(COMPLETIONS, body))
    assert "usage" not in finish
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] <= 3


def test_a_chat_is_rendered_with_the_model_s_template(shared: Served, tiny: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]}]
    answer = shared.post(CHAT, {"messages": messages, "max_tokens": 4, "return_token_ids": True}).json()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True, return_dict=False
    )
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == expected
    assert (answer["object"], choice["message"]["role"]) == ("chat.completion", "assistant")
    assert answer["id"].startswith("chatcmpl-")


def test_a_chat_stream_opens_with_the_role_and_is_the_same_text(shared: Served) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 12, "seed": 2, "logprobs": True}
    whole = shared.post(CHAT, body).json()["choices"][0]
    chunks = events(shared.post(CHAT, body | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["logprobs"] == whole["logprobs"]


def test_a_chat_may_fill_the_context(shared: Served) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 470}], "ignore_eos": True}
    assert shared.post(CHAT, body).json()["usage"]["total_tokens"] == 512


def test_stop_strings_cut_the_text_and_not_the_tokens(shared: Served) -> None:
    body = {"seed": 11, "max_tokens": 60, "ignore_eos": True, "raw_output": True}
    free = completion(shared, **body)["choices"][0]
    stop = free["text"][20:22]
    cut = completion(shared, **body, stop=[stop, "never"])["choices"][0]
    tokens = cut["raw_output"]["completion_token_ids"]
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert tokens == free["raw_output"]["completion_token_ids"][: len(tokens)]
    assert len(tokens) < 60


def test_no_piece_of_a_stop_string_is_ever_sent(shared: Served) -> None:
    body = {"prompt": HELLO, "seed": 11, "max_tokens": 60, "ignore_eos": True}
    free = completion(shared, **body)["choices"][0]["text"]
    stop = free[20:24]
    chunks = events(shared.post(COMPLETIONS, body | {"stop": stop, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == free[: free.index(stop)]


def test_the_end_token_is_sampled_but_not_text(shared: Served) -> None:
    answers = [completion(shared, seed=seed, max_tokens=300, raw_output=True)["choices"][0] for seed in range(8)]
    ended = [choice for choice in answers if choice["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        assert choice["raw_output"]["completion_token_ids"][-1] in (257, 259)
        assert not choice["text"].endswith(("</s>", "<|im_end|>"))


def test_the_older_logprobs_are_the_same_numbers(shared: Served) -> None:
    logprobs = completion(shared, logprobs=2, echo=True, max_tokens=1, seed=4)["choices"][0]["logprobs"]
    content = logprobs["content"]
    assert logprobs["token_logprobs"] == [entry["logprob"] for entry in content]
    assert len(logprobs["tokens"]) == len(HELLO) + 1
    # Keyed by text, which several tokens may share; the most probable of them counts.
    assert logprobs["top_logprobs"][-1] == {
        entry["token"]: entry["logprob"] for entry in reversed(content[-1]["top_logprobs"])
    }


def test_nothing_is_sampled_for_an_echo_alone(shared: Served) -> None:
    choice = completion(shared, echo=True, max_tokens=0, logprobs=True, raw_output=True)["choices"][0]
    assert choice["text"] == "hello"
    assert choice["raw_output"]["completion_token_ids"] == HELLO
    assert len(choice["logprobs"]["content"]) == 5


def test_only_the_last_prompt_tokens_are_echoed_when_so_asked(shared: Served) -> None:
    choice = completion(shared, echo_last=2, max_tokens=1, logprobs=True, raw_output=True)["choices"][0]
    whole = completion(shared, echo=True, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert choice["raw_output"]["completion_token_ids"][:2] == HELLO[-2:]
    echoed = [entry["logprob"] for entry in choice["logprobs"]["content"][:2]]
    assert echoed == pytest.approx([entry["logprob"] for entry in whole[3:5]], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, None),
        (COMPLETIONS, {"prompt": []}, None),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [1, 264]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, 2.5]}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 512}, "prompt"),
        (COMPLETIONS, {"prompt": HELLO, "max_tokens": -1}, "max_tokens"),
        (
            COMPLETIONS,
            {"prompt": HELLO, "max_tokens": 508, "context_length_exceeded_behavior": "error"},
            "max_tokens",
        ),
        (COMPLETIONS, {"prompt": HELLO, "temperature": -0.1}, "temperature"),
        (COMPLETIONS, {"prompt": HELLO, "temperature": "warm"}, "temperature"),
        (COMPLETIONS, {"prompt": HELLO, "top_p": 0}, "top_p"),
        (COMPLETIONS, {"prompt": HELLO, "top_k": -2}, "top_k"),
        (COMPLETIONS, {"prompt": HELLO, "n": 0}, "n"),
        (COMPLETIONS, {"prompt": [HELLO] * 65, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": HELLO, "seed": 1.5}, "seed"),
        (COMPLETIONS, {"prompt": HELLO, "stop": ["a", ""]}, "stop"),
        (COMPLETIONS, {"prompt": HELLO, "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (COMPLETIONS, {"prompt": HELLO, "stream": "yes"}, "stream"),
        (COMPLETIONS, {"prompt": HELLO, "presence_penalty": 0.5}, "presence_penalty"),
        (COMPLETIONS, {"prompt": HELLO, "temprature": 0.5}, "temprature"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}, "tools"),
        ("/hot_load", {"identity": ""}, "identity"),
        ("/hot_load", {"identity": "s", "reset_prompt_cache": "no"}, "reset_prompt_cache"),
    ],
)
def test_a_request_that_cannot_succeed_is_refused_by_field(
    shared: Served, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = shared.post(path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param is None or param in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff"])
def test_a_body_that_is_no_object_is_refused(shared: Served, body: bytes) -> None:
    with shared.client() as client:
        assert client.post(COMPLETIONS, content=body).status_code == 400
        assert client.post("/hot_load", content=body).status_code == 400


def test_fields_without_effect_and_neutral_values_are_taken(shared: Served) -> None:
    neutral = {"user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "seed": None, "stop": None}
    assert completion(shared, **neutral)["choices"]


def test_strangers_are_refused(shared: Served) -> None:
    for headers in ({}, {"X-Api-Key": "wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for path in ("/v1/models", "/hot_load", "/api/v1/healthz", "/status"):
            answer = httpx.get(shared.base_url + path, headers=headers, trust_env=False)
            assert answer.status_code == 401


def test_models_and_status_say_what_is_served(shared: Served) -> None:
    with shared.client() as client:
        (model,) = client.get("/inference/v1/models").json()["data"]
        assert (model["id"], model["snapshot_identity"], model["context_length"]) == (DEPLOYMENT, "", 512)
        assert client.get("/status").json() == {"running": 0, "waiting": 0, "version": ""}
        assert client.get("/hot_load").json()["replicas"][0]["readiness"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(shared: Served, stream: bool) -> None:
    body = {"prompt": HELLO, "max_tokens": 500, "ignore_eos": True, "stream": stream, "n": 2}
    with shared.slowed():
        with shared.client() as client:
            if stream:
                with client.stream("POST", COMPLETIONS, json=body) as answer:
                    next(answer.iter_bytes())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(COMPLETIONS, json=body, timeout=0.5)
        wait_until(lambda: shared.engine.running == 1, timeout_s=5)  # 500 tokens take 10 s


def test_a_client_that_hangs_up_while_queued_is_never_computed(shared: Served) -> None:
    with shared.held() as first:
        with shared.client() as client, pytest.raises(httpx.ReadTimeout):
            client.post(COMPLETIONS, json={"prompt": HELLO, "max_tokens": 500, "stream": True}, timeout=0.3)
        with shared.client() as client:
            client.get("/status")  # the news of the hang-up is not older than this request
        assert not first.done()
    wait_until(lambda: shared.engine.running + shared.engine.waiting == 0, timeout_s=1)


def test_a_full_queue_answers_429_and_takes_all_or_nothing(tmp_path: Path, tiny: Path) -> None:
    args = ["--compute-dtype=float32", "--threads=1", "--max-batch=2", "--max-waiting=2"]
    with served(tmp_path / "dep-a", tiny, extra_args=args) as server:
        with ThreadPoolExecutor(1) as pool:
            with server.held():
                waiting = pool.submit(completion, server)
                wait_until(lambda: server.engine.waiting == 1)
                refused = server.post(COMPLETIONS, {"prompt": HELLO, "n": 2})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["type"] == "rate_limit_error"
            assert waiting.result()["choices"]
        wait_until(lambda: server.engine.running + server.engine.waiting == 0)


def sample(server: Served, **options: Any) -> Any:
    """One request through the SDK's own retries."""

    async def once() -> Any:
        sampler = DeploymentSampler(inference_url=server.base_url, model=DEPLOYMENT, api_key=TOKEN)
        try:
            return await sampler.sample_with_prompt_tokens_result(HELLO, max_tokens=4, **options)
        finally:
            await closed(sampler)

    return asyncio.run(once())


def test_425_while_a_load_drains_and_nothing_is_lost(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny, load_hold_s=0.1) as server, ThreadPoolExecutor(3) as pool:
        write_model_snapshot(server.checkpoints, "s-1")
        with server.held() as running:
            queued = pool.submit(completion, server)
            wait_until(lambda: server.engine.waiting == 1)
            loading = pool.submit(load, server, "s-1")
            wait_until(lambda: server.engine.is_loading)
            early = server.post(COMPLETIONS, {"prompt": HELLO})
            assert (early.status_code, early.headers["retry-after"]) == (425, "1")
            with server.client() as client:
                state = client.get("/hot_load").json()["replicas"][0]
            assert (state["readiness"], state["loading_state"]["stage"]) == (False, "loading")
            patient = pool.submit(sample, server, hotload_retry_interval=0.05, hotload_max_retries=1000)
            threading.Event().wait(0.3)
            assert not loading.done()
        assert running.result().version == ""  # in flight: not disturbed
        assert loading.result()["current_snapshot_identity"] == "s-1"
        assert queued.result()["snapshot_identity"] == "s-1"
        assert patient.result().upstream_response_id.endswith(".s-1")


def test_a_request_that_comes_during_a_load_is_held_and_gets_the_new_weights(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server, ThreadPoolExecutor(2) as pool:
        write_model_snapshot(server.checkpoints, "s-1")
        with server.held():
            loading = pool.submit(load, server, "s-1")
            wait_until(lambda: server.engine.is_loading)
            held = pool.submit(server.post, COMPLETIONS, {"prompt": HELLO})
        loading.result()
        answer = held.result()
        assert (answer.status_code, answer.headers["x-snapshot-identity"]) == (200, "s-1")
        assert answer.json()["id"].endswith(".s-1")


def test_a_stream_says_which_snapshot_it_comes_from(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        write_model_snapshot(server.checkpoints, "s.1")
        assert load(server, "s.1")["loading_state"]["stage"] == "done"
        answer = server.post(COMPLETIONS, {"prompt": HELLO, "stream": True, "max_tokens": 5})
        assert answer.headers["x-snapshot-identity"] == "s.1"
        assert {chunk["snapshot_identity"] for chunk in events(answer)} == {"s.1"}
        assert {chunk["id"].partition(".")[2] for chunk in events(answer)} == {"s.1"}


def test_base_adapter_and_full_snapshots_follow_one_another(tmp_path: Path, tiny: Path) -> None:
    def greedy() -> list[int]:
        return list(completion(server, temperature=0, max_tokens=20, return_token_ids=True)["choices"][0]["token_ids"])

    with served(tmp_path / "dep-a", tiny) as server:
        write_model_snapshot(server.checkpoints, "full", checkpoint_type="delta")
        write_lora_snapshot(server.checkpoints, "lora", tiny)
        write_model_snapshot(server.checkpoints, "merged", seed=2, lora_rank=4, checkpoint_type="merged_base")
        outputs = {"": greedy()}
        for identity in ("lora", "full", "lora", "merged"):
            assert load(server, identity)["current_snapshot_identity"] == identity
            assert outputs.setdefault(identity, greedy()) == greedy()  # an adapter is on the base, whatever was before
        assert len(set(map(tuple, outputs.values()))) == 4


def test_the_snapshot_that_is_served_cannot_be_deleted(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        for name in ("s-1", "s-2"):
            write_model_snapshot(server.checkpoints, name)
        first, second = (snapshot_dir(server.checkpoints, JOB, "sampler", name) for name in ("s-1", "s-2"))
        load(server, "s-1")
        with pytest.raises(SnapshotInUse):
            delete_snapshot(first)
        load(server, "nowhere")  # what fails takes nothing away
        with pytest.raises(SnapshotInUse):
            delete_snapshot(first)
        load(server, "s-2")
        delete_snapshot(first)
        with pytest.raises(SnapshotInUse):
            delete_snapshot(second)


def test_a_snapshot_that_is_not_there_leaves_what_serves(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        state = load(server, "nowhere")
        assert state["loading_state"]["stage"] == "error"
        assert state["loading_state"]["target_snapshot_identity"] == "nowhere"
        assert "nowhere" in state["loading_state"]["error"]
        assert (state["readiness"], state["current_snapshot_identity"]) == (True, "")
        write_model_snapshot(server.checkpoints, "nowhere")  # it came later
        assert load(server, "nowhere")["loading_state"]["stage"] == "done"


@pytest.mark.parametrize("damage", ["bit", "missing", "short"])
def test_a_damaged_snapshot_is_not_served(tmp_path: Path, tiny: Path, damage: str) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        weights = write_model_snapshot(server.checkpoints, "s-1") / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        if damage == "missing":
            weights.unlink()
        else:
            weights.write_bytes(content if damage == "bit" else content[:-1])
        before = completion(server, temperature=0)["choices"][0]["text"]
        state = load(server, "s-1")
        assert state["loading_state"]["stage"] == "error"
        assert "model.safetensors" in state["loading_state"]["error"]
        assert completion(server, temperature=0)["choices"][0]["text"] == before


def test_a_snapshot_of_another_model_is_refused(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        write_model_snapshot(server.checkpoints, "s-1", base_model="accounts/local/models/other")
        assert "accounts/local/models/other" in load(server, "s-1")["loading_state"]["error"]


@pytest.mark.parametrize("identity", ["../state/s-1", "a/b", ".."])
def test_an_identity_cannot_leave_the_checkpoints(tmp_path: Path, tiny: Path, identity: str) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        assert "cannot be used" in load(server, identity)["loading_state"]["error"]


def test_a_deployment_is_linked_by_its_spec_or_by_the_header(tmp_path: Path, tiny: Path) -> None:
    own = "accounts/local/rlorTrainerJobs/own"
    with served(tmp_path / "dep-a", tiny, hot_load_trainer_job=own) as server:
        write_model_snapshot(server.checkpoints, "s-1", job="own")
        write_model_snapshot(server.checkpoints, "s-1", seed=2)
        server.post("/hot_load", {"identity": "s-1"})
        first = completion(server, temperature=0)["choices"][0]["text"]
        assert load(server, "s-1")["loading_state"]["stage"] == "done"  # of the job in the header
        assert completion(server, temperature=0)["choices"][0]["text"] != first
        assert server.post("/hot_load", {"identity": "s-1"}, **{"x-cookbook-trainer-job": "job"}).status_code == 400


def test_without_a_trainer_job_there_is_nothing_to_load(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server:
        state = server.post("/hot_load", {"identity": "s-1"}).json()["replicas"][0]
        assert "hotLoadTrainerJob" in state["loading_state"]["error"]


def test_a_load_asked_for_twice_is_done_once(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server, ThreadPoolExecutor(3) as pool:
        write_model_snapshot(server.checkpoints, "s-1")
        with server.held():
            loads = [pool.submit(load, server, "s-1") for _ in range(3)]
            wait_until(lambda: server.engine.is_loading)
        assert [each.result()["loading_state"]["stage"] for each in loads] == ["done"] * 3
        shutil.rmtree(snapshot_dir(server.checkpoints, JOB, "sampler", "s-1"))
        assert load(server, "s-1")["loading_state"]["stage"] == "done"  # it is being served


def test_a_load_during_another_comes_after_it(tmp_path: Path, tiny: Path) -> None:
    with served(tmp_path / "dep-a", tiny) as server, ThreadPoolExecutor(2) as pool:
        write_model_snapshot(server.checkpoints, "s-1")
        write_model_snapshot(server.checkpoints, "s-2", seed=2)
        with server.held():
            first = pool.submit(load, server, "s-1")
            wait_until(lambda: server.engine.is_loading)
            second = pool.submit(load, server, "s-2")
            threading.Event().wait(0.2)
        first.result()
        assert second.result()["current_snapshot_identity"] == "s-2"
        assert server.engine.version == "s-2"
