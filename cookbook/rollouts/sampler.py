"""Completions of the policy, token in and token out, from a deployment: the SDK's sampler on an event loop of its own.

Which prompts are sampled, and what becomes of the completions, is decided in collect.py.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import httpx
from fireworks.training.sdk import AdaptiveConcurrencyController, DeploymentSampler, FixedConcurrencyController
from fireworks.training.sdk.sampling_observability import SamplingRequestError

from cookbook.config import ConcurrencyConfig, RetryConfig
from cookbook.deadlines import Deadline
from cookbook.errors import DeploymentLost, SamplingError
from cookbook.recovery import COMPLETION_STATUSES

if TYPE_CHECKING:
    from fireworks.training.sdk.sampling import SampledCompletion, SampledRequestResult
    from transformers import PreTrainedTokenizerBase

__all__ = ["Policy", "RolloutSampler", "Sampled", "make_controller", "served_version"]

T = TypeVar("T")

_VERSIONED_ID = re.compile(r"cmpl-[0-9a-f]+\.(?P<version>.*)")
_LOOK_EVERY_S = 5.0
_HOT_LOAD_POLL_S = 1.0
_HOT_LOAD_POLLS = 50  # the patience of the SDK, 50 s, in smaller steps: a slot is held meanwhile
_SDK_CONNECTIONS = 256
_CANCEL_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """One answer of the policy. All per-token tuples have the length of `tokens`."""

    tokens: tuple[int, ...]
    """What was sampled, the end-of-turn token included where there is one."""
    rollout_logprobs: tuple[float, ...] = field(repr=False)
    """Nats, at temperature 1 over the full vocabulary."""
    sampling_logprobs: tuple[float, ...] = field(repr=False)
    """Nats, of the distribution that the tokens were drawn from."""
    finish_reason: str
    """"stop" or "length"."""
    text: str
    version: str
    """Snapshot that served it; "" = the base model as it was deployed."""


class Policy(Protocol):
    """Whatever completes prompts. `RolloutSampler` does."""

    async def complete(
        self,
        prompt_tokens: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop: Sequence[str] | None = None,
        version: str = "",
        cache_key: str | None = None,
        where: str = "a prompt",
    ) -> Sampled:
        """One completion of one prompt."""

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop that `complete` belongs to, and wait for it."""


def served_version(response_id: str | None, synced: str) -> str:
    """The snapshot that an answer came from: what its id says, else what was `synced` last.

    The embedded backend answers with ids `cmpl-<hex>.<snapshot>`; other ids say nothing of it.
    """
    match = _VERSIONED_ID.fullmatch(response_id or "")
    return match["version"] if match else synced


def make_controller(
    config: ConcurrencyConfig, replicas: int
) -> AdaptiveConcurrencyController | FixedConcurrencyController:
    """The SDK's concurrency controller that the config describes. To be used on one event loop only."""
    if config.mode == "fixed":
        return FixedConcurrencyController(config.max_concurrency)
    return AdaptiveConcurrencyController(
        initial_window=config.initial_window or 8 * replicas,
        min_window=config.min_window,
        max_window=config.max_window,
        prefill_queue_target=config.prefill_queue_target,
    )


