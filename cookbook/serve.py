"""An OpenAI-compatible server on loopback in front of deployments: simple model names, and a key of its own.

Answers are passed on as they come, streams included. The backend's key is added on the way to the backend and never
leaves this process. What the deployments are, and that they stay alive, is cookbook/cli/serve.py's business.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpx
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cookbook.completions import LineBuffer, Refusal, read_refusal
from cookbook.recovery import CALLER_STATUSES

__all__ = ["MAX_REQUEST_BYTES", "ServeApp"]

MAX_REQUEST_BYTES = 64 * 2**20
"""Largest request. It is held in memory to see which model it is for."""

RETRY_AFTER_S = 5
"""What clients are told to wait for a model that is being brought back."""

_PASSED_HEADERS = ("content-type", "retry-after", "x-request-id", "x-snapshot-identity")
_EVENT = b"data: {"
_TYPES = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class _Problem(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.response = _json({"error": error}, status, headers)


class _HungUp(Exception):
    """The client has closed its connection."""


class ServeApp:
    """The ASGI application `asgi`. Everything here runs on the event loop's thread, but `models` may change any time.

    `models`: name that clients use -> name of the deployment as a model. `api_key`: what clients must send as a bearer
    token. `client`: see ControlPlane.async_completions_client. `on_gone` is called when a deployment turns out to be
    gone, with the client's name of it.
    """

    def __init__(
        self, models: Mapping[str, str], *, client: httpx.AsyncClient, api_key: str, on_gone: Callable[[str], None]
    ) -> None:
        self._models = models
        self._client = client
        self._on_gone = on_gone
        self._created = int(time.time())
        routes = [
            Route("/healthz", _healthz),
            Route("/v1/models", self._list),
            Route("/v1/models/{name:path}", self._show),
            Route("/v1/completions", _Completions(self, "completions"), methods=["POST"]),
            Route("/v1/chat/completions", _Completions(self, "chat/completions"), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _no_such_path, _Problem: _answer_problem, Exception: _unexpected}
        self.asgi: ASGIApp = _Authorised(Starlette(routes=routes, exception_handlers=handlers), api_key)

    async def _list(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._entry(name) for name in self._models]})

    async def _show(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.deployment_of(name)
        return _json(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "cookbook"}

    def deployment_of(self, name: Any) -> str:
        """The deployment behind a model's name. _Problem when there is none."""
        known = f"Served here: {', '.join(self._models)}."
        if not isinstance(name, str) or not name:
            raise _Problem(400, f"model must be the name of a model, got {name!r}. {known}", param="model")
        if name not in self._models:
            raise _Problem(404, f"there is no model {name!r}. {known}", param="model", code="model_not_found")
        return self._models[name]

    async def send(self, name: str, path: str, body: Mapping[str, Any], request_id: str | None) -> httpx.Response:
        """The deployment's answer, to be read and closed. _Problem when it is not a completion."""
        headers = {"content-type": "application/json"} | ({"x-request-id": request_id} if request_id else {})
        content = orjson.dumps({**body, "model": self.deployment_of(name)})
        request = self._client.build_request("POST", path, content=content, headers=headers)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise self.broken(name, error) from error
        if answer.status_code == 200:
            return answer
        try:
            refusal = read_refusal(answer.status_code, await answer.aread())
        finally:
            await answer.aclose()
        raise self._problem(name, refusal, answer.headers)

    def broken(self, name: str, error: httpx.TransportError) -> _Problem:
        """The problem of a request to which the deployment gave no answer. It is looked after at once."""
        if not isinstance(error, httpx.ReadTimeout):
            return self._gone(name, f"{type(error).__name__}: {error}")
        self._on_gone(name)
        return _Problem(504, f"model {name!r} did not answer in time. Ask again, for fewer tokens or as a stream.")

    def _problem(self, name: str, refusal: Refusal, headers: Mapping[str, str]) -> _Problem:
        if refusal.is_gone:
            return self._gone(name, refusal.message)
        if refusal.status in CALLER_STATUSES:  # our key, not the client's
            return _Problem(502, f"the backend refused this server: {refusal.message}")
        kept = {key: headers[key] for key in ("retry-after", "x-request-id") if key in headers}
        is_too_long = refusal.status == 400 and "context" in refusal.message
        code = "context_length_exceeded" if is_too_long else None  # what OpenAI's clients look for
        return _Problem(refusal.status, refusal.message, param=refusal.param, code=code, headers=kept)

    def _gone(self, name: str, why: str) -> _Problem:
        self._on_gone(name)
        message = f"model {name!r} is not there at the moment and is being brought back: {why}"
        return _Problem(503, message, code="model_not_ready", headers={"retry-after": str(RETRY_AFTER_S)})


