"""What the control plane answers: JSON, and errors in the shape of google.rpc.Status.

{"error": {"code": <gRPC code>, "message": ..., "status": <gRPC name>, "details": []}, "detail": <the message again>}
The training SDK reads `error.message` from the control plane and shows `detail` from a trainer.
"""

from __future__ import annotations

import traceback
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cookbook.errors import CookbookError

__all__ = [
    "ApiError",
    "Code",
    "JsonAnswer",
    "error_answer",
    "error_body",
    "failed_status",
    "handlers",
    "json_object",
    "rfc3339",
]


class Code(Enum):
    """gRPC code and the HTTP status it travels with.

    LOST is ours: a trainer that is gone answers 410, the one status after which clients stop asking.
    """

    INVALID_ARGUMENT = (3, 400)
    NOT_FOUND = (5, 404)
    ALREADY_EXISTS = (6, 409)
    FAILED_PRECONDITION = (9, 400)
    IN_USE = (9, 409)
    TOO_LARGE = (3, 413)
    UNIMPLEMENTED = (12, 405)
    INTERNAL = (13, 500)
    UNAVAILABLE = (14, 503)
    DEADLINE_EXCEEDED = (4, 504)
    LOST = (14, 410)
    UNAUTHENTICATED = (16, 401)

    @property
    def grpc(self) -> int:
        return self.value[0]

    @property
    def http(self) -> int:
        return self.value[1]

    @classmethod
    def of_grpc(cls, grpc: int) -> Code:
        """The first code with a gRPC number."""
        return next(code for code in cls if code.grpc == grpc)


class ApiError(Exception):
    """A request that is answered with an error. The message says what was wrong, the value got, and what to do."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class JsonAnswer(Response):
    """A JSON response."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def error_body(code: Code, message: str) -> dict[str, Any]:
    """The body of an error answer."""
    return {
        "error": {"code": code.grpc, "message": message, "status": code.name, "details": []},
        "detail": message,
    }


def error_answer(code: Code, message: str) -> JsonAnswer:
    """An error as a response."""
    return JsonAnswer(error_body(code, message), status_code=code.http)


def failed_status(message: str) -> dict[str, Any]:
    """The `status` of a resource that has failed."""
    return {"code": Code.INTERNAL.grpc, "message": message, "details": []}


async def json_object(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object; an empty body is an empty object.

    Raises:
        ApiError: the body is something else (400).
    """
    raw = await request.body()
    if not raw:
        return {}
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(Code.INVALID_ARGUMENT, f"the request body is not JSON: {error}. Send a JSON object.") from error
    if not isinstance(value, dict):
        raise ApiError(
            Code.INVALID_ARGUMENT, f"the request body is a JSON {type(value).__name__}, not an object. Send an object."
        )
    return value


def rfc3339(seconds: float) -> str:
    """A point in time, given in seconds since 1970, as the API writes it: UTC, microseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_answer(error.code, error.message)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = Code.UNIMPLEMENTED if error.status_code == 405 else Code.NOT_FOUND
    return error_answer(code, f"{request.method} {request.url.path} is not a method of the embedded backend.")


async def _cookbook_error(_request: Request, error: Exception) -> Response:
    # Not 500, which clients send again for five minutes: these do not go away by themselves.
    return error_answer(Code.FAILED_PRECONDITION, str(error))


async def _unexpected(request: Request, error: Exception) -> Response:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return error_answer(
        Code.INTERNAL,
        f"{request.method} {request.url.path} failed: {type(error).__name__}: {error} ({where.name}); "
        "the control plane's log has the traceback.",
    )


handlers = {
    ApiError: _api_error,
    HTTPException: _http_exception,
    CookbookError: _cookbook_error,
    Exception: _unexpected,
}
"""Exception handlers of the application."""
