"""What is done about each error: one table."""

import pytest

from cookbook import errors
from cookbook.errors import DeploymentLost, LeaseLost, SamplingError, TrainerLost, WeightSyncError
from cookbook.recovery import ACTIONS, Action, action_for, is_restored, is_retried


def test_every_error_of_ours_is_in_the_table():
    ours = {getattr(errors, name) for name in errors.__all__}
    kinds = {kind for kind in ours if isinstance(kind, type) and issubclass(kind, Exception)}
    assert set(ACTIONS) == kinds - {errors.CookbookError}


def test_a_lost_trainer_restores_the_run_and_is_not_asked_again():
    for error in (TrainerLost("gone"), DeploymentLost("gone")):
        assert is_restored(error)
        assert not is_retried(error)


def test_a_weight_sync_is_retried_first_and_restored_then():
    assert is_retried(WeightSyncError("late"))
    assert is_restored(WeightSyncError("late"))


def test_the_loser_of_a_run_stops():
    assert action_for(LeaseLost("taken over")) is Action.STOP


def test_an_error_of_the_network_is_tried_again():
    assert is_retried(ConnectionError("reset"))
    assert not is_restored(ConnectionError("reset"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_is_neither_retried_nor_restored(error):
    assert action_for(error) is Action.STOP


def test_a_kind_that_is_not_named_goes_with_its_base():
    class Refused(SamplingError):
        pass

    assert action_for(Refused("no")) is action_for(SamplingError("no"))
