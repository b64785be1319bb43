"""The budget of Prefect records: which calls of a task get a task run of their own, and how each is retried.

A loop of 50 ms steps would drown a Prefect server in task runs (each is about 20 KB of its database, and a saturated
server drops events). So a call within `MIN_INTERVAL_S` of that task's last record runs the same body, with the same
deadline and retries, but without a record; the next record says how many calls it stands for.

Deadlines are in the bodies (HTTP time-outs, poll loops); Prefect's own time-out is a backstop a little behind them.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import prefect.futures
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_engine import TaskRunTimeoutError
from prefect.utilities.annotations import quote

from cookbook.config import RetryConfig
from cookbook.recovery import is_retried, retrying
from cookbook.termination import Unbroken
from tasks.page import has_page

__all__ = ["BACKSTOP_S", "MIN_INTERVAL_S", "Policy", "RecordedTask", "Records", "recorded"]

P = ParamSpec("P")
T = TypeVar("T")


class Recording(Protocol):
    """What the first argument of a task must have: the records of its run."""

    @property
    def records(self) -> Records: ...


class Configured(Protocol):
    """What the config of a run must have: how idempotent work is retried."""

    @property
    def retry(self) -> RetryConfig: ...


R = TypeVar("R", bound=Recording)

MIN_INTERVAL_S = 5.0
"""Seconds between two records of one task."""

BACKSTOP_S = 30.0
"""Seconds by which Prefect's time-out lies behind the deadline inside the body."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """How one task is called in one run: its deadline in seconds, and its retries (None = a single attempt)."""

    deadline_s: float
    retry: RetryConfig | None

    def prefect_options(self, given_up: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """The same policy as options of a Prefect task; nothing is retried once it was `given_up`."""
        if self.retry is None or self.retry.attempts == 1:
            return {"timeout_seconds": self.deadline_s + BACKSTOP_S, "retries": 0}
        retry, started = self.retry, time.monotonic()

        def goes_on(_task: Any, _run: Any, state: Any) -> bool:
            error = state.result(raise_on_failure=False)
            in_time = retry.deadline_s == 0 or time.monotonic() - started < retry.deadline_s
            # Prefect ends a task with its own time-out also when it is the flow's time that is up, and only once: a
            # retry would run on without any. What may be retried ends by the deadline in the body before that.
            is_prefects = isinstance(error, TaskRunTimeoutError)
            return in_time and is_retried(error) and not is_prefects and not given_up()

        return {
            "timeout_seconds": self.deadline_s + BACKSTOP_S,
            "retries": retry.attempts - 1,
            "retry_delay_seconds": retry.delays(),
            "retry_jitter_factor": retry.jitter or None,
            "retry_condition_fn": goes_on,
        }

    def call(self, body: Callable[[], T], given_up: Callable[[], bool] = lambda: False) -> T:
        """Run `body` under this policy without Prefect; nothing is retried once it was `given_up`."""
        if self.retry is None:
            return body()
        return retrying(self.retry, body, _warn, given_up)


def _warn(error: Exception, pause: float) -> None:
    logger.warning("%s: %s; trying again in %.1f s", type(error).__name__, error, pause)


class RecordedTask(Generic[R, P, T]):
    """A function of a run that is also a Prefect task, recorded within the budget. Made by `recorded`."""

    def __init__(
        self, body: Callable[Concatenate[R, P], T], deadline: Callable[[Any], float], retried: bool, persist: bool
    ) -> None:
        functools.update_wrapper(self, body)
        self.body = body
        self.deadline = deadline
        self.retried = retried
        self.task = task(name=body.__name__, cache_policy=NO_CACHE, persist_result=persist)(body)

    def policy(self, config: Configured) -> Policy:
        return Policy(self.deadline(config), config.retry if self.retried else None)

    def __call__(self, run: R, *args: P.args, **kwargs: P.kwargs) -> T:
        return run.records.call(self, run, *args, **kwargs)


def recorded(
    *, deadline: Callable[[Any], float], retried: bool, persist: bool = False, unbroken: bool = False
) -> Callable[[Callable[Concatenate[R, P], T]], RecordedTask[R, P, T]]:
    """Make a task out of a function whose first argument is the run.

    Args:
        deadline: config -> seconds for one attempt; the body must keep it by itself.
        retried: whether the body is idempotent and retried as the run's RetryConfig says. Never for a training step.
        persist: whether Prefect keeps the (small) result.
        unbroken: whether the body goes on to its end when the process is told to stop (`Records.unbroken`): for what
            changes the weights and writes down that it did.
    """

    def decorate(body: Callable[Concatenate[R, P], T]) -> RecordedTask[R, P, T]:
        return RecordedTask(_unbroken(body) if unbroken else body, deadline, retried, persist)

    return decorate


def _unbroken(body: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    def whole(run: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run.records.unbroken.call(lambda: body(run, *args, **kwargs))

    functools.update_wrapper(whole, body)
    return whole


def _unsearched(argument: Any) -> Any:
    """An argument in which Prefect does not look for futures: it would visit every token of a step's completions."""
    return argument if isinstance(argument, str | int | float | None) else quote(argument)


class Records:
    """The records that one run has made: when each task was last recorded, and how many calls each had."""

    def __init__(self, config: Configured, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._last: dict[str, float] = {}
        self._unrecorded: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.recorded: Counter[str] = Counter()
        self.unbroken = Unbroken()
        """Where the bodies run that nothing breaks off."""

    def call(self, recorded_task: RecordedTask[R, P, T], run: R, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the task, with a Prefect record when its last one is old enough."""
        name = recorded_task.body.__name__
        self.calls[name] += 1
        policy = recorded_task.policy(self._config)
        if not has_page():
            return policy.call(lambda: recorded_task.body(run, *args, **kwargs))
        if self._clock() - self._last.get(name, float("-inf")) < MIN_INTERVAL_S:
            self._unrecorded[name] += 1
            return policy.call(lambda: recorded_task.body(run, *args, **kwargs))
        skipped = self._unrecorded.pop(name, 0)
        self.recorded[name] += 1
        configured = recorded_task.task.with_options(
            task_run_name=f"{name} (and {skipped} before)" if skipped else name, **policy.prefect_options()
        )
        try:
            return configured(run, *map(_unsearched, args), **kwargs)
        finally:
            self._last[name] = self._clock()

    def side_by_side(self, tasks: Sequence[RecordedTask[R, [], Any]], run: R) -> None:
        """Call tasks at the same time, each in a thread and with a record of its own; wait for all of them.

        The deadlines in the bodies hold. Prefect's time-out behind them is left out: it cannot interrupt a thread. Once
        one has failed, or the wait is interrupted, the others are not retried any more; releasing what they wait for
        ends them.

        Raises:
            what the first one to fail raises, at once.
        """
        given_up = threading.Event()
        try:
            for future in self._begun(tasks, run, given_up.is_set):
                future.result()
        except BaseException:
            given_up.set()
            raise

    def _begun(
        self, tasks: Sequence[RecordedTask[R, [], Any]], run: R, given_up: Callable[[], bool]
    ) -> Iterator[Future[Any] | PrefectFuture[Any]]:
        """The tasks, begun, in the order in which they end."""
        if has_page():
            yield from prefect.futures.as_completed([self._submit(each, run, given_up) for each in tasks])
        else:
            yield from concurrent.futures.as_completed([self._start(each, run, given_up) for each in tasks])

    def _submit(self, each: RecordedTask[R, [], T], run: R, given_up: Callable[[], bool]) -> PrefectFuture[T]:
        """Run a task in a thread, with a record."""
        name = each.body.__name__
        self.calls[name] += 1
        self.recorded[name] += 1
        options = each.policy(self._config).prefect_options(given_up) | {"timeout_seconds": None}
        return each.task.with_options(task_run_name=name, **options).submit(run)

    def _start(self, each: RecordedTask[R, [], T], run: R, given_up: Callable[[], bool]) -> Future[T]:
        """Run a task in a thread, without a record. A daemon, as it may wait for what never comes."""
        self.calls[each.body.__name__] += 1
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(each.policy(self._config).call(lambda: each.body(run), given_up))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name=each.body.__name__, daemon=True).start()
        return future

    def table(self) -> list[dict[str, Any]]:
        """Calls and records of each task, for the report at the end."""
        return [{"task": name, "calls": n, "records": self.recorded[name]} for name, n in sorted(self.calls.items())]
