"""Kills through Prefect: the flow's process, its worker, the server, and what is below, with every way to go on.

Each recipe with two seeds: six kills a run, four runs at a time on one real server with two workers. After that each
run must have come to what the undisturbed one comes to, Prefect must call it completed, and nothing may be left.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from cookbook.config import Environment
from cookbook.control_plane import connect
from tests.faults import driver
from tests.faults.checks import Outcome, is_identical, leaks, log_of, outcome, run_id_of
from tests.faults.prefect_plays import ACTS, Play, losses_of, recorded_rollouts
from tests.faults.prefect_stage import Stage, until
from tests.faults.runs import config_of, home_of_suite

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

SEEDS = (1, 2)
KILLS_A_RUN = 6
EPOCHS = {"sft": 12, "dpo": 12, "orpo": 12, "rl": 2}
STEPS = {"sft": 60, "dpo": 60, "orpo": 60, "rl": 48}
FLOW_RETRIES = {"PREFECT_FLOWS_DEFAULT_RETRIES": "50", "PREFECT_FLOWS_DEFAULT_RETRY_DELAY_SECONDS": "1"}
"""What makes Prefect itself run a flow again that has raised: environment variables of a deployment or a flow run."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with home_of_suite(tmp_path_factory.mktemp("prefect-kills")) as place:
        yield place


@pytest.fixture(scope="module")
def stage(place):
    with Stage(place.folder / "stage", place.environment) as stage:
        stage.start_server()
        stage.make_pool()
        stage.start_worker()
        stage.start_worker()
        stage.deploy()
        yield stage


@pytest.fixture(scope="module")
def played():
    """All plays so far; what they came to is written at the end."""
    plays: list[Play] = []
    yield plays
    report = report_of(plays)
    print(json.dumps(report["ways"], indent=2))
    if folder := os.environ.get("FAULT_REPORTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "prefect-kills.json").write_text(json.dumps(report, indent=2) + "\n")


def plays_of(seed, stage, place):
    """One play for each recipe. The acts go round; every other run is run again by Prefect, and not by itself."""
    plays = []
    for number, recipe in enumerate(driver.RECIPES):
        first = KILLS_A_RUN * (number + len(driver.RECIPES) * (seed - 1))
        acts = tuple(ACTS[(first + n) % len(ACTS)] for n in range(KILLS_A_RUN))
        by_prefect = (number + seed) % 2 == 0
        config = config_for(recipe, seed, place, "killed", restores=0 if by_prefect else 3)
        variables = FLOW_RETRIES if by_prefect else {}
        rng = random.Random(1000 * seed + number)
        plays.append(Play(stage, place.home, recipe, config, acts, rng, STEPS[recipe], variables))
    return plays


def config_for(recipe, seed, place, name, restores=3):
    retry = {"initial_delay_s": 0.1, "max_delay_s": 0.5, "restores": restores}
    path = place.folder / f"{recipe}-{seed}-{name}"
    fields = {"storage": {"keep_last": None}} if recipe == "rl" else {}  # all rollouts stay, to be counted
    return config_of(recipe, seed, place, path, epochs=EPOCHS[recipe], retry=retry, **fields)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_run_that_was_killed_through_prefect_ends_as_if_nothing_had_happened(seed, stage, place, played):
    plays = plays_of(seed, stage, place)
    played += plays
    threads = [threading.Thread(target=play.run, name=play.recipe, daemon=True) for play in plays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda play: compare(play, seed, place), plays))
    left = left_over(stage, place, plays)
    for play in plays:
        play.problem = play.problem or (f"left behind by one of these runs: {left}" if left else None)
    assert [f"{play.recipe}: {play.problem}" for play in plays if play.problem is not None] == []
    assert sum(len(play.done) for play in plays) >= 20


def compare(play, seed, place):
    """Note where a run that has ended came out otherwise than an undisturbed one."""
    if play.problem is None:
        try:
            play.problem = "; ".join(differences(play, seed, place)) or None
        except Exception as error:
            play.problem = f"it cannot be compared: {type(error).__name__}: {error}"


def differences(play, seed, place):
    """Where a run has come out otherwise than an undisturbed one, which is run now, below Prefect."""
    config = config_for(play.recipe, seed, place, "undisturbed")
    process = driver.start(play.recipe, config, log=log_of(config), environment=place.environment)
    assert driver.wait(process, 300) == 0, log_of(config).read_text()[-3000:]
    expected = outcome(play.recipe, config, place.home)
    driver.journal(log_of(play.config)).touch()  # a flow run of Prefect's writes none
    found = outcome(play.recipe, play.config, place.home)
    problems = [f"{play.recipe}: {line}" for line in different_parts(play, found, expected)]
    if play.recipe == "rl":
        problems += [f"rl: {line}" for line in wrong_rows(play)]
    return problems


def different_parts(play: Play, found: Outcome, expected: Outcome):
    if play.recipe == "rl":
        if not is_identical(found, expected):
            print("RL: rows met in other steps than in the undisturbed run, as they may")
        pairs = [("rows, epoch and position", found.commit[1:], expected.commit[1:])]
    else:
        names = ("weights", "optimizer", "sampler", "model", "commit", "metrics")
        pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [f"{name}: {ours}, undisturbed {theirs}" for name, ours, theirs in pairs if ours != theirs]


def wrong_rows(play):
    """Every row must have ended once, and what was recorded before a kill must have been trained as it was."""
    recorded, losses = recorded_rollouts(play.path), losses_of(play.path)
    rows = Counter(
        line["row"]
        for text in recorded.values()
        for line in map(json.loads, text.splitlines())
        if line["kind"] in ("group", "rejected")
    )
    total = len(Path(play.config["dataset"]).read_text().splitlines()) * play.config["epochs"]
    problems = [f"row {row} has ended {rows[row]} times" for row in range(total) if rows[row] != 1]
    for step, (loss, rollouts) in play.seen.items():
        if rollouts is not None and (recorded.get(step), losses.get(step)) != (rollouts, loss):
            problems.append(f"step {step} was recorded, and trained otherwise after a kill")
    return problems


def left_over(stage, place, plays):
    """What is still there after the janitor: resources and workers of the backend, and processes of Prefect's."""
    janitor = stage.submit("janitor", {"grace_s": 0, "settle_s": 1})
    until(lambda: stage.state(janitor) == "COMPLETED", 120, "the janitor is done")
    with connect("embedded", Environment(place.home, fireworks_base_url="")) as control:
        found = leaks(place.home, control, [run_id_of(play.config) for play in plays])
    with suppress(AssertionError):  # the janitor's own has reported its end, and is about to end
        until(lambda: stage.flow_processes() == [], 30, "all processes have ended", 0.5)
    found += stage.flow_processes()
    for play in plays:
        for flow_run in play.flow_runs:
            if stage.state(flow_run) not in ("COMPLETED", "CRASHED", "FAILED"):
                found.append(f"flow run {flow_run} of {play.recipe} is {stage.history(flow_run)}")
    return found


def report_of(plays):
    """Kills by target and way: tried and survived; and each of them."""
    ways: dict[str, Counter[str]] = {}
    for play in plays:
        for done in play.done:
            count = ways.setdefault(f"{done.hit}, {done.way}", Counter())
            count.update(["tried", "survived" if play.problem is None else "lost"])
    kills = [{"recipe": play.recipe, **asdict(done)} for play in plays for done in play.done]
    return {
        "kills": len(kills),
        "ways": ways,
        "brought on after another run's kill": sum(play.unplanned for play in plays),
        "problems": [play.problem for play in plays if play.problem],
        "each": kills,
    }
