"""The HTTP face of a trainer worker: the routes of the training API's wire protocol that clients of one job call.

Requests are acknowledged and queued here; only what cannot be attributed to an operation is an HTTP error. Computing
happens on the engine's thread.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cookbook.backend.snapshots import list_manifests
from cookbook.backend.trainer.engine import Engine, Operation
from cookbook.backend.trainer.job import JobSpec
from cookbook.backend.trainer.sessions import Gone, NotFound, Registry

__all__ = ["TrainerApp"]

_ORDERED = (
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "load_adapter",
)
LONG_POLL_S = 20.0
"""How long retrieve_future is held before it answers try_again; clients give up at 45 s."""

_Body = dict[str, Any]


class _BadRequest(Exception):
    """A body that is not JSON, or lacks the fields that say which operation it is."""


class TrainerApp:
    """Routes and their state. Everything here runs on the event loop's thread.

    `last_active` is the monotonic time of the last request other than a health probe.
    """

    def __init__(
        self,
        spec: JobSpec,
        engine: Engine,
        token: str,
        *,
        architecture: str,
        being_written: Callable[[], list[str]] = list,
    ) -> None:
        """
        Args:
            being_written: the names of states that are not complete yet.
        """
        self._spec = spec
        self._being_written = being_written
        self._engine = engine
        self._registry = Registry()
        self._architecture = architecture
        self._infos: dict[str, _Body] = {}
        self.last_active = time.monotonic()
        app = Starlette(
            routes=self._routes(),
            exception_handlers={_BadRequest: _answer(400), NotFound: _answer(404), Gone: _answer(410)},
        )
        self.asgi: ASGIApp = _Authorised(app, token)

    def close_silent_sessions(self) -> None:
        """Close the sessions whose clients have gone away."""
        for session_id in self._registry.silent_sessions(time.monotonic()):
            self._close_session(session_id)

    def _routes(self) -> list[Route]:
        post: dict[str, Callable[[_Body, bytes], Awaitable[Response]]] = {
            "create_session": self._create_session,
            "session_heartbeat": self._session_heartbeat,
            "telemetry": self._telemetry,
            "create_model": self._create_model,
            "get_info": self._get_info,
            "unload_model": self._unload_model,
            "retrieve_future": self._retrieve_future,
        }
        routes = [Route(f"/api/v1/{name}", self._posted(handler), methods=["POST"]) for name, handler in post.items()]
        routes += [Route(f"/api/v1/{name}", self._ordered(name), methods=["POST"]) for name in _ORDERED]
        return [
            *routes,
            Route("/api/v1/healthz", _healthz),
            Route("/api/v1/get_server_capabilities", self._capabilities),
            Route("/api/v1/list_checkpoints", self._list_checkpoints),
        ]

    def _posted(
        self, handler: Callable[[_Body, bytes], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self.last_active = time.monotonic()
            raw = await request.body()
            try:
                return await handler(_parse(raw), raw)
            finally:
                self.last_active = time.monotonic()

        return endpoint

    def _ordered(self, kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def submit(body: _Body, raw: bytes) -> Response:
            model_id, seq_id = _field(body, "model_id", str), _field(body, "seq_id", int)
            if seq_id < 1:
                raise _BadRequest(f"seq_id must be at least 1, got {seq_id}")
            self._registry.heard_of_model(model_id, time.monotonic())
            request_id = self._engine.submit(Operation(kind, model_id, raw), seq_id)
            return _json({"request_id": request_id, "model_id": model_id})

        return self._posted(submit)

    async def _create_session(self, body: _Body, raw: bytes) -> Response:
        metadata = body.get("user_metadata") or {}
        try:
            session_id, superseded = self._registry.open_session(metadata, time.monotonic())
        except (ValueError, TypeError, AttributeError):
            raise _BadRequest(f"user_metadata.cookbook_epoch must be a whole number, got {metadata!r}") from None
        for older in superseded:
            self._close_session(older)
        return _json({"type": "create_session", "session_id": session_id})

    async def _session_heartbeat(self, body: _Body, raw: bytes) -> Response:
        self._registry.heard(_field(body, "session_id", str), time.monotonic())
        return _json({"type": "session_heartbeat"})

    async def _telemetry(self, body: _Body, raw: bytes) -> Response:
        return _json({"status": "accepted"})

    async def _create_model(self, body: _Body, raw: bytes) -> Response:
        session_id, number = _field(body, "session_id", str), _field(body, "model_seq_id", int)
        model_id = self._registry.open_model(session_id, number, time.monotonic())
        request_id = self._engine.submit_once(Operation("create_model", model_id, raw), session_id, f"create-{number}")
        lora = body.get("lora_config") or {}
        rank = lora.get("rank", 0) if isinstance(lora, dict) else 0
        self._infos.setdefault(model_id, self._info(model_id, rank))
        return _json({"request_id": request_id})

    async def _get_info(self, body: _Body, raw: bytes) -> Response:
        model_id = _field(body, "model_id", str)
        self._registry.heard_of_model(model_id, time.monotonic())
        return _json(self._infos[model_id])

    async def _unload_model(self, body: _Body, raw: bytes) -> Response:
        model_id = _field(body, "model_id", str)
        session_id = self._registry.unload_model(model_id, time.monotonic())
        operation = Operation("unload_model", model_id, raw)
        request_id = self._engine.submit_once(operation, session_id, f"unload-{model_id}", ends_model=True)
        return _json({"request_id": request_id, "model_id": model_id})

    async def _retrieve_future(self, body: _Body, raw: bytes) -> Response:
        request_id = _field(body, "request_id", str)
        future = self._engine.future(request_id)
        gone = Gone(
            f"there is no future {request_id}: its model or session is closed, or its trainer process has ended"
        )
        if future is None:
            raise gone
        # Not wait_for: giving up must not cancel the future, which others wait for too.
        waiting = asyncio.wrap_future(future)
        done, _ = await asyncio.wait([waiting], timeout=LONG_POLL_S)
        if not done:
            return _json({"type": "try_again", "request_id": request_id, "queue_state": "active"})
        answer = waiting.result()
        if answer is None:
            raise gone
        return Response(answer, media_type="application/json")

    async def _capabilities(self, request: Request) -> Response:
        self.last_active = time.monotonic()
        model = {"model_name": self._spec.base_model, "max_context_length": self._spec.max_context_length}
        return _json({"supported_models": [model]})

    async def _list_checkpoints(self, request: Request) -> Response:
        self.last_active = time.monotonic()
        writing = self._being_written()  # their names are taken; a load of one waits for it
        manifests = list_manifests(self._spec.checkpoints_dir, self._spec.job_id)
        names = [manifest.name for manifest in manifests if manifest.kind == "state"]
        return _json({"checkpoints": [*names, *(name for name in writing if name not in names)]})

    def _info(self, model_id: str, lora_rank: int) -> _Body:
        data = {
            "arch": self._architecture,
            "model_name": self._spec.base_model,
            "tokenizer_id": str(self._spec.model_dir),
        }
        return {
            "model_id": model_id,
            "model_data": data,
            "is_lora": lora_rank > 0,
            "lora_rank": lora_rank,
            "model_name": self._spec.base_model,
            "type": "get_info",
        }

    def _close_session(self, session_id: str) -> None:
        for model_id in self._registry.close_session(session_id):
            self._infos.pop(model_id, None)
            self._engine.discard(model_id)
            self._engine.run_soon(Operation("unload_model", model_id, b""))
        self._engine.discard(session_id)


class _Authorised:
    """Refuses every request without the token in X-Api-Key: other users of this machine can reach the port too."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = [value for name, value in scope["headers"] if name == b"x-api-key"]
        if scope["type"] != "http" or not (keys and hmac.compare_digest(keys[0], self._token)):
            response = JSONResponse({"detail": "X-Api-Key is missing or wrong: use the backend's token"}, 401)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _answer(status: int) -> Callable[[Request, Exception], Response]:
    return lambda request, error: JSONResponse({"detail": str(error)}, status)


async def _healthz(request: Request) -> Response:
    return _json({"status": "ok"})


def _json(value: _Body) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _parse(raw: bytes) -> _Body:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise _BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def _field(body: _Body, name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _BadRequest(f"{name} must be {kind.__name__}, got {value!r}")
    return value
