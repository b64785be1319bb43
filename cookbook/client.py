"""ReconnectableClient: blocking calls to one trainer job, each with a deadline, and a way back when its session dies.

It wraps the SDK's FiretitanTrainingClient. What a session is worth after an error is decided here; which weights to
restore is decided in cookbook/checkpoints.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from fireworks.training.sdk import RequestFailedError

from cookbook.deadlines import call_with_deadline
from cookbook.errors import RequestRejected, TrainerLost
from cookbook.training_session import TrainingSession, describe, is_user_error, message_of
from cookbook.training_step import Answer, StepRejected, StepResult, is_one_request, loss_sum, wait_for_both

if TYPE_CHECKING:
    from fireworks.training.sdk import AdamParams, Datum, FiretitanTrainingClient, TrainerJobManager
    from fireworks.training.sdk.types import ForwardBackwardOutput, OptimStepResponse
    from torch import Tensor

__all__ = ["CustomLoss", "LossConfig", "PendingForward", "PendingSave", "ReconnectableClient", "StepResult"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

LossConfig: TypeAlias = Mapping[str, float | str | bool]
CustomLoss: TypeAlias = "Callable[[list[Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]"
"""A loss on the client: (datums, one float32 (N,) tensor of logprobs a datum) -> (scalar loss, metrics)."""

SAMPLER_CHECKPOINT_TYPES = ("base", "delta", "merged_base")

_LIST_TIMEOUT_S = 30.0

_REMEDY = "Call reconnect(), then cookbook.checkpoints.resolve_resume() to restore the last commit."


class _LossRaised(Exception):
    """The caller's own loss function raised."""


@dataclass(frozen=True)
class _Interrupted:
    """A call whose waiting was broken off, by a signal for one; the call itself goes on."""

    operation: str
    outcome: Future[Any]
    reads_only: bool
    """Whether the model is the same before and after it."""


class PendingForward:
    """A forward pass on its way."""

    def __init__(self, wait: Callable[[float | None], ForwardBackwardOutput]) -> None:
        self._wait = wait

    def result(self, timeout_s: float | None = None) -> ForwardBackwardOutput:
        """Wait for the answer; None = the client's default deadline, from now.

        Raises:
            RequestRejected: the trainer refused the data or the loss.
            TrainerLost: see `ReconnectableClient`; also when the client has reconnected since.
        """
        return self._wait(timeout_s)


class PendingSave:
    """A save of the state on its way: of the weights as they were when it was begun, whatever is trained meanwhile."""

    def __init__(self, name: str, wait: Callable[[float | None], str]) -> None:
        self.name = name
        self._wait = wait

    def result(self, timeout_s: float | None = None) -> str:
        """Wait until the save is confirmed, in any thread; returns the path as the trainer answers it.

        Args:
            timeout_s: seconds from now; None = the client's deadline for states. A save that is late is given up, and
                its session is lost.

        Raises:
            RequestRejected: the trainer refused (the name exists, the disk is full, ...); the session stays usable.
            TrainerLost: see `ReconnectableClient`; also when the client was closed or has reconnected meanwhile. A save
                that was begun before its session was lost can still be confirmed.
        """
        return self._wait(timeout_s)


