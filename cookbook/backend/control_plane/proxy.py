"""The reverse proxy to the workers, and the way to it from /training/v1/rlorTrainerJobs/{account}/{job}/...

Bodies are streamed in both directions, whatever their size. A worker may hold a long poll; when its client goes away,
the request to the worker is dropped too. A trainer job whose worker is gone answers 410: its weights in memory are
lost, and the client must restore them, not try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx
from starlette.types import Receive, Scope, Send

from cookbook.backend.control_plane.answers import ApiError, Code
from cookbook.backend.control_plane.context import Plane, require_account
from cookbook.backend.control_plane.lifecycle import Lifecycle
from cookbook.backend.control_plane.store import Job

__all__ = ["PROXY_TIMEOUT", "ClientGone", "Proxy", "RequestBody", "Target", "to_trainer"]

logger = logging.getLogger(__name__)

PROXY_TIMEOUT = httpx.Timeout(connect=5.0, read=300.0, write=60.0, pool=None)
"""Read: far above the longest long poll (30 s) and all client timeouts; a client that gives up is noticed anyway."""

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer".split()
    + [b"transfer-encoding", b"upgrade"]
)
_NOT_FORWARDED = _HOP_BY_HOP | {b"host", b"expect", b"authorization", b"x-api-key"}
_NOT_RETURNED = _HOP_BY_HOP | {b"date", b"server"}
_DEATH_SHOWS_S = 0.05  # a dying process may close its sockets a moment before it lets go of its lock
_PREFIX_SLASHES = 6  # of "/training/v1/rlorTrainerJobs/{account}/{job}/"


class ClientGone(Exception):
    """The client closed its connection in the middle of its request."""


class RequestBody:
    """The body of the incoming request, and the news that its sender has gone. Streamed, unless it was read before."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._complete = asyncio.Event()
        self._whole: bytes | None = None

    async def read(self, *, at_most: int) -> bytes:
        """The whole body, kept to be passed on.

        Raises:
            ApiError: it has more than `at_most` bytes (413).
            ClientGone: it breaks off.
        """
        pieces, size = [], 0
        async for piece in self._chunks():
            pieces.append(piece)
            size += len(piece)
            if size > at_most:
                raise ApiError(Code.TOO_LARGE, f"the request body has more than {at_most} bytes. Send a smaller one.")
        self._whole = b"".join(pieces)
        return self._whole

    def content(self) -> bytes | AsyncIterator[bytes]:
        """What to send to the worker. The iterator raises ClientGone when the body breaks off."""
        return self._chunks() if self._whole is None else self._whole

    async def sender_gone(self) -> None:
        """Return when the client has closed its connection after the whole body was read."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _chunks(self) -> AsyncIterator[bytes]:
        while not self._complete.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            if not message.get("more_body", False):
                self._complete.set()
            yield message.get("body", b"")


@dataclass(frozen=True)
class Target:
    """The worker that a request is for, and how it is asked.

    `called` is what messages call its job, `path` the path and query at the worker, `headers` are added to the
    client's. `gone` makes the error for a job without a worker, from `called` and the job (None: there is no such
    job). `timeout_s` is how long the worker may be silent, None for as long as the client waits.
    """

    lifecycle: Lifecycle
    job_id: str
    called: str
    path: str
    gone: Callable[[str, Job | None], ApiError]
    headers: tuple[tuple[bytes, bytes], ...] = ()
    timeout_s: float | None = PROXY_TIMEOUT.read


class Proxy:
    """Passes requests on to workers, and their answers back."""

    def __init__(self, client: httpx.AsyncClient, token: str) -> None:
        self._client = client
        self._token = token.encode()

    async def forward(self, scope: Scope, send: Send, body: RequestBody, target: Target) -> None:
        """Answer one request; `target.gone`, or ApiError 503 or 504, when the worker cannot."""
        request = self._client.build_request(
            scope["method"],
            _base_url(target) + target.path,
            headers=self._headers(scope, target),
            content=body.content(),
            timeout=httpx.Timeout(**{**PROXY_TIMEOUT.as_dict(), "read": target.timeout_s}),
        )
        exchange = asyncio.create_task(self._exchange(target, request, send))
        client_gone = asyncio.create_task(body.sender_gone())
        try:
            await asyncio.wait([exchange, client_gone], return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
        except ClientGone:
            pass
        finally:
            for task in (exchange, client_gone):
                task.cancel()
            await asyncio.gather(exchange, client_gone, return_exceptions=True)

    def _headers(self, scope: Scope, target: Target) -> list[tuple[bytes, bytes]]:
        ours = {name for name, _ in target.headers}
        kept = [(name, value) for name, value in scope["headers"] if name not in _NOT_FORWARDED | ours]
        if not any(name == b"content-length" for name, _ in kept):
            # Without a length a body comes in chunks; a request without a body must then say so.
            chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
            kept += [] if chunked else [(b"content-length", b"0")]
        return [*kept, *target.headers, (b"x-api-key", self._token)]

    async def _exchange(self, target: Target, request: httpx.Request, send: Send) -> None:
        response = await self._answer(target, request)
        try:
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            headers = [(name, value) for name, value in headers if name not in _NOT_RETURNED]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            with contextlib.suppress(httpx.HTTPError):
                await response.aclose()

    async def _answer(self, target: Target, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except httpx.ReadTimeout as error:
            raise ApiError(
                Code.DEADLINE_EXCEEDED,
                f"{target.called} did not answer {request.url.path} in {target.timeout_s} s.",
            ) from error
        except httpx.TransportError as error:
            await asyncio.sleep(_DEATH_SHOWS_S)
            job = target.lifecycle.look(target.job_id)
            if job is None or not job.is_live:
                raise target.gone(target.called, job) from error
            raise ApiError(
                Code.UNAVAILABLE,
                f"{target.called} broke off the connection ({type(error).__name__}); try again in a moment.",
            ) from error


def _base_url(target: Target) -> str:
    """Where the worker answers; ApiError when it is not there, not yet, or not any more."""
    job = target.lifecycle.job(target.job_id)
    if job is None or not job.is_live:
        raise target.gone(target.called, job)
    worker = target.lifecycle.worker(target.job_id)
    if worker is None:
        raise ApiError(Code.UNAVAILABLE, f"{target.called} is starting; try again in a moment.")
    return worker.base_url


async def to_trainer(scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a request below /training/v1/rlorTrainerJobs/{account}/{job} on to the job's worker."""
    plane: Plane = scope["app"].state.plane
    parameters = scope["path_params"]
    require_account(parameters["account"])
    job_id = parameters["job"]
    target = Target(plane.trainers, job_id, f"trainer job {job_id}", _rest_of(scope), _lost)
    await plane.proxy.forward(scope, send, RequestBody(receive), target)


def _lost(called: str, job: Job | None) -> ApiError:
    if job is None:
        return ApiError(Code.NOT_FOUND, f"there is no {called}.")
    state = job.state.removeprefix("JOB_STATE_")
    return ApiError(
        Code.LOST,
        f"{called} is {state}: {job.status_message}. Its weights in memory are gone: "
        "resume it or create another one, and load a checkpoint.",
    )


def _rest_of(scope: Scope) -> str:
    """Path and query below the job, as they were sent (still percent-encoded)."""
    raw_path: bytes = scope["raw_path"]
    rest = raw_path.split(b"/", _PREFIX_SLASHES)[_PREFIX_SLASHES]
    query: bytes = scope["query_string"]
    return "/" + rest.decode("ascii") + ("?" + query.decode("ascii") if query else "")
