"""A worker process that only echoes: it keeps the contract of a worker towards the control plane
(worker.lock, worker.json, exit.json, healthz) and lets a test see what the proxy passes on.

Run as `python echo_worker.py JOB_DIR`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cookbook.backend.paths import acquire_lock, write_json

JOB_DIR = Path(sys.argv[1])


async def healthz(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def digest(request: Request) -> Response:
    """Size and sha256 of the body, and how many pieces it came in."""
    sha, size, pieces = hashlib.sha256(), 0, 0
    async for chunk in request.stream():
        sha.update(chunk)
        size, pieces = size + len(chunk), pieces + bool(chunk)
    return JSONResponse({"sha256": sha.hexdigest(), "size": size, "pieces": pieces})


async def mirror(request: Request) -> Response:
    """What arrived: method, raw path, query and headers."""
    return JSONResponse(
        {
            "method": request.method,
            "raw_path": request.scope["raw_path"].decode(),
            "query": request.scope["query_string"].decode(),
            "headers": dict(request.headers),
        },
        status_code=207,
        headers={"x-worker": "echo"},
    )


async def drip(_request: Request) -> Response:
    """Three pieces, the last one only after the file `go` exists."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"first "
        yield b"second "
        while not (JOB_DIR / "go").exists():
            await asyncio.sleep(0.01)
        yield b"third"

    return StreamingResponse(pieces())


async def hold(request: Request) -> Response:
    """A long poll without end: note in the file `dropped` when the request is given up."""
    (JOB_DIR / "held").touch()
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)
    (JOB_DIR / "dropped").touch()
    return Response()


async def complete(request: Request) -> Response:
    """A completion: its body comes back. With `hold` it has no end, with `stream` it comes in two pieces."""
    body = await request.json()
    if body.get("hold"):
        return await hold(request)
    if not body.get("stream"):
        return JSONResponse({"body": body, "raw_path": request.scope["raw_path"].decode()})

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        while not (JOB_DIR / "go").exists():
            await asyncio.sleep(0.01)
        yield b"data: [DONE]\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def break_off(_request: Request) -> Response:
    """Die in the middle of an answer."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"half of it"
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
        yield b"never"

    return StreamingResponse(pieces())


def leave(signum: int, _frame: object) -> None:
    write_json(JOB_DIR / "exit.json", {"reason": f"told to end by signal {signum}"})
    os._exit(0)


def main() -> None:
    JOB_DIR.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(JOB_DIR / "worker.lock")
    assert lock is not None
    routes = [
        Route("/api/v1/healthz", healthz),
        Route("/api/v1/digest", digest, methods=["POST"]),
        Route("/api/v1/drip", drip),
        Route("/api/v1/hold", hold, methods=["POST"]),
        Route("/api/v1/break_off", break_off),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/{path:path}", mirror, methods=["GET", "POST", "PUT", "DELETE"]),
    ]
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio sets no TCP_NODELAY
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    signal.signal(signal.SIGTERM, leave)
    write_json(JOB_DIR / "worker.json", {"pid": os.getpid(), "port": listener.getsockname()[1]})
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
