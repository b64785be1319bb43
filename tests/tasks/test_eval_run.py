"""The end of an evaluation that failed: what it deployed is freed or named, whatever is pressed meanwhile."""

import logging
import signal

import pytest

from cookbook.config import Environment
from cookbook.errors import ProvisioningError
from cookbook.evaluation_config import EvaluationConfig
from cookbook.run import RunDirectory
from tasks.eval_run import EvalRun


@pytest.fixture
def open_run(tmp_path):
    """Makes an open evaluation that has a deployment."""
    opened = []

    def make(**deployment):
        fields = {"model": "m", "dataset": "d", "deployment": deployment}
        config = EvaluationConfig(log_path=str(tmp_path / "run"), **fields)
        home = tmp_path / "home"
        directory = RunDirectory.open(config.log_path, recipe="eval", config={}, home=home)
        opened.append(directory)
        run = EvalRun(config, directory, Environment(home=home, fireworks_base_url=""))
        run.ledger.confirm(run.ledger.intend("deployment", "model", 1, resource_id="m-eval-1"))
        return run

    yield make
    for directory in opened:
        directory.close()


def test_ctrl_c_during_the_release_does_not_break_it_off(open_run, monkeypatch):
    run, released = open_run(), []

    def release(control, ledger):
        signal.raise_signal(signal.SIGINT)
        released.append(True)

    monkeypatch.setattr("tasks.eval_run.release_deployments", release)
    monkeypatch.setattr(EvalRun, "control", None)
    try:
        run.fail()
    except KeyboardInterrupt:  # else it would end the tests
        pytest.fail("the release was broken off")
    assert released == [True]


@pytest.mark.parametrize(
    ("deployment", "told"),
    [({}, "when nobody asks them anything"), ({"replica_count": 2}, "replica_count=2 they run until then")],
)
def test_a_deployment_that_cannot_be_freed_is_named(open_run, monkeypatch, caplog, deployment, told):
    run = open_run(**deployment)

    def release(control, ledger):
        raise ProvisioningError("no answer")

    monkeypatch.setattr("tasks.eval_run.release_deployments", release)
    monkeypatch.setattr(EvalRun, "control", None)
    with caplog.at_level(logging.WARNING):
        run.fail()
    for part in ("no answer", "m-eval-1", str(run.directory.path), told):
        assert part in caplog.text
