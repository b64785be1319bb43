"""The reverse proxy from /training/v1/rlorTrainerJobs/{account}/{job}/... to the job's worker.

Bodies are streamed in both directions, whatever their size. A worker may hold a long poll; when its client goes away,
the request to the worker is dropped too. A job whose worker is gone answers 410: its weights in memory are lost, and
the client must restore them, not try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import httpx
from starlette.types import Receive, Scope, Send

from cookbook.backend.control_plane.answers import ApiError, Code
from cookbook.backend.control_plane.context import require_account
from cookbook.backend.control_plane.lifecycle import Lifecycle
from cookbook.backend.control_plane.store import Job, Store

__all__ = ["PROXY_TIMEOUT", "Proxy"]

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


class _ClientGone(Exception):
    """The client closed its connection in the middle of its request."""


class _RequestBody:
    """The body of the incoming request, and the news that its sender has gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._complete = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises _ClientGone when it breaks off."""
        while not self._complete.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            if not message.get("more_body", False):
                self._complete.set()
            yield message.get("body", b"")

    async def sender_gone(self) -> None:
        """Return when the client has closed its connection after the whole body was read."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Proxy:
    """An ASGI application for the routes of trainer jobs' workers."""

    def __init__(self, store: Store, lifecycle: Lifecycle, client: httpx.AsyncClient, token: str) -> None:
        self._store = store
        self._lifecycle = lifecycle
        self._client = client
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; ApiError 404, 410, 503 or 504 when the worker cannot."""
        parameters = scope["path_params"]
        require_account(parameters["account"])
        job_id = parameters["job"]
        base_url = self._base_url(job_id)
        body = _RequestBody(receive)
        request = self._client.build_request(
            scope["method"], base_url + _rest_of(scope), headers=self._headers(scope), content=body.chunks()
        )
        exchange = asyncio.create_task(self._exchange(job_id, request, send))
        client_gone = asyncio.create_task(body.sender_gone())
        try:
            await asyncio.wait([exchange, client_gone], return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
        except _ClientGone:
            pass
        finally:
            for task in (exchange, client_gone):
                task.cancel()
            await asyncio.gather(exchange, client_gone, return_exceptions=True)

    def _base_url(self, job_id: str) -> str:
        """Where the job's worker answers; ApiError when it is not there, not yet, or not any more."""
        job = self._store.job(job_id)
        if job is None:
            raise ApiError(Code.NOT_FOUND, f"there is no trainer job {job_id!r}.")
        if not job.is_live:
            raise _lost(job)
        worker = self._lifecycle.worker(job_id)
        if worker is None:
            raise ApiError(Code.UNAVAILABLE, f"trainer job {job_id} is starting; try again in a moment.")
        return worker.base_url

    def _headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        kept = [(name, value) for name, value in scope["headers"] if name not in _NOT_FORWARDED]
        if not any(name == b"content-length" for name, _ in kept):
            # Without a length a body comes in chunks; a request without a body must then say so.
            chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
            kept += [] if chunked else [(b"content-length", b"0")]
        return [*kept, (b"x-api-key", self._token)]

    async def _exchange(self, job_id: str, request: httpx.Request, send: Send) -> None:
        response = await self._answer(job_id, request)
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

    async def _answer(self, job_id: str, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except httpx.ReadTimeout as error:
            raise ApiError(
                Code.DEADLINE_EXCEEDED,
                f"trainer job {job_id} did not answer {request.url.path} in {PROXY_TIMEOUT.read} s.",
            ) from error
        except httpx.TransportError as error:
            await asyncio.sleep(_DEATH_SHOWS_S)
            job = self._lifecycle.look(job_id)
            if not job.is_live:
                raise _lost(job) from error
            raise ApiError(
                Code.UNAVAILABLE,
                f"trainer job {job_id} broke off the connection ({type(error).__name__}); try again in a moment.",
            ) from error


def _lost(job: Job) -> ApiError:
    state = job.state.removeprefix("JOB_STATE_")
    return ApiError(
        Code.LOST,
        f"trainer job {job.job_id} is {state}: {job.status_message}. Its weights in memory are gone: "
        "resume it or create another one, and load a checkpoint.",
    )


def _rest_of(scope: Scope) -> str:
    """Path and query below the job, as they were sent (still percent-encoded)."""
    raw_path: bytes = scope["raw_path"]
    rest = raw_path.split(b"/", _PREFIX_SLASHES)[_PREFIX_SLASHES]
    query: bytes = scope["query_string"]
    return "/" + rest.decode("ascii") + ("?" + query.decode("ascii") if query else "")
