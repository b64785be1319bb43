"""What the flow tests share: small configs and rows, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from cookbook.cli import app
from cookbook.cli import run as run_command
from cookbook.config import RECIPE_CONFIGS
from cookbook.summary import RunSummary

NUM_ROWS = 24
BATCH_SIZE = 8


def write_rows(path: Path, num_rows: int = NUM_ROWS, start: int = 0) -> Path:
    """Chat rows with short checkable answers."""
    questions = [(f"{n} + {n + 1} =", str(2 * n + 1)) for n in range(start, start + num_rows)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_parameters(log_path: Path, model: Path, rows: Path, **fields: Any) -> dict[str, Any]:
    """A whole SFT config as plain data, for a form, a YAML file or a submitted run."""
    return {
        "log_path": str(log_path),
        "base_model": str(model),
        "dataset": str(rows),
        "batch_size": BATCH_SIZE,
        "epochs": 1,
        "learning_rate": 3e-3,
        "infra": {"extra_args": ["--compute-dtype=float32", "--threads=1"]},
        **fields,
    }


def write_prompts(path: Path, num_rows: int = 24) -> Path:
    """RL rows; their number is in the field `number`."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}], "ground_truth": str(n), "number": n}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rl_parameters(log_path: Path, model: Path, rows: Path, **fields: Any) -> dict[str, Any]:
    """A whole RL config as plain data, for the tiny model in float32. All rollouts are kept, for the tests to count."""
    arguments = ["--compute-dtype=float32", "--threads=1"]
    return {
        "log_path": str(log_path),
        "base_model": str(model),
        "dataset": str(rows),
        "reward": "tests.flows.rewards:vowels",
        "prompt_groups_per_step": 4,
        "completions_per_prompt": 4,
        "max_completion_tokens": 8,
        "learning_rate": 1e-2,
        "weight_sync": {"dcp_save_interval": 2},
        "infra": {"extra_args": arguments},
        "deployment": {"deployment_extra_args": arguments},
        "storage": {"keep_last": None},
        **fields,
    }


def write_pairs(path: Path, num_rows: int, start: int = 0) -> Path:
    """Pairs of answers to short questions; the chosen ones are alike, so that a tiny model can learn to prefer them."""
    rows = []
    for number in range(start, start + num_rows):
        question = {"role": "user", "content": f"{number}?"}
        answers = {"chosen": f"yes {number}", "rejected": f"no {number}"}
        rows.append({k: {"messages": [question, {"role": "assistant", "content": v}]} for k, v in answers.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preference_parameters(log_path: Path, model: Path, rows: Path, **fields: Any) -> dict[str, Any]:
    """A whole DPO or ORPO config as plain data, for the tiny model in float32."""
    return {
        "log_path": str(log_path),
        "base_model": str(model),
        "dataset": str(rows),
        "learning_rate": 1e-3,
        "weight_sync": {"dcp_save_interval": 4},
        "infra": {"extra_args": ["--compute-dtype=float32", "--threads=1"]},
        **fields,
    }


def start(parameters: dict[str, Any], environment: dict[str, str], recipe: str = "sft") -> subprocess.Popen[str]:
    """`cookbook run RECIPE --json` with these parameters, as a process."""
    log_path = Path(parameters["log_path"])
    config = log_path.with_suffix(".yaml")
    config.write_text(json.dumps(parameters))  # JSON is YAML
    command = [sys.executable, "-m", "cookbook.cli", "run", recipe, "--config", str(config), "--json"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], timeout_s: float = 150) -> dict[str, Any]:
    """Wait for a run to end well; its summary."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"{out}\n{err}"
    summary: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return summary


def run_here(parameters: dict[str, Any], environment: dict[str, str], recipe: str = "sft") -> dict[str, Any]:
    """Run a recipe to its end in this process, below Prefect: the same, without records and their cost; its summary."""
    flow = import_module(f"flows.{recipe}")
    with mock.patch.dict(os.environ, environment):
        summary: RunSummary = getattr(flow, recipe).fn(RECIPE_CONFIGS[recipe].model_validate(parameters))
    return summary.to_dict()


def command_here(arguments: Sequence[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Run `cookbook ARGUMENTS` in this process, flows below Prefect: exit status, stdout, stderr."""
    with mock.patch.dict(os.environ, environment), pytest.MonkeyPatch.context() as patch:
        found = run_command._flow
        patch.setattr(run_command, "_flow", lambda name, group: found(name, group).fn)
        done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def metrics(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last one is left out."""
    path = Path(parameters["log_path"]) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(parameters: dict[str, Any]) -> dict[int, float]:
    """Step -> training loss."""
    return {row["step"]: row["train/loss"] for row in metrics(parameters) if "train/loss" in row}


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, timeout_s: float = 90
) -> None:
    """Poll until `condition` holds; fail when the process ends before that, or nothing happens in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the run ended too early:\n{process.communicate()[1]}")
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
