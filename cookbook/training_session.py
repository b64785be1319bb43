"""One session of the SDK with one model on a trainer, the calls under way in it, and the SDK's errors in our words.

Used by cookbook/client.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from fireworks.training.sdk import APIConnectionError, APIStatusError, FiretitanServiceClient, RequestFailedError

from cookbook.deadlines import begin_call, call_with_deadline

if TYPE_CHECKING:
    from fireworks.training.sdk import FiretitanTrainingClient, TrainerJobManager

__all__ = ["CLOSE_TIMEOUT_S", "TrainingSession", "describe", "is_user_error", "message_of"]

CLOSE_TIMEOUT_S = 3.0
_OPEN_ATTEMPTS = 10

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TrainingSession:
    """A session and its model. It can be closed at any time, also while it is being opened in another thread."""

    def __init__(self) -> None:
        self.training: FiretitanTrainingClient | None = None
        self._service: FiretitanServiceClient | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._under_way: dict[Future[Any], bool] = {}
        self._is_dropped = False

    def begin(self, call: Callable[[], T], outcome: Future[T], *, outlives_drop: bool = False) -> None:
        """Make a call in a thread of its own; its outcome is cancelled when the session ends before it.

        Args:
            outlives_drop: a save: what it holds was decided when its turn came, so it goes on when the session is
                dropped, and the session ends after it. `close` ends it too.
        """
        with self._lock:
            self._under_way[outcome] = outlives_drop
            is_over = self._closed.is_set() or (self._is_dropped and not outlives_drop)
        outcome.add_done_callback(self._ended)
        if is_over:
            outcome.cancel()
        else:
            begin_call(call, outcome)

    def _ended(self, outcome: Future[Any]) -> None:
        with self._lock:
            was_save = self._under_way.pop(outcome, False)
            is_last = was_save and not any(self._under_way.values())
        if is_last and self._is_dropped and not self._closed.is_set():
            self._close_soon()

    def _cancel(self, *, saves: bool) -> None:
        with self._lock:
            calls = [outcome for outcome, outlives_drop in self._under_way.items() if saves or not outlives_drop]
        for outcome in calls:
            outcome.cancel()

    def open(
        self,
        manager: TrainerJobManager,
        job_id: str,
        *,
        base_model: str,
        lora_rank: int,
        seed: int | None,
        user_metadata: dict[str, str] | None,
        base_only: bool = False,
        base_url: str | None = None,
    ) -> None:
        """Make session and model; blocks for as long as the trainer does.

        Begun anew when a proxy in between spoils it with a 400 without a body (the training API's wire protocol, errors
        of the data plane). The SDK sends everything else again in that case, but not the requests that open a session.
        """
        url = base_url or f"{manager.trainer_gateway_url}/training/v1/rlorTrainerJobs/{manager.account_id}/{job_id}"

        def make() -> FiretitanTrainingClient | None:
            self._service = FiretitanServiceClient(base_url=url, api_key=manager.api_key, user_metadata=user_metadata)
            if self._closed.is_set():  # given up meanwhile: no heartbeat may keep this session alive
                self._service.close()
                return None
            if base_only:
                return self._service.create_base_training_client(base_model)
            return self._service.create_training_client(base_model=base_model, lora_rank=lora_rank, seed=seed)

        for _ in range(_OPEN_ATTEMPTS - 1):
            try:
                self.training = make()
                return
            except APIConnectionError as error:
                if not isinstance(error.__cause__, APIStatusError):
                    raise
                if self._service is not None:
                    self._service.close()
        self.training = make()

    def close(self, *, unload: bool) -> None:
        """End the session within seconds; what takes longer goes on in the background.

        `unload` first frees the model on the trainer, which waits for the operations under way. Without it, or when
        this process dies, the trainer frees the model once the heartbeats have stayed away.
        """
        self._closed.set()
        self._cancel(saves=True)

        def end() -> None:
            try:
                if unload and self.training is not None:
                    self.training.unload_model().result(CLOSE_TIMEOUT_S)
            finally:
                if self._service is not None:
                    self._service.close()

        try:
            call_with_deadline(end, CLOSE_TIMEOUT_S)
        except Exception as error:  # the session is given up either way
            logger.debug("closing a training session: %s", type(error).__name__)

    def drop(self) -> None:
        """End the session in the background, without waiting; saves that are on their way come to their end before."""
        with self._lock:
            was_dropped, self._is_dropped = self._is_dropped, True
            is_saving = any(self._under_way.values())
        self._cancel(saves=False)
        if not is_saving and not was_dropped:
            self._close_soon()

    def _close_soon(self) -> None:
        threading.Thread(target=self.close, kwargs={"unload": False}, name="cookbook-drop", daemon=True).start()


def is_user_error(error: BaseException) -> bool:
    """Whether the trainer blames the request, so that the session is as it was."""
    return isinstance(error, RequestFailedError) and error.category.value == "user"


def message_of(error: RequestFailedError) -> str:
    """The trainer's own words, out of the SDK's sentence around them."""
    return str(error.message).removeprefix("Request failed: ").split(" for self.request_id=")[0]


def describe(error: BaseException) -> str:
    """An error of the SDK in one line: for HTTP method, path, status and request id. Never the key."""
    if isinstance(error, RequestFailedError):
        return f"the trainer failed ({error.category.value} error, request {error.request_id}): {message_of(error)}"
    status = error if isinstance(error, APIStatusError) else error.__cause__
    if isinstance(status, APIStatusError):
        request_id = status.response.headers.get("x-request-id")
        which = f", request {request_id}" if request_id else ""
        url = status.request.url
        return f"{status.request.method} {url.path} answered {status.status_code}{which}: {status.message}"
    return f"{type(error).__name__}: {error}"
