"""SIGKILL below Prefect: of the flow and of each process of the backend, at every phase boundary and at random moments.

The whole suite is `make faults`. Here, in `make test`: one recipe, a kill of each kind of process. What a lost kill's
message says runs it again.
"""

import json
import os
from pathlib import Path

import pytest

from tests.faults.driver import RECIPES
from tests.faults.kills import run_cell
from tests.faults.plan import kills_for
from tests.faults.points import PHASES, Kill, points_of
from tests.faults.runs import home_of_suite

SEEDS = (0, 1)
SHORT = (
    *("flow@create.after:1", "flow@start.after:1", "trainer@train_step.before:2", "flow@save_confirmed.before:1"),
    *("control-plane@commit.before:1", "flow@commit.after:1", "supervisor@log.after:2", "flow@promote.after:1"),
)


@pytest.fixture
def place(tmp_path):
    with home_of_suite(tmp_path) as place:
        yield place


@pytest.mark.timeout(180)
def test_a_run_of_which_each_process_is_killed_ends_as_an_undisturbed_one(place):
    cell = run_cell("sft", 0, place, [Kill.parse(kill) for kill in SHORT])
    assert cell.lost == []
    assert sorted(result.kill for result in cell.results) == sorted(SHORT)


def test_every_phase_of_the_table_is_killed_in_some_cell():
    planned = {kill.point for recipe in RECIPES for seed in SEEDS for kill in kills_for(recipe, seed, 5.0)}
    assert set(points_of(PHASES)) <= planned


@pytest.mark.parametrize("text", ["flow@no-such.before:1", "nobody@commit.after:1", "flow@commit:1"])
def test_a_kill_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="There are"):
        Kill.parse(text)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_whatever_is_killed_the_run_ends_as_an_undisturbed_one(place, recipe, seed):
    cell = run_cell(recipe, seed, place)
    if folder := os.environ.get("FAULT_REPORTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"kills-{recipe}-{seed}.json").write_text(json.dumps(cell.to_dict(), indent=2) + "\n")
    assert cell.lost == []
    assert len(cell.results) >= 40
