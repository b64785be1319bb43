"""One training step on the wire: what came back, and what a refusal leaves behind. Used by cookbook/client.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from fireworks.training.sdk import RequestFailedError

from cookbook.training_session import is_user_error

if TYPE_CHECKING:
    from fireworks.training.sdk import Datum, TensorData
    from fireworks.training.sdk.types import ForwardBackwardOutput, OptimStepResponse

__all__ = ["Answer", "StepRejected", "StepResult", "is_one_request", "loss_sum", "wait_for_both"]

T_co = TypeVar("T_co", covariant=True)

# Above either of these the SDK sends one call as several requests (the training API's wire protocol, chunking).
_DATUMS_A_REQUEST = 1024
_BYTES_A_REQUEST = 5_000_000
_BYTES_A_NUMBER = 10


class Answer(Protocol[T_co]):
    """A future of the SDK."""

    def result(self, timeout: float | None = None) -> T_co: ...


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    step: int
    """Optimizer steps done, this one included."""
    loss_sum: float
    """The raw loss: for cross_entropy the sum of -weight * logprob over the batch's tokens, in nats."""
    metrics: dict[str, float]
    """What the trainer reports of the loss (keys "name:reduction") and of the step ("grad_norm", ...)."""
    seconds: float
    """From submitting to the answer."""
    loss_fn_outputs: Sequence[Mapping[str, TensorData]] = field(default=(), repr=False)
    """One a datum, with its `logprobs` under the weights before the step."""


class StepRejected(Exception):
    """The trainer refused a training step. `dirty`: it has kept gradients, or stepped without all of them."""

    def __init__(self, cause: RequestFailedError, *, dirty: bool) -> None:
        self.cause = cause
        self.dirty = dirty


def wait_for_both(
    backward: Answer[ForwardBackwardOutput], step: Answer[OptimStepResponse]
) -> tuple[ForwardBackwardOutput, OptimStepResponse]:
    """Wait for both halves of a training step, also when the first was refused: the second is under way."""
    try:
        output = backward.result()
    except RequestFailedError as error:
        if not is_user_error(error):
            raise
        raise StepRejected(error, dirty=not _is_refused(step)) from None
    try:
        return output, step.result()
    except RequestFailedError as error:
        if not is_user_error(error):
            raise
        raise StepRejected(error, dirty=True) from None


def _is_refused(future: Answer[object]) -> bool:
    try:
        future.result()
    except RequestFailedError as error:
        if not is_user_error(error):
            raise
        return True
    return False


def is_one_request(data: Sequence[Datum]) -> bool:
    """Whether the SDK sends these datums in a single request, so that they are accepted or refused as one."""
    numbers = sum(
        datum.model_input.length + sum(tensor.to_numpy().size for tensor in datum.loss_fn_inputs.values())
        for datum in data
    )
    return len(data) <= _DATUMS_A_REQUEST and numbers * _BYTES_A_NUMBER <= _BYTES_A_REQUEST


def loss_sum(output: ForwardBackwardOutput, data: Sequence[Datum]) -> float:
    """The raw loss as the trainer reports it, else from its logprobs, else NaN (a policy loss that reports none)."""
    if "loss:sum" in output.metrics:
        return float(output.metrics["loss:sum"])
    if len(output.loss_fn_outputs) != len(data) or "weights" not in data[0].loss_fn_inputs:
        return float("nan")
    pairs = zip(output.loss_fn_outputs, data, strict=True)
    return -sum(
        float((datum.loss_fn_inputs["weights"].to_numpy() * out["logprobs"].to_numpy()).sum()) for out, datum in pairs
    )
