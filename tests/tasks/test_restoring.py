"""A recipe is run again from its last commit when its trainer is lost, and only then."""

import pytest

from cookbook.checkpoints import last_commit
from cookbook.config import SFTConfig
from cookbook.errors import CheckpointError, DataError, LeaseLost, TrainerLost
from cookbook.files import append_jsonl, read_json
from cookbook.run import Progress, RunDirectory
from tasks.restoring import restoring
from tasks.run import Run


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path / "home"))
    retry = {"restores": 2, "initial_delay_s": 0.001}
    return SFTConfig(log_path=str(tmp_path / "run"), base_model="m", dataset="rows.jsonl", retry=retry)


class Algorithm:
    """Does what it is told, one thing a start; then it ends well."""

    def __init__(self, *script):
        self.script, self.epochs = list(script), []

    def __call__(self, run, config):
        self.epochs.append(run.directory.epoch)
        for act in self.script.pop(0) if self.script else ():
            if isinstance(act, BaseException):
                raise act
            with run.directory.guard():
                row = {"name": f"step-{act}", "step": act, "data_consumed": act, "state_path": f"s{act}"}
                append_jsonl(run.directory.path / "checkpoints.jsonl", row)
        return "done"


LOST = TrainerLost("trainer t is lost.")


def test_a_lost_trainer_sends_the_run_back_with_a_new_lease_epoch(config):
    algorithm = Algorithm([LOST], [LOST])
    assert restoring(config, Run, algorithm) == "done"
    assert algorithm.epochs == [1, 2, 3]


def test_it_ends_once_it_was_lost_too_often_in_a_row(config):
    algorithm = Algorithm([LOST], [LOST], [LOST], [])
    with pytest.raises(TrainerLost):
        restoring(config, Run, algorithm)
    assert len(algorithm.epochs) == 3  # the first start and two restores


def test_a_further_commit_starts_the_count_again(config):
    algorithm = Algorithm([LOST], [LOST], [5, LOST], [LOST], [])
    assert restoring(config, Run, algorithm) == "done"
    assert len(algorithm.epochs) == 5


@pytest.mark.parametrize("error", [LeaseLost("taken over"), DataError("bad row"), KeyboardInterrupt()])
def test_other_errors_end_it_at_once(config, error):
    def failing(run, config):
        seen.append(run)
        raise error

    seen = []
    with pytest.raises(type(error)):
        restoring(config, Run, failing)
    assert len(seen) == 1


def test_a_resumed_run_counts_its_old_commits_for_nothing(config):
    with pytest.raises(DataError):
        restoring(config, Run, Algorithm([3, DataError("x")]))
    with pytest.raises(TrainerLost):
        restoring(config, Run, Algorithm([LOST], [LOST], [LOST], []))


def test_what_it_has_is_freed_when_the_next_start_cannot_begin(config, monkeypatch):
    def unwritable(directory):
        raise CheckpointError("the disk is full.")

    failed = []
    monkeypatch.setattr(RunDirectory, "renewed", unwritable)
    monkeypatch.setattr(Run, "fail", lambda run, error: failed.append(error))
    with pytest.raises(CheckpointError, match="full"):
        restoring(config, Run, Algorithm([LOST]))
    assert [f"{error}" for error in failed] == ["the disk is full."]


def test_a_second_signal_while_it_saves_does_not_keep_it_from_freeing(config, monkeypatch):
    def told_again(run):
        raise SystemExit(143)

    failed = []
    monkeypatch.setattr("tasks.termination._save", told_again)
    monkeypatch.setattr(Run, "fail", lambda run, error: failed.append(error))
    with pytest.raises(SystemExit):
        restoring(config, Run, Algorithm([KeyboardInterrupt()]))
    assert [type(error) for error in failed] == [KeyboardInterrupt]


def test_told_to_stop_before_the_first_step_it_commits_nothing(config):
    def stopped(run, config):
        run.progress = Progress(0, 0, 0, 0, permutation_seed=0, total_steps=3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restoring(config, Run, stopped)
    assert last_commit(config.log_path) is None


def test_a_trainer_lost_to_another_owner_of_the_run_is_not_fought_over(config, tmp_path):
    def taken_over(run, config):
        (run.directory.path / ".lock").unlink()  # a file system that forgets locks
        contents = config.model_dump(mode="json")
        others.append(RunDirectory.open(config.log_path, recipe="sft", config=contents, home=tmp_path / "home"))
        raise LOST

    others = []
    with pytest.raises(LeaseLost, match="was taken over by process"):
        restoring(config, Run, taken_over)
    assert len(others) == 1
    others[0].close()
    assert read_json(tmp_path / "run" / "run.json")["lease"]["epoch"] == 2