class _Completions:
    """POST of one kind of completion, at the level of ASGI: a client that hangs up cancels its request."""

    def __init__(self, app: ServeApp, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = _json_object(await _read(receive))
        except _HungUp:
            return
        exchange = asyncio.create_task(self._exchange(scope, body, send))
        hung_up = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait([exchange, hung_up], return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
        finally:
            for task in (exchange, hung_up):
                task.cancel()
            await asyncio.gather(exchange, hung_up, return_exceptions=True)

    async def _exchange(self, scope: Scope, body: dict[str, Any], send: Send) -> None:
        name = body.get("model")
        self._app.deployment_of(name)
        assert isinstance(name, str)
        answer = await self._app.send(name, self._path, body, Request(scope).headers.get("x-request-id"))
        try:
            headers = [(key, answer.headers[key]) for key in _PASSED_HEADERS if key in answer.headers]
            raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers]
            is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            if not is_stream:
                whole = _renamed(await self._whole(answer, name), name)
                raw.append((b"content-length", str(len(whole)).encode()))
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            if is_stream:
                await _pass_stream(answer, name, send)
            else:
                await send({"type": "http.response.body", "body": whole, "more_body": False})
        finally:
            await answer.aclose()

    async def _whole(self, answer: httpx.Response, name: str) -> bytes:
        try:
            return await answer.aread()
        except httpx.TransportError as error:
            raise self._app.broken(name, error) from error


async def _pass_stream(answer: httpx.Response, name: str, send: Send) -> None:
    """Pass events on as they come, with the client's name of the model in them."""
    lines = LineBuffer()
    try:
        async for chunk in answer.aiter_bytes():
            part = _joined(lines.feed(chunk), name)
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
    except httpx.TransportError as error:
        # The status has long been sent. Without the final [DONE] no client takes this for a whole answer.
        message = f"the answer broke off: {type(error).__name__}"
        broken = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        await send(
            {"type": "http.response.body", "body": b"data: " + orjson.dumps(broken) + b"\n\n", "more_body": True}
        )
    await send({"type": "http.response.body", "body": lines.rest, "more_body": False})


def _joined(lines: Iterable[bytes], name: str) -> bytes:
    return b"".join(_renamed_event(line, name) + b"\n" for line in lines)


def _renamed_event(line: bytes, name: str) -> bytes:
    return b"data: " + _renamed(line[len(_EVENT) - 1 :], name) if line.startswith(_EVENT) else line


def _renamed(raw: bytes, name: str) -> bytes:
    """A body of JSON with the client's name of the model, where it names one."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw
    if not isinstance(body, dict) or "model" not in body:
        return raw
    return orjson.dumps({**body, "model": name})


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _Problem(400, f"the body is not JSON: {error}. Send a JSON object.") from None
    if not isinstance(body, dict):
        raise _Problem(400, f"the body is a JSON {type(body).__name__}. Send an object.")
    return body


async def _read(receive: Receive) -> bytes:
    pieces, size = [], 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUp
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_REQUEST_BYTES:
            raise _Problem(413, f"the request has more than {MAX_REQUEST_BYTES} bytes. Send a smaller one.")
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Authorised:
    """Refuses every request without the key: others on this machine, and web pages in a browser, reach the port."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/healthz":
            await self._app(scope, receive, send)
            return
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            await self._app(scope, receive, send)
            return
        what = "the API key is missing or wrong. Send `Authorization: Bearer KEY` with the key of `cookbook serve`."
        headers = {"www-authenticate": "Bearer"}
        await _Problem(401, what, code="invalid_api_key", headers=headers).response(scope, receive, send)


async def _healthz(request: Request) -> Response:
    return _json({"status": "ok"})


def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, _Problem)
    return error.response


def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path} is not served here: /v1/models, /v1/chat/completions, /v1/completions."
    return _Problem(error.status_code, what).response


def _unexpected(request: Request, error: Exception) -> Response:
    return _Problem(500, f"{type(error).__name__}: {error}").response


def _json(value: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, dict(headers or {}), media_type="application/json")
