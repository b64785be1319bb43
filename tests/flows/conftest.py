"""A real Prefect server on a real port for the flow tests, and helpers to run a recipe in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cookbook import embedded
from tests.flows.helpers import finish, rl_parameters, sft_parameters, start, write_prompts, write_rows
from tests.tiny_model import make_tiny_model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the Prefect server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def prefect_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a process that uses this session's Prefect server; its database is a temporary one."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",  # a minute is the default
        "PREFECT_LOGGING_EXTRA_LOGGERS": "cookbook,tasks",
    }
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env={k: v for k, v in environment.items() if k != "PREFECT_API_URL"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_healthy(environment["PREFECT_API_URL"], process, log)
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def backend_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A COOKBOOK_HOME; the backend that the first run starts in it is stopped at the end."""
    home = tmp_path_factory.mktemp("cookbook-home")
    yield home
    embedded.stop(home)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """24 chat rows."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture(scope="session")
def environment(prefect_environment: dict[str, str], backend_home: Path) -> dict[str, str]:
    """Environment of a run: this session's Prefect server and COOKBOOK_HOME."""
    return {**prefect_environment, "COOKBOOK_HOME": str(backend_home)}


@pytest.fixture(scope="session")
def undisturbed(
    environment: dict[str, str], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of four epochs of three steps that nothing disturbs: parameters and summary."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows, held_out = write_rows(folder / "rows.jsonl"), write_rows(folder / "held_out.jsonl", 8, start=100)
    parameters = sft_parameters(
        folder / "run",
        tiny_model,
        rows,
        epochs=4,
        lr_schedule="cosine",
        warmup_ratio=0.2,
        weight_sync={"dcp_save_interval": 2},
        evaluation={"dataset": str(held_out)},
        output_model_id="tiny-{run_id}",
    )
    return parameters, finish(start(parameters, environment))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompts."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "train.jsonl")


@pytest.fixture(scope="session")
def rl_undisturbed(
    environment: dict[str, str], tiny_model: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An RL run from start to end: its parameters and its summary."""
    folder = tmp_path_factory.mktemp("rl-undisturbed")
    parameters = rl_parameters(
        folder / "run",
        tiny_model,
        prompts_file,
        evaluation={"dataset": str(prompts_file), "max_rows": 6, "num_samples": 3},
        output_model_id="tiny-{run_id}",
    )
    return parameters, finish(start(parameters, environment, recipe="rl"))
