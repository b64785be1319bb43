"""The page of a flow run on a real server: a table is updated in place, so that its database stays small."""

import json
import subprocess
import sys

import httpx

SHOW_THREE_TABLES = """
from prefect import flow
from tasks import page

@flow
def shows():
    for number in range(3):
        page.show_table([{"number": number}], key="rollouts-sft-1", description="Completions")
        assert page._poster.settle(30)

shows()
"""


def test_a_table_has_one_version_however_often_it_is_shown(prefect_environment):
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_THREE_TABLES], env=prefect_environment, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    url = f"{prefect_environment['PREFECT_API_URL']}/artifacts"
    query = {"artifacts": {"key": {"any_": ["rollouts-sft-1"]}}}
    assert [json.loads(found["data"]) for found in httpx.post(f"{url}/filter", json=query).json()] == [[{"number": 2}]]
    assert json.loads(httpx.get(f"{url}/rollouts-sft-1/latest").json()["data"]) == [{"number": 2}]
