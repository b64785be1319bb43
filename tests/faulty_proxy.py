"""A proxy before a backend that spoils requests: seeded, on chosen paths, and counted. One thread, one event loop."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Self
from urllib.parse import urlsplit

__all__ = ["FAULTS", "FaultyProxy"]

FAULTS = ("425", "429", "503", "reset", "lost", "cut", "hang")
"""Statuses come from the proxy. reset: the connection ends before the backend hears of the request. lost: it ends after
the backend has answered, before the answer. cut: it ends in the middle of the answer. hang: no answer for `hang_s`."""

_REASONS = {"425": "Too Early", "429": "Too Many Requests", "503": "Service Unavailable"}


class FaultyProxy:
    """Passes HTTP/1.1 requests on to `target`; one in 1/rate of those with one of `paths` in it meets a fault.

    `counts` has a number for each fault that happened, and "passed". The same seed gives the same sequence of faults,
    in the order in which requests come in. `rate` and `faults` may change at any time.

    >>> with FaultyProxy(backend.base_url, rate=0.1, paths=["/completions"]) as proxy:  # doctest: +SKIP
    ...     sample(proxy.url)
    >>> proxy.counts["reset"]  # doctest: +SKIP
    3
    """

    def __init__(
        self,
        target: str,
        *,
        rate: float = 0.1,
        paths: Sequence[str] = ("",),
        faults: Sequence[str] = ("425", "429", "503", "reset", "lost", "cut"),
        seed: int = 0,
        hang_s: float = 3600.0,
    ) -> None:
        unknown = set(faults) - set(FAULTS)
        assert not unknown, f"unknown faults {unknown}"
        self.rate = rate
        self.faults = tuple(faults)
        self.counts: Counter[str] = Counter()
        self._host, self._port = urlsplit(target).hostname or "", urlsplit(target).port or 80
        self._paths = tuple(paths)
        self._random = random.Random(seed)
        self._hang_s = hang_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._handle, "127.0.0.1", 0), self._loop
        ).result()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def num_faults(self) -> int:
        """Requests that met one."""
        return sum(self.counts.values()) - self.counts["passed"]

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

    def _fault(self, path: str) -> str | None:
        """What becomes of the next request; None = it passes."""
        if not any(part in path for part in self._paths):
            return None
        drawn, kind = self._random.random(), self._random.choice(self.faults) if self.faults else ""
        return kind if drawn < self.rate and kind else None

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
        headers = _headers(head)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        fault = self._fault(head.split(b" ", 2)[1].decode())
        self.counts[fault or "passed"] += 1
        if fault in _REASONS:
            writer.write(_answer(fault))
            await writer.drain()
            return True
        if fault == "reset":
            _reset(writer)
        elif fault == "hang":
            await _first(asyncio.sleep(self._hang_s), reader.read(1))
        else:
            await _first(self._pass_on(head, body, writer, fault), reader.read(1))
        return False

    async def _pass_on(self, head: bytes, body: bytes, writer: asyncio.StreamWriter, fault: str | None) -> None:
        upstream_reader, upstream = await asyncio.open_connection(self._host, self._port)
        try:
            upstream.write(_closing(head) + body)
            if fault is None:
                while piece := await upstream_reader.read(65536):
                    writer.write(piece)
                    await writer.drain()
                return
            answer = await upstream_reader.read(-1)
            if fault == "cut":
                writer.write(answer[: len(answer) // 2])
                await writer.drain()
            _reset(writer)
        finally:
            upstream.close()


def _headers(head: bytes) -> Mapping[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _closing(head: bytes) -> bytes:
    """The head of a request, but its connection ends with the answer."""
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"connection: close"]) + b"\r\n\r\n"


def _answer(status: str) -> bytes:
    content = b'{"error": {"message": "made by the faulty proxy"}}'
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    )
    retry_after = "retry-after: 0\r\n" if status == "429" else ""
    return f"{head}{retry_after}\r\n".encode() + content


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a TCP reset."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _first(*coroutines: object) -> None:
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
