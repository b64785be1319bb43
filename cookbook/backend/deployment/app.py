"""The HTTP face of a deployment worker: completions and chat as OpenAI clients and the SDK ask for them, and hot load.

The same handlers answer under the control plane's paths (`/inference/v1/...`, `/hot_load/v1/models/hot_load`), so that
a client can also talk to a worker directly. Computing happens on the engine's thread.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cookbook.backend.deployment.answers import DONE_EVENT, Choice, Reply, event, served_version
from cookbook.backend.deployment.engine import Engine, EngineClosed, QueueFull
from cookbook.backend.deployment.generation import Generation, Piece
from cookbook.backend.deployment.spec import DeploymentSpec, trainer_job_id
from cookbook.backend.deployment.tokenizer import TextModel
from cookbook.backend.deployment.weights import HotLoader
from cookbook.backend.deployment.wire import BadRequest, Call, json_object, read_chat, read_completion

__all__ = ["LOAD_HOLD_S", "SNAPSHOT_HEADER", "TRAINER_JOB_HEADER", "DeploymentApp"]

logger = logging.getLogger(__name__)

TRAINER_JOB_HEADER = "x-cookbook-trainer-job"
"""On POST /hot_load: the trainer job that the deployment is linked to now, which may have changed since it started."""

SNAPSHOT_HEADER = "x-snapshot-identity"
"""On answers: the snapshot that sampled them, empty for the base model."""

LOAD_HOLD_S = 10.0
"""How long a request that comes during a hot load waits for it to end before it is answered 425.

