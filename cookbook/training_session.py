"""One session of the SDK with one model on a trainer, and the SDK's errors in our words. Used by cookbook/client.py."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from fireworks.training.sdk import APIStatusError, FiretitanServiceClient, RequestFailedError

from cookbook.deadlines import call_with_deadline

if TYPE_CHECKING:
    from fireworks.training.sdk import FiretitanTrainingClient, TrainerJobManager

__all__ = ["CLOSE_TIMEOUT_S", "TrainingSession", "describe", "is_user_error", "message_of"]

CLOSE_TIMEOUT_S = 3.0

logger = logging.getLogger(__name__)


class TrainingSession:
    """A session and its model. It can be closed at any time, also while it is being opened in another thread."""

    def __init__(self) -> None:
        self.training: FiretitanTrainingClient | None = None
        self._service: FiretitanServiceClient | None = None
        self._closed = threading.Event()

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
        """Make session and model; blocks for as long as the trainer does."""
        url = base_url or f"{manager.trainer_gateway_url}/training/v1/rlorTrainerJobs/{manager.account_id}/{job_id}"
        self._service = FiretitanServiceClient(base_url=url, api_key=manager.api_key, user_metadata=user_metadata)
        if self._closed.is_set():  # given up meanwhile: no heartbeat may keep this session alive
            self._service.close()
            return
        if base_only:
            self.training = self._service.create_base_training_client(base_model)
        else:
            self.training = self._service.create_training_client(base_model=base_model, lora_rank=lora_rank, seed=seed)

    def close(self, *, unload: bool) -> None:
        """End the session within seconds; what takes longer goes on in the background.

        `unload` first frees the model on the trainer, which waits for the operations under way. Without it, or when
        this process dies, the trainer frees the model once the heartbeats have stayed away.
        """
        self._closed.set()

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
        """End the session in the background, without waiting."""
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
