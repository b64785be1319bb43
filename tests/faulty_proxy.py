"""A proxy before a backend that spoils requests: seeded, by a table of endpoints, and counted. One thread, one loop.

Which faults are legal where: tests/faults/proxy_table.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

__all__ = ["FAULTS", "Endpoint", "FaultyProxy", "Legal"]

_REASONS = {
    "400": "Bad Request",
    "404": "Not Found",
    "408": "Request Timeout",
    "409": "Conflict",
    "425": "Too Early",
    "429": "Too Many Requests",
    "500": "Internal Server Error",
    "502": "Bad Gateway",
    "503": "Service Unavailable",
    "504": "Gateway Timeout",
}

FAULTS: Mapping[str, str] = {
    **{status: f"status {status}; the backend does not hear of the request" for status in _REASONS},
    "400-empty": "status 400 without a body, as a load balancer in between gives it",
    "504-done": "status 504 after the backend has done what was asked",
    "reset": "the connection ends before the backend hears of the request",
    "lost": "the connection ends after the backend has done what was asked, before the answer",
    "cut": "the connection ends in the middle of the answer",
    "hang": "no answer for `hang_s`; then the connection ends",
    "slow": "the answer comes `slow_s` late",
    "twice": "the backend gets the request twice, as from a client that has sent it again",
    "try-again": "a future that is not ready yet",
    "408-try-again": "the same, with status 408",
    "metadata": "a future's size instead of its result, which is to be asked for again",
    "stream-empty": "a stream of completions that ends cleanly before anything was said",
    "stream-error": "a stream of completions that says the upstream is overloaded",
    "unfinished": "an operation that goes on after the backend has in truth finished it",
}
"""Name -> what happens."""


@dataclass(frozen=True)
class Legal:
    """A fault that an endpoint may show."""

    fault: str
    section: str = ""
    """Of the training API's wire protocol, that says so."""
    weight: int = 1
    """How often it comes, relative to the endpoint's others."""


@dataclass(frozen=True)
class Endpoint:
    """What is asked for with one method on paths of one form, and how it may fail."""

    name: str
    method: str
    """"" = any."""
    path: str
    """Regular expression of the whole path, without the query."""
    legal: tuple[Legal, ...]
    rate: float
    """Share of the requests that meet a fault."""
    in_a_row: int | None = None
    """At most so many faults for one logical request before it is answered; None = no bound."""
    key: str | None = None
    """What the attempts of one logical request share: None = path and body; "" = the endpoint; else a body's field."""

    def __post_init__(self) -> None:
        unknown = {legal.fault for legal in self.legal} - set(FAULTS)
        assert not unknown, f"unknown faults {unknown}"

    def matches(self, method: str, path: str) -> bool:
        return self.method in ("", method) and re.fullmatch(self.path, path) is not None


