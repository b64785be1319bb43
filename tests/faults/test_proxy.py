"""The proxy suite: all recipes through a proxy that injects every legal fault, and nothing comes of it.

FAULT_REPORTS=DIR writes proxy.json there: what was tried, survived and lost, by endpoint and fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults import driver
from tests.faults.proxy_runs import ProxyRun, cloud_of_suite, disturbed_run, report
from tests.faults.proxy_table import LEGAL_FAULTS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

CELLS = [(recipe, seed) for seed in (0, 1) for recipe in driver.RECIPES]
AT_ONCE = 2
"""Most of a run is waiting: for what it asks again a little later."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[tuple[str, int], ProxyRun]]:
    with (
        cloud_of_suite(tmp_path_factory.mktemp("proxy") / "suite") as cloud,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        done = dict(zip(CELLS, pool.map(lambda cell: disturbed_run(cloud, *cell), CELLS), strict=True))
        found = report(done.values())
        print(json.dumps({name: value for name, value in found.items() if name != "endpoints"}, indent=2))
        if folder := os.environ.get("FAULT_REPORTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "proxy.json").write_text(json.dumps(found, indent=2) + "\n")
        yield done


@pytest.mark.parametrize(("recipe", "seed"), CELLS)
def test_a_run_through_all_legal_faults_ends_as_an_undisturbed_one_and_leaves_nothing(runs, recipe, seed):
    run = runs[recipe, seed]
    assert run.problems == ()
    assert run.identical or recipe == "rl"
    assert run.passed["unknown"] == 0  # every endpoint that it used is in the table


def test_every_endpoint_met_faults_and_there_were_2000_in_all(runs):
    met = sum((run.met for run in runs.values()), next(iter(runs.values())).met.__class__())
    assert met.total() >= 2000
    assert {endpoint.name for endpoint in LEGAL_FAULTS} == {name for name, _ in met}
