"""The budget of Prefect records, without a server: a recorded call is seen as a call of the Prefect task."""

import pytest
from prefect.states import Failed
from prefect.task_engine import TaskRunTimeoutError

from cookbook.config import RetryConfig, SFTConfig
from cookbook.errors import RequestRejected, TrainerLost
from tasks.record import BACKSTOP_S, MIN_INTERVAL_S, Policy, Records, recorded

QUICK = RetryConfig(attempts=3, initial_delay_s=0.001, jitter=0.0)


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """A flow run of Prefect's, as far as records know."""
    monkeypatch.setattr("tasks.record.has_page", lambda: True)


def config(**fields):
    return SFTConfig(log_path="runs/x", base_model="m", dataset="d", retry=QUICK, **fields)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Spy:
    """Stands where the Prefect task stands; counts the calls that would open a task run."""

    def __init__(self, body):
        self.body, self.names, self.options = body, [], []

    def with_options(self, *, task_run_name, **options):
        self.names.append(task_run_name)
        self.options.append(options)
        return self.body


def spied(recorded_task):
    recorded_task.task = Spy(recorded_task.body)
    return recorded_task.task


class FakeRun:
    def __init__(self, clock, **fields):
        self.records = Records(config(**fields), clock)


@recorded(deadline=lambda c: c.step_timeout_s, retried=False)
def step(run, number):
    """A body."""
    return number + 1


def test_two_thousand_short_steps_open_few_records_and_lose_no_call():
    clock, spy = Clock(), spied(step)
    run = FakeRun(clock)
    for number in range(2000):
        assert step(run, number) == number + 1
        clock.now = (number + 1) / 20
    assert run.records.calls["step"] == 2000
    assert len(spy.names) == run.records.recorded["step"] == 20  # 100 s of steps, a record every 5 s
    assert spy.names[0] == "step"
    assert spy.names[1] == "step (and 99 before)"


def test_slow_calls_are_all_recorded():
    clock, spy = Clock(), spied(step)
    run = FakeRun(clock)
    for number in range(5):
        step(run, number)
        clock.now += MIN_INTERVAL_S
    assert spy.names == ["step"] * 5


def test_prefects_time_out_is_a_backstop_behind_the_deadline_from_the_config():
    spy = spied(step)
    step(FakeRun(Clock(), step_timeout=7), 1)
    assert spy.options[0]["timeout_seconds"] == 7 + BACKSTOP_S
    assert spy.options[0]["retries"] == 0  # never for a training step


def flaky(errors):
    def body():
        if errors:
            raise errors.pop(0)
        return "done"

    return body


def test_an_unrecorded_call_is_retried_like_a_recorded_one():
    assert Policy(1.0, QUICK).call(flaky([OSError("a"), OSError("b")])) == "done"
    assert Policy(1.0, QUICK).prefect_options()["retries"] == 2


def test_attempts_are_bounded():
    errors = [OSError(str(n)) for n in range(9)]
    with pytest.raises(OSError, match="2"):
        Policy(1.0, QUICK).call(flaky(errors))
    assert len(errors) == 6


def test_without_a_retry_config_there_is_one_attempt():
    errors = [OSError("first"), OSError("second")]
    with pytest.raises(OSError, match="first"):
        Policy(1.0, None).call(flaky(errors))


@pytest.mark.parametrize("error", [TrainerLost("gone"), RequestRejected("no")])
def test_errors_that_another_attempt_cannot_mend_are_not_retried(error):
    errors = [error]
    with pytest.raises(type(error)):
        Policy(1.0, QUICK).call(flaky(errors))
    assert errors == []


def test_a_total_deadline_ends_the_retries():
    slow = RetryConfig(attempts=5, initial_delay_s=10, deadline_s=1)
    with pytest.raises(OSError, match="x"):
        Policy(1.0, slow).call(flaky([OSError("x")]))


def test_prefects_own_time_out_is_not_retried():
    """It may be the flow's, which comes only once."""
    goes_on = Policy(60, QUICK).prefect_options()["retry_condition_fn"]
    assert goes_on(None, None, Failed(data=TimeoutError("a connection")))
    assert not goes_on(None, None, Failed(data=TaskRunTimeoutError("Scope timed out after 90.0 second(s).")))