class RolloutSampler:
    """Samples a deployment from any thread; all requests run on one event loop in a thread of its own.

    A request is retried by the SDK first, then here within `retry`, always with the same seed. What no retry can mend
    (a refused request, an answer without logprobs) is a SamplingError at once.

    >>> with RolloutSampler(url, "accounts/local/deployments/d", key, tokenizer, ConcurrencyConfig(), 1,
    ...                     600.0, RetryConfig()) as sampler:  # doctest: +SKIP
    ...     sampler.run(sampler.complete([1, 2, 3], max_tokens=8, temperature=1.0, seed=0))
    """

    def __init__(
        self,
        inference_url: str,
        model: str,
        api_key: str,
        tokenizer: PreTrainedTokenizerBase | None,
        concurrency: ConcurrencyConfig,
        replicas: int,
        request_timeout_s: float,
        retry: RetryConfig,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start the event loop. Nothing is sent yet.

        Args:
            inference_url: without the path `/inference/v1/...`.
            model: resource name of the deployment.
            api_key: never shown or logged.
            tokenizer: of the policy; only the SDK's handling of stop tokens needs it.
            concurrency: how many requests are in flight.
            replicas: of the deployment; the adaptive mode starts at 8 for each.
            request_timeout_s: HTTP read timeout of one request.
            retry: attempts on top of the SDK's own.
            is_lost: whether the deployment is known to be gone; asked every few seconds while `run` waits, as the
                SDK goes on asking a dead deployment for minutes.
        """
        self.model = model
        self._timeout_s = request_timeout_s
        self._retry = retry
        self._is_lost = is_lost
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cookbook-sampler", daemon=True)
        self._controller = make_controller(concurrency, replicas)
        self._sdk = DeploymentSampler(
            inference_url, model, api_key, tokenizer=tokenizer, concurrency_controller=self._controller
        )
        self._thread.start()
        largest = concurrency.max_concurrency if concurrency.mode == "fixed" else concurrency.max_window
        self.run(self._open_connections(largest or 1))

    async def _open_connections(self, largest: int) -> None:
        """Let as many requests out as the window allows: the SDK's own HTTP client stops at 256."""
        if largest > _SDK_CONNECTIONS:
            limits = httpx.Limits(max_connections=largest, max_keepalive_connections=64)
            self._sdk._async_client = httpx.AsyncClient(verify=self._sdk._base_verify, limits=limits)

    def __repr__(self) -> str:
        return f"RolloutSampler(model={self.model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the sampler's loop, and wait for it. Not to be called from that loop.

        However the wait ends (Ctrl-C too), the coroutine has ended when this returns, or was cancelled.

        Raises:
            SamplingError: it was not done within `timeout_s`; also whatever the coroutine raises.
            DeploymentLost: the deployment is gone; the coroutine was cancelled.
        """
        if self._loop.is_closed():
            coroutine.close()
            raise SamplingError(f"the sampler of {self.model} is closed.")
        task: Future[asyncio.Task[T]] = Future()
        outcome: Future[T] = Future()

        def start() -> None:
            created = self._loop.create_task(coroutine)
            self._tasks.add(created)
            created.add_done_callback(lambda ended: _hand_over(ended, outcome))
            created.add_done_callback(self._tasks.discard)
            task.set_result(created)

        self._loop.call_soon_threadsafe(start)
        try:
            return self._result(outcome, timeout_s)
        except BaseException:
            if not outcome.done():
                self._cancel(task, outcome)
            raise

    def _result(self, outcome: Future[T], timeout_s: float | None) -> T:
        """Wait for the outcome, as long as the deployment is there."""
        deadline = None if timeout_s is None else Deadline(timeout_s)
        while True:
            wait([outcome], _LOOK_EVERY_S if deadline is None else min(_LOOK_EVERY_S, deadline.remaining()))
            if outcome.done():
                return outcome.result()
            if deadline is not None and deadline.expired:
                raise SamplingError(f"sampling of {self.model} was not done within {deadline.seconds:g} s.")
            if self._is_lost():
                raise DeploymentLost(f"deployment {self.model} has failed or was deleted while it was sampled from.")

    def _cancel(self, task: Future[asyncio.Task[T]], outcome: Future[T]) -> None:
        self._loop.call_soon_threadsafe(lambda: task.result().cancel())
        try:
            outcome.exception(_CANCEL_S)  # wait until it is over
        except TimeoutError:
            logger.warning("a request of %s did not end within %g s of its cancellation", self.model, _CANCEL_S)

    def close(self) -> None:
        """Cancel what is in flight, close the connections and end the loop."""
        if self._loop.is_closed():
            return
        try:
            self.run(self._shut_down(), _CANCEL_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CANCEL_S)
            if not self._loop.is_running():
                self._loop.close()

    async def _shut_down(self) -> None:
        this = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not this]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._sdk.close()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not this), return_exceptions=True)
        await self._loop.shutdown_default_executor()
        await asyncio.sleep(0)  # closed transports give up their sockets in the loop's next round

    # -- sampling ------------------------------------------------------------------------------------------------------

    async def complete(
        self,
        prompt_tokens: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop: Sequence[str] | None = None,
        version: str = "",
        cache_key: str | None = None,
        where: str = "a prompt",
    ) -> Sampled:
        """One completion of one prompt; to be awaited on the sampler's loop (`run`).

        Args:
            prompt_tokens: at least one.
            max_tokens: at least 1.
            temperature: 0 = greedy. The full distribution is drawn from: no top-p, no top-k.
            seed: the same one gives the same tokens, on a backend that keeps to seeds.
            stop: texts that end the completion.
            version: the snapshot that was synced last; `Sampled.version` where the answer does not say which served it.
            cache_key: requests with the same one have their prompts in common.
            where: names the prompt in errors.

        Raises:
            DeploymentLost: all attempts failed.
            SamplingError: the deployment refused the request, or the answer lacks logprobs.
        """
        return await self._retried(
            lambda: self._request(
                prompt_tokens, max_tokens, temperature, list(stop) if stop else None, seed, cache_key
            ),
            lambda result: _checked(result, version, where),
            where,
        )

    async def token_logprobs(self, tokens: Sequence[int], *, where: str = "a row") -> tuple[float, ...]:
        """Logprob in nats of each of N tokens but the first, given all tokens before it; N-1 values. Nothing is kept.

        To be awaited on the sampler's loop (`run`). One token is sampled after them and dropped, as some deployments
        sample at least one: N must be below the context length.

        Raises:
            SamplingError: as `complete`.
        """
        return await self._retried(
            lambda: self._request(tokens, 1, 1.0, None, 0, None, echo=True),
            lambda result: _echoed_logprobs(result, len(tokens), where),
            where,
        )

    async def _retried(
        self,
        request: Callable[[], Coroutine[Any, Any, SampledRequestResult]],
        check: Callable[[SampledRequestResult], T],
        where: str,
    ) -> T:
        """Send a request, and read its answer with `check`; again where that may help."""
        started = time.monotonic()
        pauses = self._retry.delays()
        for attempt in range(1, self._retry.attempts + 1):
            try:
                return check(await request())
            except Exception as error:
                broken_off = _is_broken_off(error)
                permanent = not (broken_off or _is_transient(error))
                if isinstance(error, SamplingError) and permanent:
                    raise
                late = 0 < self._retry.deadline_s <= time.monotonic() - started
                if permanent or late or attempt == self._retry.attempts:
                    lost = SamplingError if permanent or broken_off else DeploymentLost
                    raise lost(self._failure(where, attempt, error)) from error
                what = _describe(error).partition("\n")[0]
                logger.warning("%s: attempt %d of %d failed: %s", where, attempt, self._retry.attempts, what)
                await asyncio.sleep(pauses[attempt - 1] * (1 + self._retry.jitter * random.random()))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _request(
        self,
        prompt_tokens: Sequence[int],
        max_tokens: int,
        temperature: float,
        stop: list[str] | None,
        seed: int,
        cache_key: str | None,
        *,
        echo: bool = False,
    ) -> SampledRequestResult:
        return await self._sdk.sample_with_prompt_tokens_result(
            list(prompt_tokens),
            max_tokens=max_tokens,
            temperature=temperature,
            stop=stop,
            prompt_cache_key=cache_key,
            seed=seed,
            logprobs=True,
            http_timeout=self._timeout_s,
            hotload_retry_interval=_HOT_LOAD_POLL_S,
            hotload_max_retries=_HOT_LOAD_POLLS,
            **({"echo": True} if echo else {}),
        )

    def _failure(self, where: str, attempts: int, error: Exception) -> str:
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return (
            f"{where} cannot be sampled from {self.model}: {tried}, the last: {_describe(error)}. Nothing was lost: "
            "the row stays to be sampled. Look at the deployment, then resume the run."
        )

    def step_completed(self) -> dict[str, float]:
        """End of a step for the concurrency controller: metrics `sampling/...` of the requests since the last call."""

        async def on_loop() -> dict[str, float]:
            return dict(self._controller.step_completed())

        summary = self.run(on_loop())
        records = self._sdk.drain_metrics()
        queued = [m.prefill_queue_duration for m in records if m.prefill_queue_duration is not None]
        metrics = {f"sampling/{name}": value for name, value in summary.items()}
        metrics["sampling/completion_tokens"] = float(sum(m.completion_tokens or 0 for m in records))
        metrics["sampling/requests"] = float(sum(m.error is None for m in records))
        metrics["sampling/failed_attempts"] = float(sum(m.error is not None for m in records))
        if queued:
            metrics["sampling/prefill_queue_s"] = sum(queued) / len(queued)
        return metrics


class _TransientAnswer(Exception):
    """An answer that a further attempt may mend."""


def _describe(error: BaseException) -> str:
    """One line on why a request failed, with status and request id where there are any."""
    if isinstance(error, httpx.HTTPStatusError):
        response = error.response
        request_id = response.headers.get("x-request-id", "none")
        return f"HTTP {response.status_code} (request id {request_id}): {response.text[:300]}"
    return f"{type(error).__name__}: {error}"


def _is_transient(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in COMPLETION_STATUSES
    return isinstance(error, SamplingRequestError | httpx.TransportError | _TransientAnswer)


def _is_broken_off(error: Exception) -> bool:
    """Whether a stream has ended well without the tokens. So does one in which the deployment says that something has
    gone wrong (the training API's wire protocol, streaming answers), which the SDK does not read; and so do all streams
    of a deployment that cannot tell tokens: nothing tells these two apart but another attempt."""
    answer = getattr(error, "_fireworks_sampled_response", None)
    return answer is not None and not any("raw_output" in choice for choice in answer["choices"])


def _checked(result: SampledRequestResult, synced: str, where: str) -> Sampled:
    """The one completion of an answer, complete and aligned.

    Raises:
        _TransientAnswer: the deployment gave up on it half way.
        SamplingError: it lacks logprobs, or has too many or too few.
    """
    version = served_version(result.upstream_response_id, synced)
    if len(result.completions) != 1:
        raise SamplingError(f"{where} was asked for one completion and got {len(result.completions)}.")
    completion: SampledCompletion = result.completions[0]
    if completion.finish_reason not in ("stop", "length", "tool_calls"):
        raise _TransientAnswer(f"finish_reason is {completion.finish_reason!r}")
    tokens = tuple(completion.full_tokens[completion.prompt_len :])
    logprobs = {"logprob": completion.inference_logprobs, "sampling_logprob": completion.sampling_logprobs}
    checked = {name: _aligned(values or [], len(tokens), name, where) for name, values in logprobs.items()}
    return Sampled(
        tokens=tokens,
        rollout_logprobs=checked["logprob"],
        sampling_logprobs=checked["sampling_logprob"],
        finish_reason="length" if completion.finish_reason == "length" else "stop",
        text=completion.text,
        version=version,
    )


def _echoed_logprobs(result: SampledRequestResult, num_tokens: int, where: str) -> tuple[float, ...]:
    """The logprobs of an echoed prompt of N tokens, less the first one, which has none: (N-1,).

    Raises:
        SamplingError: it lacks some.
    """
    completion: SampledCompletion = result.completions[0]
    values = list(completion.inference_logprobs or [])[: num_tokens - 1]
    return _aligned(values, num_tokens - 1, "logprob", where)


def _aligned(values: Sequence[float | None], count: int, name: str, where: str) -> tuple[float, ...]:
    present = tuple(float(value) for value in values if value is not None)
    if len(present) != count or len(values) != count:
        raise SamplingError(
            f"{where}: the answer has {count} tokens and {len(present)} of logprobs.content[].{name}. Training needs "
            "one for each token: use a deployment that sends them."
        )
    return present


def _hand_over(ended: asyncio.Task[T], outcome: Future[T]) -> None:
    if ended.cancelled():
        outcome.set_exception(SamplingError("sampling was cancelled."))
    elif (error := ended.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(ended.result())