Most loads are over in less than a second, and a client that got 425 comes back after 5 s at the earliest.
"""
_RETRY_AFTER_S = 1

_T = TypeVar("_T")


class _TooEarly(Exception):
    """Weights are being loaded, and for long."""


class _Gone(Exception):
    """The client has closed its connection: there is nobody to answer."""


class DeploymentApp:
    """Routes and their state. Everything here runs on the event loop's thread.

    `last_active` is the monotonic time when somebody last wanted something: health and status questions do not count.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        engine: Engine,
        loader: HotLoader,
        text: TextModel,
        token: str,
        *,
        load_hold_s: float = LOAD_HOLD_S,
    ) -> None:
        self._spec = spec
        self._engine = engine
        self._loader = loader
        self._text = text
        self._load_hold_s = load_hold_s
        self._created = int(time.time())
        self.last_active = time.monotonic()
        retry_after = {"retry-after": str(_RETRY_AFTER_S)}
        app = Starlette(
            routes=self._routes(),
            exception_handlers={
                BadRequest: _error(400),
                QueueFull: _error(429, retry_after),
                _TooEarly: _error(425, retry_after),
                EngineClosed: _error(503),
                Exception: _error(500),
            },
        )
        self.asgi: ASGIApp = _Authorised(app, token)

    @property
    def busy(self) -> bool:
        """Whether completions or a load are in work."""
        return self._engine.running + self._engine.waiting > 0 or self._loader.loading

    def _routes(self) -> list[Route | Mount]:
        inference = [
            Route("/v1/completions", self._noted(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._noted(self._chat), methods=["POST"]),
            Route("/v1/models", self._noted(self._models)),
        ]
        hot_load = [
            route
            for path in ("/hot_load", "/hot_load/v1/models/hot_load")
            for route in (Route(path, self._noted(self._load), methods=["POST"]), Route(path, self._load_status))
        ]
        own = [Route("/api/v1/healthz", _healthz), Route("/status", self._status)]
        return [*inference, Mount("/inference", routes=inference), *hot_load, *own]

    def _noted(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def noted(request: Request) -> Response:
            self.last_active = time.monotonic()
            try:
                return await endpoint(request)
            except (ClientDisconnect, _Gone):
                return Response(status_code=400)  # nobody is there to read it
            finally:
                self.last_active = time.monotonic()

        return noted

    async def _completions(self, request: Request) -> Response:
        prompts, call = read_completion(json_object(await request.body()), self._text.vocab_size)
        # A long text is tokenized beside the loop, which has others to answer.
        ids = [await asyncio.to_thread(self._text.encode, p) if isinstance(p, str) else p for p in prompts]
        return await self._generate(request, call, ids, chat=False)

    async def _chat(self, request: Request) -> Response:
        messages, call = read_chat(json_object(await request.body()))
        ids = await asyncio.to_thread(self._text.render, messages)
        return await self._generate(request, call, [ids], chat=True)

    async def _generate(self, request: Request, call: Call, prompts: list[tuple[int, ...]], *, chat: bool) -> Response:
        in_work = self._engine.running + self._engine.waiting + 1
        reply = Reply(
            serial=secrets.token_hex(12),
            model=self._spec.name,
            chat=chat,
            call=call,
            decode=self._text.decode,
            num_concurrent=in_work,
            started=time.monotonic(),
        )
        parts = self._parts(_Client(request.receive), reply, prompts)
        # Up to here an answer has no status yet, so what goes wrong before the first part is a proper error.
        version, first = await anext(parts)
        headers = {} if version is None else {SNAPSHOT_HEADER: version}
        if (request_id := request.headers.get("x-request-id")) is not None:
            headers["x-request-id"] = request_id
        kind = "text/event-stream" if call.stream else "application/json"
        return _InParts(first, parts, headers | {"content-type": kind})

    async def _parts(
        self, client: _Client, reply: Reply, prompts: list[tuple[int, ...]]
    ) -> AsyncGenerator[tuple[str | None, bytes]]:
        """The answer's bytes as they come, each with the snapshot served so far. Cancels the work if it is closed."""
        generation: Generation | None = None
        try:
            await client.wait(self._ready())
            generation = Generation(self._engine, self._text, reply.call, prompts)
            if reply.call.stream:
                events = _events(generation.pieces(), reply, prompts)
                while (part := await client.wait(_next(events))) is not None:
                    self.last_active = time.monotonic()
                    yield part
            else:
                choices = await client.wait(generation.choices())
                yield served_version(choices), orjson.dumps(reply.whole(choices))
        finally:
            client.close()
            if generation is not None:
                generation.cancel()

    async def _ready(self) -> None:
        """Wait while weights are swapped. _TooEarly when that takes long."""
        if not await self._loader.settled(self._load_hold_s):
            raise _TooEarly(f"snapshot {self._loader.target!r} is being loaded: try again in a moment.")

    async def _models(self, request: Request) -> Response:
        model = {
            "id": self._spec.name,
            "object": "model",
            "created": self._created,
            "owned_by": self._spec.account,
            "base_model": self._spec.base_model,
            "snapshot_identity": self._engine.version,
            "context_length": self._engine.max_context,
        }
        return _json({"object": "list", "data": [model]})

    async def _load(self, request: Request) -> Response:
        body = json_object(await request.body())
        identity = body.get("identity")
        if not isinstance(identity, str) or not identity:
            raise BadRequest(f"identity must be the name of a snapshot, got {identity!r}.", "identity")
        reset = body.get("reset_prompt_cache", True)
        if not isinstance(reset, bool):
            raise BadRequest(f"reset_prompt_cache must be true or false, got {reset!r}.", "reset_prompt_cache")
        job = self._spec.trainer_job
        if (linked := request.headers.get(TRAINER_JOB_HEADER)) is not None:
            try:
                job = trainer_job_id(linked)
            except ValueError as error:
                raise BadRequest(f"header {TRAINER_JOB_HEADER}: {error}") from None
        await self._loader.load(identity, job, reset_prompt_cache=reset)
        return _json(self._loader.status())

    async def _load_status(self, request: Request) -> Response:
        return _json(self._loader.status())

    async def _status(self, request: Request) -> Response:
        engine = self._engine
        return _json({"running": engine.running, "waiting": engine.waiting, "version": engine.version})


async def _events(
    pieces: AsyncIterator[Piece], reply: Reply, prompts: list[tuple[int, ...]]
) -> AsyncGenerator[tuple[str, bytes]]:
    """A stream's events, each with the snapshot that it comes from."""
    opened: set[int] = set()
    choices: list[Choice] = []
    num_choices = len(prompts) * reply.call.n
    try:
        async for piece in pieces:
            index, version = piece.index, piece.version
            bodies = []
            if index not in opened and not reply.call.raw_output:
                bodies += reply.opening(index, prompts[index // reply.call.n], version)
            opened.add(index)
            if piece.choice is None:
                bodies.append(reply.delta(index, piece.text, version))
            elif reply.call.raw_output:
                bodies.append(reply.whole_event(piece.choice))
            else:
                bodies.append(reply.closing(piece.choice, piece.text))
            if piece.choice is not None:
                choices.append(piece.choice)
                if len(choices) == num_choices:
                    bodies[-1:] = reply.last(bodies[-1], choices)
            yield version, b"".join(map(event, bodies))
    except Exception as error:
        if not opened:
            raise
        logger.exception("a stream broke off")
        # The status has long been sent; without the final [DONE] no client takes this for a whole answer.
        yield "", event({"error": _description(500, error)})
    else:
        yield "", DONE_EVENT


async def _next(parts: AsyncGenerator[tuple[str, bytes]]) -> tuple[str, bytes] | None:
    return await anext(parts, None)


class _InParts(Response):
    """An answer whose first part is there and whose others come as they are made."""

    def __init__(self, first: bytes, rest: AsyncGenerator[tuple[str | None, bytes]], headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for _, part in self._rest:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except _Gone:
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Client:
    """The other end of a request whose body has been read: waits for work only as long as somebody is there."""

    def __init__(self, receive: Receive) -> None:
        self._hung_up = asyncio.create_task(_hung_up(receive))

    async def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is cancelled, and _Gone raised, when the client goes away."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._hung_up], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise _Gone
        return task.result()

    def close(self) -> None:
        self._hung_up.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Authorised:
    """Refuses every request without the token, in X-Api-Key or as a bearer: others on this machine reach the port."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", []))
        scheme, _, credential = headers.get(b"authorization", b"").partition(b" ")
        offered = (headers.get(b"x-api-key", b""), credential if scheme.lower() == b"bearer" else b"")
        if scope["type"] == "http" and any(hmac.compare_digest(key, self._token) for key in offered):
            await self._app(scope, receive, send)
        else:
            refusal = PermissionError("X-Api-Key is missing or wrong: use the backend's token.")
            await _json({"error": _description(401, refusal)}, 401)(scope, receive, send)


def _error(status: int, headers: dict[str, str] | None = None) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        return _json({"error": _description(status, error)}, status, headers)

    return answer


def _description(status: int, error: Exception) -> dict[str, Any]:
    """An error as OpenAI clients read it; `status_code` is what the SDK looks for inside a stream."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error", 425: "not_ready_error"}
    message = str(error) if status != 500 else f"{type(error).__name__}: {error}"
    param = error.param if isinstance(error, BadRequest) else None
    kind = kinds.get(status, "server_error")
    return {"message": message, "type": kind, "param": param, "code": status, "status_code": status}


async def _healthz(request: Request) -> Response:
    return _json({"status": "ok"})


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")