class ReconnectableClient:
    """Blocking wrapper around the SDK's training client of one trainer job.

    Every call waits at most its deadline, construction included. A request that the trainer understood and refused is
    `RequestRejected`; the session stays usable. Anything else (time-out, 404, 410, an internal error of the trainer) is
    `TrainerLost`: then no further call is sent until `reconnect()`, because nobody knows what the trainer applied. The
    same holds after an interrupt (Ctrl-C) while waiting, unless `settle` finds that the call came to a good end. After
    `reconnect()` the model is a fresh one, and training is refused until weights are loaded, which
    `cookbook.checkpoints.resolve_resume` does.

    For use from one thread at a time; a `PendingSave` may be waited for in another one.

    >>> client = ReconnectableClient(control.jobs, trainer.job_id, wire_model, lora_rank=8)  # doctest: +SKIP
    >>> client.train_step(datums, "cross_entropy", AdamParams(learning_rate=1e-4)).loss_sum  # doctest: +SKIP
    2.31
    """

    def __init__(
        self,
        manager: TrainerJobManager,
        job_id: str,
        base_model: str,
        lora_rank: int = 0,
        seed: int | None = None,
        *,
        user_metadata: Mapping[str, str] | None = None,
        base_only: bool = False,
        base_url: str | None = None,
        default_timeout_s: float = 600.0,
        state_timeout_s: float = 2700.0,
    ) -> None:
        """Open a session and make a model.

        Args:
            manager: knows the URL and the key; `cookbook.provisioning.connect(...).jobs`.
            job_id: the trainer job, which must be ready.
            base_model: resource name or folder, as the trainer job was created with.
            lora_rank: 0 = full parameter.
            seed: of the adapter's initialization; None = the trainer's choice.
            user_metadata: sent with the session; a run passes `RunDirectory.user_metadata()`.
            base_only: the base model without an adapter, for `forward` only; also on a trainer that trains adapters.
            base_url: where the trainer answers; None = where the manager says.
            default_timeout_s: seconds for any call without a deadline of its own.
            state_timeout_s: seconds for saving and loading state.

        Raises:
            TrainerLost: no session or no model within `default_timeout_s`.
        """
        # The SDK's telemetry would block close() for 30 s and fill the log once a trainer is gone.
        os.environ.setdefault("TINKER_TELEMETRY", "0")
        self.job_id = job_id
        self.base_model = base_model
        self.lora_rank = lora_rank
        self._manager = manager
        self._seed = seed
        self._user_metadata = None if user_metadata is None else dict(user_metadata)
        self._base_only = base_only
        self._base_url = base_url
        self._default_timeout_s = default_timeout_s
        self._state_timeout_s = state_timeout_s
        self._session = TrainingSession()
        self._losing = threading.Lock()
        self._changing: str | None = None
        self._num_sessions = 0
        self._lost: str | None = None
        self._interrupted: _Interrupted | None = None
        self._touched = False
        self._needs_restore = False
        self._step = 0
        self._connect()

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps in the model's weights: those of the checkpoint it was loaded from, and those done since."""
        return self._step

    @property
    def num_sessions(self) -> int:
        """Sessions opened so far. Each has a model of its own, and its own names for sampler snapshots."""
        return self._num_sessions

    @property
    def needs_restore(self) -> bool:
        """Whether training is refused until weights are loaded."""
        return self._needs_restore

    @property
    def is_lost(self) -> bool:
        """Whether every call is refused until `reconnect()`."""
        return self._lost is not None or self._interrupted is not None

    def __repr__(self) -> str:
        state = "lost" if self.is_lost else "needs restore" if self._needs_restore else "ready"
        return (
            f"ReconnectableClient(job_id={self.job_id!r}, base_model={self.base_model!r}, lora_rank={self.lora_rank}, "
            f"step={self._step}, {state})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def reconnect(self) -> None:
        """Give up the session and open a new one, with a fresh model, on the same trainer job.

        Raises:
            TrainerLost: no session or no model within the default deadline.
        """
        self._session.close(unload=not self.is_lost)
        self._needs_restore = self._needs_restore or self._touched
        self._connect()

    def start_fresh(self) -> None:
        """Declare that training starts at step 0 on the model as it was made: nothing was ever committed.

        Raises:
            TrainerLost: the session's model is not fresh any more.
        """
        self._check_session("start_fresh")
        if self._touched:
            raise TrainerLost(
                f"the session on trainer {self.job_id} has trained or loaded weights, so it cannot start at step 0. "
                "Call reconnect() first."
            )
        self._needs_restore = False
        self._step = 0

    def settle(self, timeout_s: float) -> bool:
        """Wait for the call whose waiting was interrupted, if there is one; whether the session is usable (again).

        It is after a call that only read the weights (forward, save, list) and was answered. Otherwise it is lost.
        """
        interrupted = self._interrupted
        if interrupted is not None:
            try:
                interrupted.outcome.result(timeout_s)
                is_whole = interrupted.reads_only
            except Exception:
                is_whole = False
            self._interrupted = None  # known only now: a second interrupt leaves it as it was
            if not is_whole:
                self._loss(f"{interrupted.operation} was interrupted")
        return not self.is_lost

    def close(self) -> None:
        """End the session and free its model. Returns within seconds, whatever the trainer does."""
        if self._lost != "it was closed":
            unload = not self.is_lost
            self._lost, self._interrupted = "it was closed", None
            self._session.close(unload=unload)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: LossConfig | None = None,
        *,
        timeout_s: float | None = None,
    ) -> ForwardBackwardOutput:
        """Loss outputs (`logprobs` and what the config asks for) without gradients.

        Raises:
            RequestRejected: the trainer refused the data or the loss.
            TrainerLost: see the class.
        """
        self._check_data("forward", data)
        return self._submit(
            "forward",
            lambda model: model.forward(list(data), loss_fn, _config(loss_fn_config)),
            timeout_s,
            reads_only=True,
        )

    def submit_forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig | None = None
    ) -> PendingForward:
        """As `forward`, without waiting for the answer: several may be in flight, answered in the order of submission.

        Raises:
            RequestRejected: the SDK refused to send it; what the trainer refuses shows when the answer is waited for.
            TrainerLost: see the class.
        """
        self._check_data("forward", data)
        answer = self._run(
            "forward",
            lambda model: self._sent("forward", lambda: model.forward(list(data), loss_fn, _config(loss_fn_config))),
            None,
            reads_only=True,
        )
        session = self._session

        def wait(timeout_s: float | None) -> ForwardBackwardOutput:
            if self._session is not session or self._lost is not None:
                reason = self._lost or "reconnected"
                raise TrainerLost(
                    f"forward on trainer {self.job_id} went out in a session that was given up: {reason}."
                )
            return self._wait("forward", answer.result, timeout_s or self._default_timeout_s, reads_only=True)

        return PendingForward(wait)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: LossConfig | None = None,
        *,
        timeout_s: float | None = None,
    ) -> ForwardBackwardOutput:
        """Add the gradient of the raw summed loss to the accumulated one.

        Raises:
            RequestRejected: the trainer refused the data or the loss. Where the data went out as several requests, some
                may have been accepted; then the session is lost as well.
            TrainerLost: see the class.
        """
        self._check_data("forward_backward", data)
        self._touched = True
        try:
            return self._submit(
                "forward_backward",
                lambda model: model.forward_backward(list(data), loss_fn, _config(loss_fn_config)),
                timeout_s,
            )
        except RequestRejected:
            self._lose_unless_one_request(data)
            raise

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, timeout_s: float | None = None
    ) -> ForwardBackwardOutput:
        """Add the gradient of a loss that is computed here, from the logprobs of a forward pass.

        Raises:
            RequestRejected: as for `forward_backward`.
            TrainerLost: see the class. What `loss_fn` raises passes through, and the session stays usable.
        """
        self._check_data("forward_backward_custom", data)
        self._touched = True
        raised: list[Exception] = []

        def guarded(datums: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
            try:
                return loss_fn(datums, logprobs)
            except Exception as error:
                raised.append(error)
                raise

        def work(model: FiretitanTrainingClient) -> ForwardBackwardOutput:
            try:
                return model.forward_backward_custom(list(data), guarded).result()
            except Exception:
                if raised:
                    raise _LossRaised from None
                raise

        try:
            return self._run("forward_backward_custom", work, timeout_s)
        except _LossRaised:
            raise raised[0] from None
        except RequestRejected:
            self._lose_unless_one_request(data)
            raise

    def optim_step(
        self,
        adam_params: AdamParams,
        *,
        grad_accumulation_normalization: str | None = None,
        timeout_s: float | None = None,
    ) -> OptimStepResponse:
        """Take one AdamW step with the accumulated gradient, and zero it.

        Raises:
            RequestRejected: the trainer refused the step; no weight has changed.
            TrainerLost: see the class.
        """
        self._check_restored("optim_step")
        self._touched = True
        with self._changes("optim_step"):
            answer = self._submit(
                "optim_step",
                lambda model: model.optim_step(
                    adam_params, grad_accumulation_normalization=grad_accumulation_normalization
                ),
                timeout_s,
            )
            self._step += 1
        return answer

    def train_step(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        adam_params: AdamParams,
        *,
        grad_accumulation_normalization: str | None = None,
        loss_fn_config: LossConfig | None = None,
        timeout_s: float | None = None,
    ) -> StepResult:
        """One forward_backward and one optim_step, both submitted before either is waited for.

        Raises:
            RequestRejected: the trainer refused data, loss or step. Where that leaves weights or gradients that nobody
                asked for, the session is lost as well.
            TrainerLost: see the class.
        """
        self._check_data("train_step", data)
        self._touched = True
        started = time.monotonic()

        def work(model: FiretitanTrainingClient) -> tuple[ForwardBackwardOutput, OptimStepResponse]:
            backward = self._sent(
                "train_step", lambda: model.forward_backward(list(data), loss_fn, _config(loss_fn_config))
            )
            step = model.optim_step(adam_params, grad_accumulation_normalization=grad_accumulation_normalization)
            return wait_for_both(backward, step)

        try:
            with self._changes("train_step"):
                output, answer = self._run("train_step", work, timeout_s)
                self._step += 1
        except StepRejected as rejected:
            if rejected.dirty:
                self._loss("a refused train_step has left gradients, or stepped without all of them")
            else:
                self._lose_unless_one_request(data)
            raise self._rejection("train_step", rejected.cause) from None
        metrics = {**output.metrics, **(answer.metrics or {})}
        seconds = time.monotonic() - started
        return StepResult(self._step, loss_sum(output, data), metrics, seconds, output.loss_fn_outputs)

    # -- state and snapshots -------------------------------------------------------------------------------------------

    def save_state(self, name: str, *, timeout_s: float | None = None) -> str:
        """Save weights and optimizer under a name that was never used; returns the path as the trainer answers it.

        Raises:
            RequestRejected: the trainer refused (the name exists, the disk is full, ...).
            TrainerLost: see the class.
        """
        return self.begin_save_state(name).result(timeout_s)

    def begin_save_state(self, name: str) -> PendingSave:
        """As `save_state`, without waiting for the answer: training may go on at once.

        The trainer works off what it is sent in order, so the save holds what was trained before it, and nothing else.

        Raises:
            RequestRejected: a call that changes the weights is under way, so that nobody knows what would be saved.
            TrainerLost: see the class.
        """
        operation = f"save_state({name!r})"
        self._check_saved(operation)
        outcome: Future[str] = Future()
        session = self._session
        answer = self._run(
            operation, lambda model: self._sent(operation, lambda: model.save_state(name)), None, reads_only=True
        )
        session.begin(lambda: str(answer.result().path), outcome, outlives_drop=True)
        return PendingSave(name, lambda timeout_s: self._saved(operation, session, outcome, timeout_s))

    def load_state(self, path: str, *, timeout_s: float | None = None) -> None:
        """Load weights only, into a fresh optimizer; `step` restarts at 0.

        Raises:
            RequestRejected: there is no such state, it is damaged, or it does not fit the model.
            TrainerLost: see the class.
        """
        self._load(f"load_state({path!r})", lambda model: model.load_state(path), 0, timeout_s)

    def load_state_with_optimizer(self, path: str, *, step: int = 0, timeout_s: float | None = None) -> None:
        """Load weights and optimizer; `step` is the step they were saved at.

        Raises:
            RequestRejected: there is no such state, it is damaged, or it does not fit the model.
            TrainerLost: see the class.
        """
        name = f"load_state_with_optimizer({path!r})"
        self._load(name, lambda model: model.load_state_with_optimizer(path), step, timeout_s)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str | None = None, *, timeout_s: float | None = None
    ) -> str:
        """Save a sampler snapshot; returns its full name, `name` with the session's suffix.

        `checkpoint_type` is base, delta or merged_base; None = base first, then deltas (LoRA: always base).

        Raises:
            RequestRejected: the trainer refused, or the type is unknown.
            TrainerLost: see the class.
        """
        self._check_saved("save_weights_for_sampler_ext")
        if checkpoint_type is not None and checkpoint_type not in SAMPLER_CHECKPOINT_TYPES:
            raise RequestRejected(
                f"checkpoint_type must be one of {', '.join(SAMPLER_CHECKPOINT_TYPES)}, got {checkpoint_type!r}."
            )
        saved = self._run(
            f"save_weights_for_sampler_ext({name!r})",
            lambda model: model.save_weights_for_sampler_ext(name, checkpoint_type=checkpoint_type),
            timeout_s or self._state_timeout_s,
            reads_only=True,
        )
        return str(saved.snapshot_name)

    def list_checkpoints(self, *, timeout_s: float | None = None) -> list[str]:
        """Names of the states that the trainer job holds. [] also when the trainer could not tell (the SDK logs why).

        Raises:
            TrainerLost: see the class.
        """
        listed = self._run("list_checkpoints", lambda model: model.list_checkpoints(), timeout_s, reads_only=True)
        return list(listed)

    def saved_step(self, path: str) -> int | None:
        """Optimizer steps in a saved state, as the backend lists it; None when it does not tell (fireworks).

        Args:
            path: "cross_job://<job>/<name>", or a name of the client's own trainer job.
        """
        job_id, _, name = path.removeprefix("cross_job://").rpartition("/")
        if "/" in job_id:  # a path of fireworks
            return None
        try:
            rows = call_with_deadline(lambda: self._manager.list_checkpoints(job_id or self.job_id), _LIST_TIMEOUT_S)
        except Exception as error:
            logger.debug("the checkpoints of %s cannot be listed: %s", job_id or self.job_id, type(error).__name__)
            return None
        steps = [
            row.get("step")
            for row in rows
            if str(row.get("name")).endswith(f"/{name}") and "INFERENCE" not in str(row.get("checkpointType"))
        ]
        return steps[0] if steps and isinstance(steps[0], int) else None

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """The reference under which a state can be loaded, from another trainer job too when that is named. No request.

        Raises:
            RequestRejected: name or job is not a DNS label.
        """
        try:
            return str(
                self._model("resolve_checkpoint_path").resolve_checkpoint_path(name, source_job_id=source_job_id)
            )
        except ValueError as error:
            raise RequestRejected(f"checkpoint {name!r} of trainer {source_job_id!r}: {error}.") from None

    def unload(self, *, timeout_s: float | None = None) -> None:
        """Free the model on the trainer, after the operations under way. The client then needs `reconnect()`.

        Raises:
            RequestRejected, TrainerLost: see the class.
        """
        self._submit("unload", lambda model: model.unload_model(), timeout_s)
        self._loss("its model was unloaded")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        session = TrainingSession()
        with self._losing:
            self._session, self._lost, self._interrupted, self._touched = session, None, None, False
        self._num_sessions += 1

        def work() -> None:
            session.open(
                self._manager,
                self.job_id,
                base_model=self.base_model,
                lora_rank=self.lora_rank,
                seed=self._seed,
                user_metadata=self._user_metadata,
                base_only=self._base_only,
                base_url=self._base_url,
            )

        self._wait("connecting", work, self._default_timeout_s)

    def _load(
        self,
        operation: str,
        submit: Callable[[FiretitanTrainingClient], Answer[object]],
        step: int,
        timeout_s: float | None,
    ) -> None:
        self._check_session(operation)
        self._touched = True
        with self._changes(operation):
            self._submit(operation, submit, timeout_s or self._state_timeout_s)
            self._needs_restore = False
            self._step = step

    def _submit(
        self,
        operation: str,
        submit: Callable[[FiretitanTrainingClient], Answer[T]],
        timeout_s: float | None,
        *,
        reads_only: bool = False,
    ) -> T:
        """Submit a request and wait for its future."""

        def work(model: FiretitanTrainingClient) -> T:
            return self._sent(operation, lambda: submit(model)).result()

        return self._run(operation, work, timeout_s, reads_only=reads_only)

    def _sent(self, operation: str, submit: Callable[[], Answer[T]]) -> Answer[T]:
        """Submit a request. What the SDK itself refuses to send has changed nothing."""
        try:
            return submit()
        except (NotImplementedError, TypeError, ValueError) as error:
            raise RequestRejected(f"{operation} on trainer {self.job_id} was not sent: {error}.") from None

    def _run(
        self,
        operation: str,
        work: Callable[[FiretitanTrainingClient], T],
        timeout_s: float | None,
        *,
        reads_only: bool = False,
    ) -> T:
        model = self._model(operation)
        return self._wait(operation, lambda: work(model), timeout_s or self._default_timeout_s, reads_only=reads_only)

    def _wait(self, operation: str, call: Callable[[], T], seconds: float, *, reads_only: bool = False) -> T:
        """Call with a deadline, and turn what goes wrong into RequestRejected or TrainerLost.

        The SDK's errors are not chained: they hold the request, and so the key in its headers.
        """
        outcome: Future[T] = Future()
        session = self._session
        try:
            session.begin(call, outcome)
            return outcome.result(seconds)
        except (_LossRaised, StepRejected, RequestRejected):
            raise
        except Exception as error:
            failure = self._failure(operation, error, session, seconds)
        except BaseException:  # Ctrl-C, or a time-out that an orchestrator raises in this thread
            self._interrupted = _Interrupted(operation, outcome, reads_only)
            raise
        raise failure

    def _saved(self, operation: str, session: TrainingSession, outcome: Future[str], timeout_s: float | None) -> str:
        """Wait for a save, in any thread. Interrupted, it can be waited for again."""
        seconds = timeout_s or self._state_timeout_s
        try:
            return outcome.result(seconds)
        except Exception as error:
            failure = self._failure(operation, error, session, seconds)
        raise failure

    def _failure(
        self, operation: str, error: Exception, session: TrainingSession, seconds: float
    ) -> RequestRejected | TrainerLost:
        """What went wrong with a call in a session, in our words; the session is lost unless it was refused."""
        if isinstance(error, CancelledError):
            return TrainerLost(
                f"{operation} on trainer {self.job_id} was not waited for, its session was given up: "
                f"{self._lost or 'reconnected'}. {_REMEDY}"
            )
        if isinstance(error, RequestFailedError) and is_user_error(error):
            return self._rejection(operation, error)
        late = f"{operation} was not answered within {seconds:g} s"
        return self._loss(late if isinstance(error, TimeoutError) else f"{operation}: {describe(error)}", session)

    def _rejection(self, operation: str, error: RequestFailedError) -> RequestRejected:
        return RequestRejected(
            f"{operation} was refused by trainer {self.job_id} (request {error.request_id}): {message_of(error)}"
        )

    def _loss(self, reason: str, session: TrainingSession | None = None) -> TrainerLost:
        """Give a session up, the present one if none is named: no further call goes out in it. The first reason stays.

        The session may be an earlier one, whose save failed in another thread: then the present one is left alone.
        """
        reason = reason.replace(self._manager.api_key, "[key]")
        with self._losing:
            lost = session or self._session
            if lost is self._session and self._lost is None:
                self._lost = reason
        lost.drop()
        return TrainerLost(f"trainer {self.job_id} is lost: {reason}. {_REMEDY}")

    def _lose_unless_one_request(self, data: Sequence[Datum]) -> None:
        """After a refusal: other requests of the same call may have left their gradients."""
        if not is_one_request(data):
            self._loss("a refused call went out in several requests, some of which may have left gradients")

    def _model(self, operation: str) -> FiretitanTrainingClient:
        self._check_session(operation)
        assert self._session.training is not None, "a session that is not lost has a model"
        return self._session.training

    def _check_session(self, operation: str) -> None:
        self.settle(0.0)
        if self._lost is not None:
            raise TrainerLost(f"{operation} was not sent: trainer {self.job_id} is lost: {self._lost}. {_REMEDY}")

    def _check_data(self, operation: str, data: Sequence[Datum]) -> None:
        self._check_restored(operation)
        if not data:
            raise RequestRejected(f"{operation} on trainer {self.job_id} was not sent: there are no datums.")

    @contextmanager
    def _changes(self, operation: str) -> Iterator[None]:
        """The weights change in this block, and `step` with them."""
        self._changing = operation
        try:
            yield
        finally:
            self._changing = None

    def _check_saved(self, operation: str) -> None:
        """Before the weights are saved."""
        self._check_restored(operation)
        if self._changing is not None:
            raise RequestRejected(
                f"{operation} was not sent: {self._changing} is under way on trainer {self.job_id}, so which weights "
                "it would hold is not known. Save before or after it."
            )

    def _check_restored(self, operation: str) -> None:
        self._check_session(operation)
        if self._needs_restore:
            raise TrainerLost(
                f"{operation} was not sent: the client has reconnected to trainer {self.job_id}, and its model is a "
                "fresh one. Call cookbook.checkpoints.resolve_resume() first, which loads the last commit."
            )


def _config(loss_fn_config: LossConfig | None) -> dict[str, float | str | bool] | None:
    return None if loss_fn_config is None else dict(loss_fn_config)
