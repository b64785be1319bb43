"""The gate in front of every path: the token, the size of a request body, and the note that somebody is using us."""

from __future__ import annotations

import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cookbook.backend.control_plane.answers import ApiError, Code, error_answer

__all__ = ["MAX_BODY_BYTES", "Activity", "Gate"]

MAX_BODY_BYTES = 512 * 2**20
"""Largest request body. The SDK cuts forward_backward into requests of about 5 MB; saved rollouts may be far larger."""


class Activity:
    """How many requests are in flight, and when the last one ended."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._last = time.monotonic()

    def begin(self) -> None:
        self._in_flight += 1

    def end(self) -> None:
        self._in_flight -= 1
        self._last = time.monotonic()

    def quiet_s(self) -> float:
        """Seconds since anybody asked for anything; 0 while a request is in flight."""
        return 0.0 if self._in_flight else time.monotonic() - self._last


class Gate:
    """ASGI middleware: 401 without the token in `X-Api-Key` or `Authorization: Bearer`, 413 above MAX_BODY_BYTES."""

    def __init__(self, app: ASGIApp, *, token: str, activity: Activity) -> None:
        self._app = app
        self._token = token.encode()
        self._activity = activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: no such endpoint, and nobody has shown a token
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        if not self._may_enter(headers):
            refusal = "the request carries no valid token. Use the key from the token file of this backend."
            await error_answer(Code.UNAUTHENTICATED, refusal)(scope, receive, send)
            return
        self._activity.begin()
        try:
            await self._serve_bounded(headers, scope, receive, send)
        finally:
            self._activity.end()

    def _may_enter(self, headers: dict[bytes, bytes]) -> bool:
        bearer = headers.get(b"authorization", b"")
        scheme, _, credential = bearer.partition(b" ")
        offered = (headers.get(b"x-api-key", b""), credential.strip() if scheme.lower() == b"bearer" else b"")
        return any(hmac.compare_digest(key, self._token) for key in offered)

    async def _serve_bounded(self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send) -> None:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            await error_answer(Code.TOO_LARGE, _too_large(f"{int(declared)}"))(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:  # sent in chunks, without a Content-Length
                raise ApiError(Code.TOO_LARGE, _too_large(f"more than {received - 1}"))
            return message

        await self._app(scope, bounded, send)


def _too_large(size: str) -> str:
    return f"the request body has {size} bytes, the limit is {MAX_BODY_BYTES}. Split it into smaller requests."
