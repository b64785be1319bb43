"""Logprobs of the reference model: of the KL term of RL, and of the log ratios of DPO.

The reference is the base model: under the policy's LoRA adapter on the policy's own trainer, or on a trainer of its
own (`cookbook.provisioning.provision_reference`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self, overload

from fireworks.training.sdk import Datum

from cookbook.client import ReconnectableClient
from cookbook.config import DPOConfig, RLConfig
from cookbook.data.rollout_datums import completion_logprobs, forward_datums
from cookbook.errors import ShapeError, TrainerLost

if TYPE_CHECKING:
    from types import TracebackType

    from fireworks.training.sdk import TrainerJobManager
    from fireworks.training.sdk.types import ForwardBackwardOutput
    from torch import Tensor

    from cookbook.client import PendingForward
    from cookbook.provisioning import TrainerHandle
    from cookbook.rollouts.records import PromptGroup

__all__ = ["Reference", "open_reference"]

logger = logging.getLogger(__name__)


class Reference:
    """A frozen model that is only asked for logprobs. A lost session is opened again once: there is nothing to restore.

    For use from one thread at a time; the policy's client may be used in another.
    """

    def __init__(self, client: ReconnectableClient, *, timeout_s: float) -> None:
        """
        Args:
            client: of the reference model; closed with this object.
            timeout_s: seconds for the logprobs of one call.
        """
        self._client = client
        self._timeout_s = timeout_s
        self._closed = threading.Event()

    @property
    def job_id(self) -> str:
        """The trainer job that computes them."""
        return self._client.job_id

    def logprobs(self, datums: Sequence[Datum]) -> list[Tensor]:
        """Logprobs of every target token, also of those that are not trained.

        Args:
            datums: with `target_tokens` (N,); their other inputs are not looked at.

        Returns:
            For each datum float32 (N,), in nats.

        Raises:
            RequestRejected: a datum is too long, or holds a token that the model does not know.
            TrainerLost: the trainer is gone, or does not answer in time.
            ShapeError: the trainer's answer does not fit the datums.
        """
        (found,) = self.stream([datums], max_in_flight=1)
        return found

    def stream(self, batches: Iterable[Sequence[Datum]], *, max_in_flight: int) -> Iterator[list[Tensor]]:
        """As `logprobs` for each of many batches, in their order, with several requests in flight.

        Each batch is a request of its own, whose numbers do not depend on what else is in flight.

        Args:
            batches: read lazily, when there is room for a request.
            max_in_flight: at most so many requests have been sent and not answered.

        Raises:
            RequestRejected, TrainerLost, ShapeError: as for `logprobs`; the deadline is that of one answer.
        """
        source = iter(batches)
        waiting: deque[list[Datum]] = deque()
        sent: deque[PendingForward] = deque()
        is_retry = False
        while True:
            batch = next(source, None) if len(waiting) < max_in_flight else None
            if batch is not None:
                waiting.append([_bare(datum) for datum in batch])
            elif not waiting:
                return
            try:
                for bare in list(waiting)[len(sent) :]:
                    sent.append(self._client.submit_forward(bare, "cross_entropy"))
                if batch is not None:
                    continue  # there may be room for another
                output = sent[0].result(self._timeout_s)
            except TrainerLost as error:
                if is_retry or self._closed.is_set():
                    raise
                logger.info("the reference's session is lost, opening another: %s", error)
                self._client.reconnect()
                if self._closed.is_set():  # meanwhile, by another thread: the new session would stay open
                    self._client.close()
                    raise
                sent.clear()
                is_retry = True
                continue
            sent.popleft()
            is_retry = False
            yield self._checked(output, waiting.popleft())

    def completion_logprobs(self, groups: Sequence[PromptGroup]) -> list[list[float]]:
        """Logprobs of the completions of prompt groups, group by group: what `policy_step` takes.

        Args:
            groups: with their advantages.

        Returns:
            For each completion a list as long as its tokens, in nats; zeros for one without a sampled token.

        Raises:
            DataError, SamplingError: as for `cookbook.data.rollout_datums.trained_completions`.
            RequestRejected, TrainerLost, ShapeError: as for `logprobs`.
        """
        return completion_logprobs(groups, self.logprobs(forward_datums(groups)))

    def close(self) -> None:
        """End the session. A `stream` that is still read ends with TrainerLost."""
        self._closed.set()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, output: ForwardBackwardOutput, datums: list[Datum]) -> list[Tensor]:
        found = [outputs["logprobs"].to_torch() for outputs in output.loss_fn_outputs]
        wanted = [tuple(datum.loss_fn_inputs["target_tokens"].to_numpy().shape) for datum in datums]
        if [tuple(logprobs.shape) for logprobs in found] != wanted:
            raise ShapeError(
                f"the reference on trainer {self.job_id} answered logprobs of shapes "
                f"{[tuple(logprobs.shape) for logprobs in found]}, the datums have {wanted} targets."
            )
        return found


def _bare(datum: Datum) -> Datum:
    """The datum with nothing but its targets: what a forward pass needs."""
    targets = {"target_tokens": datum.loss_fn_inputs["target_tokens"]}
    return Datum(model_input=datum.model_input, loss_fn_inputs=targets)


@overload
def open_reference(
    manager: TrainerJobManager,
    config: DPOConfig,
    policy: TrainerHandle,
    reference: TrainerHandle | None,
    *,
    user_metadata: Mapping[str, str] | None = None,
) -> Reference: ...


@overload
def open_reference(
    manager: TrainerJobManager,
    config: RLConfig,
    policy: TrainerHandle,
    reference: TrainerHandle | None,
    *,
    user_metadata: Mapping[str, str] | None = None,
) -> Reference | None: ...


def open_reference(
    manager: TrainerJobManager,
    config: RLConfig | DPOConfig,
    policy: TrainerHandle,
    reference: TrainerHandle | None,
    *,
    user_metadata: Mapping[str, str] | None = None,
) -> Reference | None:
    """Open the reference of a run; None for RL without a KL term.

    Args:
        manager: `control.jobs`.
        policy: the policy's trainer, whose base model is the reference when there is no other trainer.
        reference: what `provision_reference` gave.
        user_metadata: `RunDirectory.user_metadata()`.

    Raises:
        TrainerLost: no session or no model in time.
    """
    if isinstance(config, RLConfig) and config.active_kl_beta == 0:
        return None
    trainer = reference or policy
    client = ReconnectableClient(
        manager,
        trainer.job_id,
        trainer.base_model,
        lora_rank=0,
        user_metadata=user_metadata,
        base_only=trainer.lora_rank > 0 or (reference is None and config.lora_rank > 0),
        base_url=trainer.base_url,
        default_timeout_s=config.step_timeout_s,
    )
    return Reference(client, timeout_s=config.step_timeout_s)
