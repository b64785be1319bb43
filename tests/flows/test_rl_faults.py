"""The RL flow through a proxy that spoils a fifth of the sampling requests: every row is accounted for.

To the flow the proxy is the cloud: backend "fireworks", with shapes for trainer and deployment.
"""

import shutil
from collections import Counter

from cookbook import embedded
from tests.faulty_proxy import FaultyProxy
from tests.flows.helpers import finish, losses, metrics, rl_parameters, start
from tests.flows.test_rl import NUM_PROMPTS, ended_rows


def test_a_fifth_of_the_sampling_requests_fails_and_no_row_is_lost(
    environment, backend_home, tiny_model, prompts_file, tmp_path
):
    shutil.copytree(tiny_model, backend_home / "models" / "faulty-tiny")
    endpoint = embedded.ensure_running(backend_home)
    faults = ["425", "429", "503", "reset", "lost", "cut", "hang"]
    with FaultyProxy(endpoint.base_url, rate=0.2, paths=["/completions"], faults=faults, hang_s=2.0) as proxy:
        parameters = rl_parameters(
            tmp_path / "run",
            "accounts/local/models/faulty-tiny",
            prompts_file,
            backend="fireworks",
            infra={"training_shape_id": "accounts/local/trainingShapes/cpu-full"},
            deployment={
                "deployment_shape": "accounts/local/deploymentShapes/cpu/versions/v1",
                "tokenizer_model": str(tiny_model),
                "sample_timeout": 1,
            },
            max_seq_len=128,
            retry={"attempts": 6, "initial_delay_s": 0.1, "max_delay_s": 0.5},
        )
        cloud = {"FIREWORKS_BASE_URL": proxy.url, "FIREWORKS_API_KEY": endpoint.api_key.get_secret_value()}
        summary = finish(start(parameters, {**environment, **cloud}, recipe="rl"), timeout_s=300)
        assert proxy.num_faults > 10
        assert all(proxy.counts[fault] > 0 for fault in faults), proxy.counts
    assert ended_rows(parameters) == Counter(range(NUM_PROMPTS))
    assert summary["rows_consumed"] == NUM_PROMPTS
    assert summary["steps"] == max(losses(parameters))
    failed = sum(row.get("sampling/failed_attempts", 0.0) for row in metrics(parameters))
    assert failed > 0  # the SDK's own count; what it waits out as a hot load is not in it
