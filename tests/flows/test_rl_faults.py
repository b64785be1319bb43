"""The RL flow through a proxy that spoils its requests, on every endpoint: nothing is lost, and nothing is left behind.

To the flow the proxy is the cloud: backend "fireworks", with shapes for trainer and deployment. This is the short form
of tests/faults/test_proxy.py, which has all recipes and compares with undisturbed runs.
"""

import shutil
from collections import Counter
from dataclasses import replace

import httpx
import pytest

from cookbook import embedded
from tests.faults.proxy_table import LEGAL_FAULTS
from tests.faulty_proxy import FaultyProxy
from tests.flows.helpers import losses, metrics, rl_parameters, run_here
from tests.flows.test_rl import ended_rows

NUM_PROMPTS = 8
LONG = {"hang", "slow", "unfinished"}
"""Faults that take their time; the long form has them everywhere, this one where a time-out of the config ends them."""
TABLE = [
    replace(endpoint, in_a_row=1, rate=0.6)
    if endpoint.name == "completions"
    else replace(endpoint, in_a_row=1, rate=0.5, legal=tuple(one for one in endpoint.legal if one.fault not in LONG))
    for endpoint in LEGAL_FAULTS
]


@pytest.fixture
def quick_sdk(monkeypatch):
    """The SDK's pauses before it asks again, shorter."""
    from fireworks.training.sdk import DeploymentSampler, errors

    monkeypatch.setattr(DeploymentSampler, "_RETRY_BASE_BACKOFF_S", 0.1)
    monkeypatch.setattr(errors, "_backoff_delay", lambda attempt, start_time, max_wait_time: 0.1)


@pytest.mark.usefixtures("quick_sdk")
def test_every_endpoint_fails_and_no_row_is_lost(backend_home, tiny_model, prompts_file, tmp_path):
    shutil.copytree(tiny_model, backend_home / "models" / "faulty-tiny")
    endpoint = embedded.ensure_running(backend_home)
    with FaultyProxy(endpoint.base_url, TABLE, hang_s=2.0) as proxy:
        parameters = rl_parameters(
            tmp_path / "run",
            "accounts/local/models/faulty-tiny",
            prompts_file,
            max_rows=NUM_PROMPTS,
            backend="fireworks",
            infra={"training_shape_id": "accounts/local/trainingShapes/cpu-full"},
            deployment={
                "deployment_shape": "accounts/local/deploymentShapes/cpu/versions/v1",
                "tokenizer_model": str(tiny_model),
                "sample_timeout": 1,
            },
            max_seq_len=128,
            output_model_id="faulty-{run_id}",
        )
        cloud = {"FIREWORKS_BASE_URL": proxy.url, "FIREWORKS_API_KEY": endpoint.api_key.get_secret_value()}
        summary = run_here(parameters, {**cloud, "COOKBOOK_HOME": str(backend_home), "NO_PROXY": "127.0.0.1"}, "rl")
        assert proxy.num_faults > 40
        assert proxy.passed["unknown"] == 0
        completions = next(one for one in TABLE if one.name == "completions")
        assert all(proxy.met["completions", legal.fault] > 0 for legal in completions.legal), proxy.met
        assert len({name for name, _ in proxy.met}) > 12
    assert ended_rows(parameters) == Counter(range(NUM_PROMPTS))
    assert summary["rows_consumed"] == NUM_PROMPTS
    assert summary["steps"] == max(losses(parameters))
    failed = sum(row.get("sampling/failed_attempts", 0.0) for row in metrics(parameters))
    assert failed > 0  # the SDK's own count; what it waits out as a hot load is not in it
    assert (backend_home / "models" / f"faulty-{summary['run_id']}" / "config.json").exists()
    assert left_of(endpoint, summary["run_id"]) == []


def left_of(endpoint, run_id):
    """Jobs and deployments of a run that are not deleted."""
    headers = {"X-Api-Key": endpoint.api_key.get_secret_value()}
    with httpx.Client(base_url=f"{endpoint.base_url}/v1/accounts/local", headers=headers, trust_env=False) as client:
        found = [one for name in ("rlorTrainerJobs", "deployments") for one in client.get(f"/{name}").json()[name]]
    return [one["name"] for one in found if run_id in one["name"] and not one["state"].endswith("DELETED")]
