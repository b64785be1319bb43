"""`cookbook serve` as a process on the real backend: what clients see, who may ask, and what is left at the end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from cookbook.completions import read_refusal
from cookbook.control_plane import ControlPlane
from cookbook.run import list_runs
from cookbook.serve import ServeApp
from tests.tiny_model import make_tiny_adapter, make_tiny_model

KEY = "a-key-of-my-own"
MESSAGES = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(home, *arguments, **environment):
    """A server as a process, ready: (process, the JSON line that it printed)."""
    command = [sys.executable, "-m", "cookbook.cli", "serve", *arguments, "--port", "0", "--json"]
    settings = {**os.environ, "COOKBOOK_HOME": str(home), **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture(scope="module")
def adapter(backend):
    make_tiny_model(backend.home / "models" / "long", max_position_embeddings=32768)
    return str(make_tiny_adapter(backend.home / "served-adapter", base=backend.home / "models" / "tiny"))


@pytest.fixture(scope="module")
def server(backend, adapter):
    with serving(backend.home, "long", adapter, COOKBOOK_SERVE_API_KEY=KEY) as (_, ready):
        assert ready["api_key"] is None  # what the environment has is in no log
        yield ready


@pytest.fixture(scope="module")
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server["base_url"], headers=headers, timeout=60, trust_env=False) as client:
        yield client


def chat(client, model="long", **fields):
    body = {"model": model, "messages": MESSAGES, "max_tokens": 8, "seed": 1, **fields}
    return client.post("/chat/completions", json=body)


def sessions(home):
    return [run for run in list_runs(home) if run.path.parent == home / "sessions"]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_models_go_by_the_names_they_were_given(client, adapter):
    assert [entry["id"] for entry in client.get("/models").json()["data"]] == ["long", adapter]
    assert client.get(f"/models/{adapter}").json()["id"] == adapter
    texts = []
    for model in ("long", adapter):
        answer = chat(client, model).json()
        assert (answer["object"], answer["model"], answer["usage"]["completion_tokens"]) == (
            "chat.completion",
            model,
            8,
        )
        texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0] != texts[1]
    assert chat(client).json()["choices"][0]["message"]["content"] == texts[0]


def test_a_stream_comes_bit_by_bit_and_has_the_same_text(client):
    whole = chat(client).json()["choices"][0]["message"]["content"]
    body = {"model": "long", "messages": MESSAGES, "max_tokens": 8, "seed": 1, "stream": True}
    with client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.read().split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    events = [orjson.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert {event["model"] for event in events} == {"long"}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]) == whole
    assert len(events) > 3


def test_plain_completions_keep_their_logprobs(client):
    answer = client.post("/completions", json={"model": "long", "prompt": "Hello", "max_tokens": 3, "logprobs": 1})
    assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == 3


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_without_the_key_nothing_is_answered_but_health(server, header):
    root = server["base_url"].removesuffix("/v1")
    with httpx.Client(trust_env=False, headers=header) as stranger:
        assert stranger.get(f"{root}/healthz").json() == {"status": "ok"}
        for path in ("models", "nonsense"):
            refusal = stranger.get(f"{root}/v1/{path}")
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (401, "invalid_api_key")


def test_the_backends_key_is_not_the_servers_and_is_told_to_nobody(server, backend, client):
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {backend.api_key}"}) as other:
        assert other.get(f"{server['base_url']}/models").status_code == 401
    answers = [chat(client), chat(client, "none"), chat(client, presence_penalty=1.0)]
    assert not [a for a in answers if backend.api_key in a.text or backend.api_key in str(a.headers)]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "none"}, 404, "model", "model_not_found"),
        ({"model": None}, 400, "model", None),
        ({"messages": [{"role": "user", "content": "x" * 40000}]}, 400, "prompt", "context_length_exceeded"),
        ({"presence_penalty": 1.0}, 400, "presence_penalty", None),
    ],
)
def test_errors_have_the_form_that_openai_clients_read(client, fields, status, param, code):
    refusal = chat(client, **fields)
    error = refusal.json()["error"]
    assert (refusal.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_what_is_no_json_object_or_no_path_is_an_error_of_the_same_form(client):
    assert client.post("/completions", content=b"{").json()["error"]["message"].startswith("the body is not JSON")
    assert client.post("/completions", content=b"[]").json()["error"]["message"].startswith("the body is a JSON list")
    lost = client.get("/nonsense")
    assert (lost.status_code, lost.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_its_request(client, stream):
    body = {"model": "long", "messages": MESSAGES, "temperature": 0, "ignore_eos": True, "stream": stream}
    if stream:
        with client.stream("POST", "/chat/completions", json=body) as answer:
            next(answer.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/chat/completions", json=body, timeout=0.5)
    wait_until(lambda: chat(client, max_tokens=1).json()["perf_metrics"]["num-concurrent-requests"] == "1", seconds=5)


def test_a_deployment_that_died_is_brought_back(client, control):
    def worker_pid():
        live = [d for d in control.list_deployments() if d["baseModel"].endswith("/long") and d["state"] == "READY"]
        return live[0]["metadata"]["workerPid"]

    before = chat(client).json()["choices"]
    os.kill(worker_pid(), signal.SIGKILL)
    gone = chat(client)
    assert (gone.status_code, gone.headers["retry-after"], gone.json()["error"]["code"]) == (
        503,
        "5",
        "model_not_ready",
    )
    wait_until(lambda: chat(client).status_code == 200)
    assert chat(client).json()["choices"] == before


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_told_to_end_it_frees_its_deployments_and_leaves_nothing(backend, control):
    with serving(backend.home, "tiny") as (process, ready):
        (session,) = [run for run in sessions(backend.home) if _is_of(run, process)]
        assert session.state == "running"
        assert len(ready["api_key"]) >= 32
        names = _deployments_of(control, session)
        assert len(names) == 1
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert _deployments_of(control, session) == []
    assert not session.path.exists()
    assert session.run_id not in [run.run_id for run in list_runs(backend.home)]


def test_what_a_killed_one_leaves_is_freed_by_the_next_and_ctrl_c_ends_that(backend, control):
    with serving(backend.home, "tiny") as (process, _):
        (session,) = [run for run in sessions(backend.home) if _is_of(run, process)]
        process.kill()
        process.wait()
        assert len(_deployments_of(control, session)) == 1
    with serving(backend.home, "tiny") as (process, _):
        assert _deployments_of(control, session) == []
        assert not session.path.exists()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert "Interrupted." in err


def _is_of(run, process):
    return json.loads((run.path / ".lock").read_bytes())["pid"] == process.pid


def _deployments_of(control, run):
    return [d["name"] for d in control.list_deployments() if run.run_id in d["name"]]


# -- answers that the real backend gives too seldom --------------------------------------------------------------------


def ask(upstream, **fields):
    """The answer to a chat request where `upstream` (an endpoint, or a whole transport) answers in the backend's place,
    and what was found to be gone."""
    gone = []

    async def run():
        transport = upstream
        if not isinstance(upstream, httpx.AsyncBaseTransport):
            app = Starlette(routes=[Route("/chat/completions", upstream, methods=["POST"])])
            transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://backend/") as backend:
            served = ServeApp({"m": "accounts/a/deployments/d"}, client=backend, api_key=KEY, on_gone=gone.append)
            asgi = httpx.ASGITransport(served.asgi)
            async with httpx.AsyncClient(transport=asgi, base_url="http://server/v1/") as client:
                headers = {"Authorization": f"Bearer {KEY}"}
                return await client.post("chat/completions", json={"model": "m", **fields}, headers=headers)

    return asyncio.run(run()), gone


def test_limits_are_passed_on_with_their_pause():
    def busy(request):
        body = {"error": {"message": "256 requests wait already", "type": "rate_limit_error"}}
        return Response(orjson.dumps(body), 429, {"retry-after": "7"}, media_type="application/json")

    answer, gone = ask(busy)
    assert (answer.status_code, answer.headers["retry-after"], gone) == (429, "7", [])
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_key_that_the_backend_refuses_is_not_the_clients_fault():
    answer, _ = ask(lambda request: Response(b'{"error": {"message": "no", "type": "x"}}', 403))
    assert answer.status_code == 502


@pytest.mark.parametrize("after_headers", [False, True])
def test_a_deployment_that_says_nothing_for_too_long_is_looked_after_and_told_as_a_timeout(after_headers):
    async def silent():
        yield b"{"
        raise httpx.ReadTimeout("600 s")

    def stuck(request):
        if after_headers:
            return httpx.Response(200, headers={"content-type": "application/json"}, content=silent())
        raise httpx.ReadTimeout("600 s")

    answer, gone = ask(httpx.MockTransport(stuck))
    assert (answer.status_code, answer.json()["error"]["type"], gone) == (504, "server_error", ["m"])
    assert "did not answer in time" in answer.json()["error"]["message"]


def test_answers_have_a_time_limit(control):
    with control.completions_client() as client:
        assert (client.timeout.read, client.timeout.connect) == (600, 10)


def test_an_answer_of_the_control_plane_means_that_the_deployment_is_gone():
    def missing(request):
        return Response(b'{"error": {"code": 3, "message": "there is no deployment d"}, "detail": ""}', 400)

    answer, gone = ask(missing)
    assert (answer.status_code, gone) == (503, ["m"])
    assert read_refusal(500, b"<html>").message == "<html>"
