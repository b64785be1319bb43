"""The runs of the fault suites: a home with a tiny model and a backend, small configs of each recipe, and one start.

Two variants (by seed): full parameters, and LoRA with all that differs there. What is killed and when is in kills.py,
what must come out in checks.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cookbook import embedded
from tests.faults import driver
from tests.faults.checks import log_of
from tests.faults.points import Kill
from tests.faults.processes import backend_processes
from tests.flows.helpers import write_pairs, write_prompts, write_rows
from tests.tiny_model import make_tiny_model

__all__ = ["Place", "Start", "config_of", "home_of_suite", "run_once"]

START_TIMEOUT_S = 240.0
"""No start of these runs takes half as long, on a busy machine too: one that does hangs."""

_ARGUMENTS = ["--compute-dtype=float32", "--threads=1"]


@dataclass(frozen=True)
class Place:
    """Where runs are made: one home, whose backend stays alive between starts."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def model(self) -> Path:
        return self.folder / "tiny"

    @property
    def environment(self) -> dict[str, str]:
        """What a run needs beside the environment of this process."""
        no_proxy = ",".join(filter(None, ["127.0.0.1", os.environ.get("NO_PROXY")]))
        return {
            "COOKBOOK_HOME": str(self.home),
            "NO_PROXY": no_proxy,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "TINKER_TELEMETRY": "0",
        }

    def forget_references(self) -> None:
        """Remove the logprobs of DPO's reference, so that the next run needs a reference trainer."""
        shutil.rmtree(self.home / "reference_logprobs", ignore_errors=True)


@contextmanager
def home_of_suite(folder: Path) -> Iterator[Place]:
    """A place with a model; every process of its backend is ended behind it, whatever happens."""
    place = Place(folder)
    place.home.mkdir(parents=True)
    make_tiny_model(place.model)
    try:
        yield place
    finally:
        embedded.stop(place.home)
        for process in backend_processes(place.home):
            os.kill(process.pid, 9)


def config_of(recipe: str, seed: int, place: Place, log_path: Path, **fields: Any) -> dict[str, Any]:
    """A whole config as plain data; some 30 steps with a commit every third one. Even seeds train all parameters, odd
    ones a LoRA adapter, and mirror the run directory. The same seed gives the same data."""
    data = place.folder / "data" / f"{recipe}-{seed}"
    data.mkdir(parents=True, exist_ok=True)
    has_lora = seed % 2 == 1
    common = {
        "log_path": str(log_path),
        "base_model": str(place.model),
        "seed": seed,
        "lora_rank": 4 if has_lora else 0,
        "learning_rate": 3e-3,
        "infra": {"extra_args": _ARGUMENTS},
        "weight_sync": {"dcp_save_interval": 3},
        "storage": {"keep_last": 2, "mirror_url": str(log_path.with_suffix(".mirror")) if has_lora else None},
        "retry": {"initial_delay_s": 0.1, "max_delay_s": 0.5},
        "output_model_id": "tiny-{run_id}",
    }
    return {**common, **_OF_RECIPE[recipe](data, seed, has_lora), **fields}


def _sft(data: Path, seed: int, has_lora: bool) -> dict[str, Any]:
    return {
        "dataset": str(write_rows(data / "rows.jsonl", 20, start=100 * seed)),
        "batch_size": 4,
        "epochs": 6,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.2,
        "evaluation": {"dataset": str(write_rows(data / "held_out.jsonl", 4, start=50)), "interval": 5},
    }


def _preferences(data: Path, seed: int, has_lora: bool) -> dict[str, Any]:
    return {
        "dataset": str(write_pairs(data / "pairs.jsonl", 20, start=100 * seed)),
        "batch_size": 4,
        "epochs": 6,
        "evaluation": {"dataset": str(write_pairs(data / "held_out.jsonl", 4, start=50)), "interval": 5},
    }


def _dpo(data: Path, seed: int, has_lora: bool) -> dict[str, Any]:
    """Full parameters: a trainer for the reference. LoRA: the base under the adapter, and syncs to a deployment."""
    config = _preferences(data, seed, has_lora)
    if not has_lora:
        return config | {"ref_cache_concurrency": 2, "ref_cache_batch_size": 2}
    syncs = {"weight_sync_interval": 4, "dcp_save_interval": 3}
    return config | {"weight_sync": syncs, "deployment": {"deployment_extra_args": _ARGUMENTS}}


def _rl(data: Path, seed: int, has_lora: bool) -> dict[str, Any]:
    """Full parameters: on policy. LoRA: windows of two steps, and a KL term against the base under the adapter."""
    prompts = write_prompts(data / "prompts.jsonl", 48)
    config = {
        "dataset": str(prompts),
        "reward": "tests.flows.rewards:vowels",
        "learning_rate": 1e-2,
        "prompt_groups_per_step": 2,
        "completions_per_prompt": 4,
        "max_completion_tokens": 12,
        "deployment": {"deployment_extra_args": _ARGUMENTS},
        "evaluation": {"dataset": str(prompts), "max_rows": 4, "interval": 4},
    }
    if not has_lora:
        return config
    return config | {"kl_beta": 0.05, "weight_sync": {"weight_sync_interval": 2, "dcp_save_interval": 3}}


_OF_RECIPE = {
    "sft": _sft,
    "dpo": _dpo,
    "orpo": _preferences,
    "rl": _rl,
}


@dataclass(frozen=True)
class Start:
    """What became of one start of a run."""

    status: int
    """0 = the run is done, -9 = the flow was killed, 1 = it ended with an error; None is never."""
    happened: tuple[str, ...]
    """Kills that found their process, in order."""
    missed: tuple[str, ...] = ()
    """Kills whose moment came, and whose process was not there."""
    hung: bool = False


def run_once(
    recipe: str,
    config: Mapping[str, Any],
    place: Place,
    kills: Sequence[Kill] = (),
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> Start:
    """One start of a run, to its end, whatever that is."""
    log = log_of(config)
    before = len(_kills(log))
    process = driver.start(recipe, config, log=log, environment=place.environment, kills=kills)
    try:
        status, hung = driver.wait(process, timeout_s), False
    except TimeoutError:
        status, hung = -9, True
    events = _kills(log)[before:]
    happened, missed = (tuple(e["kill"] for e in events if e["happened"] is found) for found in (True, False))
    return Start(status, happened, missed, hung)


def _kills(log: Path) -> list[dict[str, Any]]:
    """What the journal says of kills, over all starts."""
    path = driver.journal(log)
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in events if event["event"] == "kill"]
