"""Running a recipe from wherever its run stands, and again from there when it loses its trainer on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from cookbook.checkpoints import CheckpointRow, last_commit
from cookbook.config import Environment, RecipeConfig, environment
from cookbook.recovery import is_restored
from cookbook.run import RunDirectory
from cookbook.summary import RunSummary
from tasks.page import page_id, page_log
from tasks.run import Run
from tasks.termination import freed_at_end, interruptible

__all__ = ["restoring"]

C = TypeVar("C", bound=RecipeConfig)
R = TypeVar("R", bound=Run)


def restoring(
    config: C, kind: Callable[[C, RunDirectory, Environment], R], algorithm: Callable[[R, C], RunSummary]
) -> RunSummary:
    """Run a recipe in its run directory, from its last commit if it has one, and free everything at the end.

    One path for a fresh run, a retried flow run, a worker that takes over and a new run with the same log_path; and for
    a run that loses its trainer or deployment on the way: it goes that path again, in this process, at most
    `retry.restores` times in a row without a further commit.

    Args:
        kind: what the tasks of the recipe share.
        algorithm: the recipe. What it provisioned is found again by its id when it runs again.

    Raises:
        LeaseLost: another process owns the run.
        Abort: so it is, and that process works for the same flow run.
        ConfigError: the run was started with another config, and has a commit.
        TrainerLost, DeploymentLost, WeightSyncError: lost once too often.
    """
    env = environment()
    with interruptible():
        directory = _owned(config, env)
        commit, restores = last_commit(directory.path), 0
        while True:
            with directory, freed_at_end(kind(config, directory, env)) as run:
                try:
                    summary = run.finished()
                    return summary if summary is not None else algorithm(run, config)
                except Exception as error:
                    reached = last_commit(directory.path)
                    restores = restores + 1 if reached == commit else 1
                    commit = reached
                    if not is_restored(error) or restores > config.retry.restores:
                        raise
                    directory.check_lease()  # it may be lost because another process has taken the run over
                    _announce(error, commit, restores, config)
                    run.give_up()
                time.sleep(config.retry.delay(restores))
                directory = directory.renewed()  # owned throughout: nobody is to take the run for a dead one


def _owned(config: RecipeConfig, env: Environment) -> RunDirectory:
    contents = config.model_dump(mode="json")
    return RunDirectory.open(
        config.log_path, recipe=config.recipe, config=contents, home=env.home, started_by=page_id()
    )


def _announce(error: BaseException, commit: CheckpointRow | None, restores: int, config: RecipeConfig) -> None:
    origin = f"checkpoint {commit.name}" if commit is not None else "the start, as nothing is committed yet"
    page_log().warning("%s Restoring from %s (%d of %d).", error, origin, restores, config.retry.restores)