@dataclass(frozen=True)
class _Request:
    head: bytes
    body: bytes
    method: str
    path: str
    """With the query."""

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object in the body."""
        try:
            return dict(json.loads(self.body))
        except (ValueError, TypeError):
            return {}

    def logical(self, endpoint: Endpoint) -> tuple[str, str]:
        """The same for all attempts of one logical request."""
        if endpoint.key is None:
            which = self.path + hashlib.sha256(self.body).hexdigest()
        else:
            which = str(self.fields.get(endpoint.key, "")) if endpoint.key else ""
        return endpoint.name, which


_COMMON = ("425", "429", "503", "reset", "lost", "cut")


class FaultyProxy:
    """Passes HTTP/1.1 requests on to `target`; those of the table's endpoints may meet a fault.

    `met` counts (endpoint, fault) as they happen, `passed` what was passed on unspoiled, by endpoint. The faults of an
    endpoint are dealt from a shuffled deck, so that each of them comes up; the same seed gives each endpoint the same
    sequence, in the order in which its requests come in.

    >>> with FaultyProxy(backend.base_url, LEGAL_FAULTS, seed=1) as proxy:  # doctest: +SKIP
    ...     train(proxy.url)
    >>> proxy.met["optim_step", "lost"]  # doctest: +SKIP
    3
    """

    def __init__(
        self, target: str, table: Sequence[Endpoint], *, seed: int | str = 0, hang_s: float = 2.0, slow_s: float = 0.5
    ) -> None:
        self.met: Counter[tuple[str, str]] = Counter()
        self.passed: Counter[str] = Counter()
        self._host, self._port = urlsplit(target).hostname or "", urlsplit(target).port or 80
        self._table = tuple(table)
        self._seed = seed
        self._hang_s, self._slow_s = hang_s, slow_s
        self._randoms: dict[str, random.Random] = {}
        self._decks: dict[str, list[str]] = {}
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._unfinished: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._handle, "127.0.0.1", 0), self._loop
        ).result()

    @classmethod
    def everywhere(
        cls, target: str, *faults: str, rate: float, path: str = ".*", in_a_row: int | None = None, **options: Any
    ) -> Self:
        """The same faults on all requests of these paths; by default what any server shows."""
        legal = tuple(Legal(fault) for fault in faults or _COMMON)
        return cls(target, [Endpoint("any", "", path, legal, rate, in_a_row)], **options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def counts(self) -> Counter[str]:
        """Fault -> how often it happened, over all endpoints."""
        found: Counter[str] = Counter()
        for (_, fault), count in self.met.items():
            found[fault] += count
        return found

    @property
    def num_faults(self) -> int:
        """Requests that met one."""
        return sum(self.met.values())

    def close(self) -> None:
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _stop(self) -> None:
        self._server.close()
        handlers = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await self._server.wait_closed()

    # -- which fault ---------------------------------------------------------------------------------------------------

    def _endpoint(self, request: _Request) -> Endpoint | None:
        path = urlsplit(request.path).path
        return next((endpoint for endpoint in self._table if endpoint.matches(request.method, path)), None)

    def _draw(self, endpoint: Endpoint, request: _Request) -> str | None:
        """What becomes of a request; None = it passes."""
        chance = self._randoms.setdefault(endpoint.name, random.Random(f"{self._seed} {endpoint.name}"))
        drawn = chance.random()
        which = request.logical(endpoint)
        is_enough = endpoint.in_a_row is not None and self._in_a_row[which] >= endpoint.in_a_row
        if drawn >= endpoint.rate or is_enough or not endpoint.legal:
            return None
        deck = self._decks.setdefault(endpoint.name, [])
        if not deck:
            deck += [legal.fault for legal in endpoint.legal for _ in range(legal.weight)]
            chance.shuffle(deck)
        return deck.pop()

    def _count(self, endpoint: Endpoint | None, request: _Request, fault: str | None) -> None:
        if endpoint is None:
            self.passed["unknown"] += 1
        elif fault is None:
            self.passed[endpoint.name] += 1
            self._in_a_row.pop(request.logical(endpoint), None)
        else:
            self.met[endpoint.name, fault] += 1
            self._in_a_row[request.logical(endpoint)] += 1

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one_request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # either side has gone, or the proxy closes
        finally:
            writer.close()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether another may follow on this connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(_headers(head).get("content-length", "0")))
        method, path = head.split(b" ", 2)[:2]
        request = _Request(head, body, method.decode(), path.decode())
        endpoint = self._endpoint(request)
        fault = self._draw(endpoint, request) if endpoint is not None else None
        if fault == "metadata" and not request.fields.get("allow_metadata_only"):
            fault = "try-again"  # a size may be told once
        self._count(endpoint, request, fault)
        made = _made(fault, request)
        if made is not None:
            writer.write(made)
            await writer.drain()
            return True
        if fault == "reset":
            _reset(writer)
        elif fault == "hang":
            await _first(asyncio.sleep(self._hang_s), reader.read(1))
            _reset(writer)
        else:
            await _first(self._pass_on(request, writer, fault), reader.read(1))
        return False

    async def _pass_on(self, request: _Request, writer: asyncio.StreamWriter, fault: str | None) -> None:
        if fault is None:
            await self._stream(request, writer)
            return
        if fault == "twice":
            await self._ask(request)
        answer = await self._ask(request)
        if fault == "slow":
            await asyncio.sleep(self._slow_s)
        if fault == "cut":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
        elif fault == "504-done":
            writer.write(_status("504", _PAGE))
        elif fault == "metadata":
            writer.write(_sized(answer))
        elif fault == "unfinished":
            writer.write(_unfinished(answer))
        elif fault != "lost":
            writer.write(answer)
        if fault in ("cut", "lost"):
            _reset(writer)
        else:
            await writer.drain()

    async def _stream(self, request: _Request, writer: asyncio.StreamWriter) -> None:
        """The answer as it comes."""
        upstream_reader, upstream = await asyncio.open_connection(self._host, self._port)
        try:
            upstream.write(_closing(request))
            while piece := await upstream_reader.read(65536):
                writer.write(piece)
                await writer.drain()
        finally:
            upstream.close()

    async def _ask(self, request: _Request) -> bytes:
        """The whole answer."""
        upstream_reader, upstream = await asyncio.open_connection(self._host, self._port)
        try:
            upstream.write(_closing(request))
            return await upstream_reader.read(-1)
        finally:
            upstream.close()


def _headers(head: bytes) -> Mapping[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _closing(request: _Request) -> bytes:
    """A request whose connection ends with the answer."""
    lines = [line for line in request.head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"connection: close"]) + b"\r\n\r\n" + request.body


# -- answers -----------------------------------------------------------------------------------------------------------

_MESSAGE = b'{"error": {"message": "made by the faulty proxy"}}'
_PAGE = b"<html><body>made by the faulty proxy</body></html>"
_OVERLOADED = b'data: {"error": {"message": "upstream is overloaded", "status_code": 503}}\n\ndata: [DONE]\n\n'


def _made(fault: str | None, request: _Request) -> bytes | None:
    """The answer of a fault that needs no backend."""
    waiting = {"type": "try_again", "request_id": request.fields.get("request_id"), "queue_state": "active"}
    if fault in ("try-again", "408-try-again"):
        return _status("200" if fault == "try-again" else "408", json.dumps(waiting).encode())
    if fault == "400-empty":
        return _status("400", b"")
    if fault == "stream-empty":
        return _status("200", b": nothing yet\n\n", "text/event-stream")
    if fault == "stream-error":
        return _status("200", _OVERLOADED, "text/event-stream")
    if fault in _REASONS:
        return _status(fault, _PAGE if fault in ("502", "504") else _MESSAGE)
    return None


def _status(status: str, content: bytes, kind: str | None = None) -> bytes:
    """An answer; the pauses that it asks for are as short as they can be."""
    kind = kind or ("text/html" if content == _PAGE else "application/json")
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'OK')}",
        f"content-type: {kind}",
        f"content-length: {len(content)}",
    ]
    if status in ("408", "409", "429") or status.startswith("5"):
        lines += ["retry-after: 0", "retry-after-ms: 1"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def _sized(answer: bytes) -> bytes:
    """The size of a future's result in its place; what says that there is none yet stays as it is."""
    head, _, content = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b'"try_again"' in content[:200]:
        return answer
    told = {"status": "complete_metadata", "response_payload_size": len(content)}
    return _status("200", json.dumps(told).encode())


def _unfinished(answer: bytes) -> bytes:
    """An answer with an operation that is done, as it was before it was."""
    head, _, content = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return answer
    fields = json.loads(content)
    name = fields["operation"]["name"]
    return _status("200", json.dumps({"operation": {"name": name, "done": False}}).encode())


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a TCP reset."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _first(*coroutines: Any) -> None:
    """Wait for the first to end, cancel the others: a client that hangs up ends its request."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
