"""Chat completions from a deployment, as text that comes bit by bit, and the errors of completion requests read.

Sampling for training, with its tokens and logprobs, is in cookbook/rollouts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from cookbook.errors import CookbookError, DeploymentLost, RequestRejected, SamplingError
from cookbook.recovery import CALLER_STATUSES, DEPLOYMENT_LOST_STATUSES, REFUSED_STATUSES

__all__ = ["Answer", "LineBuffer", "Refusal", "SamplingOptions", "read_refusal"]

_DATA = b"data:"
_DONE = b"[DONE]"


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is sampled. None = the deployment's own default."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def to_request(self) -> dict[str, Any]:
        """The fields of a request."""
        values = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        return {name: value for name, value in values.items() if value is not None}


class Answer:
    """One answer of a chat model. Iterate over it, once, for its text as it comes; to end that early stops the sampling
    as well.

    `text` is what has come so far. `finish_reason` and `num_tokens` are there at the end, None before.

    >>> answer = Answer(client, handle.model, [{"role": "user", "content": "Hello"}])  # doctest: +SKIP
    >>> for piece in answer:  # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        client: httpx.Client,
        model: str,
        messages: Sequence[Mapping[str, str]],
        options: SamplingOptions | None = None,
    ) -> None:
        """`client`: see ControlPlane.completions_client; `model`: a deployment's name as a model."""
        self.text = ""
        self.finish_reason: str | None = None
        self.num_tokens: int | None = None
        self._client = client
        self._body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **(options or SamplingOptions()).to_request(),
        }

    def __iter__(self) -> Generator[str]:
        """Pieces of the text.

        Raises:
            RequestRejected: the deployment refuses the messages, in its own words: too long, or not what it knows.
            DeploymentLost: it has ended, or is not ready.
            SamplingError: the answer broke off, or there is none.
        """
        try:
            with self._client.stream("POST", "chat/completions", json=self._body) as response:
                if response.status_code != 200:
                    raise read_refusal(response.status_code, response.read()).error()
                yield from self._pieces(response)
        except httpx.TransportError as error:
            raise DeploymentLost(f"no answer from the deployment: {type(error).__name__}: {error}") from error

    def _pieces(self, response: httpx.Response) -> Generator[str]:
        lines = LineBuffer()
        for chunk in response.iter_bytes():
            for line in lines.feed(chunk):
                if not line.startswith(_DATA):
                    continue
                data = line.removeprefix(_DATA).strip()
                if data == _DONE:
                    return
                piece = self._take(orjson.loads(data))
                if piece:
                    self.text += piece
                    yield piece
        raise SamplingError("the answer broke off. Ask again.")

    def _take(self, event: dict[str, Any]) -> str:
        if "error" in event:
            raise SamplingError(f"the answer broke off: {event['error'].get('message')}. Ask again.")
        if event.get("usage"):
            self.num_tokens = event["usage"].get("completion_tokens")
        for choice in event.get("choices", []):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            return str((choice.get("delta") or {}).get("content") or "")
        return ""


class LineBuffer:
    """Lines of a body that comes in chunks. Only a line feed ends one, as in server-sent events of JSON."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that are whole now, without their ends."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.removesuffix(b"\r") for line in lines]

    @property
    def rest(self) -> bytes:
        """What has come of the last line."""
        return self._rest


@dataclass(frozen=True)
class Refusal:
    """Why a request for a completion was not answered."""

    status: int
    message: str
    param: str | None = None
    is_gone: bool = False
    """The deployment is not there, or not there yet; the request may be well."""

    def error(self) -> CookbookError:
        """The same as an exception."""
        if self.is_gone:
            return DeploymentLost(self.message)
        what = f"{self.message} (HTTP {self.status})"
        return RequestRejected(self.message) if self.status in REFUSED_STATUSES else SamplingError(what)


def read_refusal(status: int, body: bytes) -> Refusal:
    """Read the answer of a deployment, or of the control plane before it, that is not a completion."""
    try:
        error = orjson.loads(body)["error"]
        message, param = str(error["message"]), error.get("param")
        is_deployments_own = "type" in error  # the control plane's errors have none: it has no worker to ask
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, param, is_deployments_own = body[:500].decode(errors="replace") or f"HTTP {status}", None, True
    is_about_us = status in CALLER_STATUSES | {413, 429}  # whoever says so
    is_gone = status in DEPLOYMENT_LOST_STATUSES or not (is_deployments_own or is_about_us)
    return Refusal(status, message, param if isinstance(param, str) else None, is_gone)
