"""Runs through the faulty proxy, each against an undisturbed one: what was injected, and whether anything came of it.

To the flow the proxy is the cloud: backend "fireworks" with its URL, shapes for trainers and deployments. Each run is
told to stop (SIGTERM) when half of it is done, and started again, so that trainers are cancelled, resumed and loaded
through the proxy as well.

One run, with what it met:

    python -m tests.faults.proxy_runs sft 0
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fireworks.training.sdk import DeploymentConfig

from cookbook import embedded
from cookbook.checkpoints import last_commit
from cookbook.control_plane import ControlPlane
from cookbook.janitor import survey
from tests.faults import driver
from tests.faults.checks import Outcome, differences, is_identical, leaks, log_of, outcome, run_id_of
from tests.faults.kills import LOST
from tests.faults.proxy_table import LEGAL_FAULTS
from tests.faults.runs import Place, config_of, home_of_suite
from tests.faulty_proxy import FaultyProxy

__all__ = ["Cloud", "ProxyRun", "cloud_of_suite", "disturbed_run", "report"]

MODEL = "accounts/local/models/tiny"
RUN_TIMEOUT_S = 900.0
_SHAPES = "accounts/local/trainingShapes"
_DEPLOYMENT_SHAPE = "accounts/local/deploymentShapes/cpu/versions/v1"
_UNDISTURBED = "undisturbed"


@dataclass(frozen=True)
class Cloud:
    """A backend that is reached like the cloud: by URL and key."""

    place: Place
    url: str
    key: str = field(repr=False)

    def environment(self, url: str | None = None) -> dict[str, str]:
        """What a run needs beside the environment of this process. `url`: of the proxy in between."""
        return {**self.place.environment, "FIREWORKS_BASE_URL": url or self.url, "FIREWORKS_API_KEY": self.key}

    def config(self, recipe: str, seed: int, log_path: Path) -> dict[str, Any]:
        """As `config_of`, but for this backend. A request may hang for longer than its time-out, which ends it then."""
        config = config_of(recipe, seed, self.place, log_path)
        shape = f"{_SHAPES}/cpu-{'lora' if config['lora_rank'] else 'full'}"
        config["tokenizer_model"] = str(self.place.model)
        if recipe == "rl":
            own = {"deployment_shape": _DEPLOYMENT_SHAPE, "sample_timeout": 1}
            config["deployment"] = {**config["deployment"], **own}
        elif "deployment" in config:
            config["deployment"] = {"deployment_id": f"of-{log_path.name}"}  # made by `_adoptable`
        if recipe in ("rl", "sft"):
            config["max_seq_len"] = 128
        infra = {**config["infra"], "training_shape_id": shape}
        return {**config, "backend": "fireworks", "base_model": MODEL, "infra": infra}

    def control(self, url: str | None = None) -> ControlPlane:
        """The backend itself, or by the URL of a proxy."""
        return ControlPlane("fireworks", url or self.url, self.key, self.place.home / "models")


@dataclass(frozen=True)
class ProxyRun:
    """What became of one run through the proxy."""

    recipe: str
    seed: int
    met: Counter[tuple[str, str]]
    """(endpoint, fault) -> how often it was injected."""
    passed: Counter[str]
    """Endpoint -> requests that were passed on unspoiled."""
    problems: tuple[str, ...]
    """Where it ended otherwise than the undisturbed run, and what it left behind; () = nothing came of the faults."""
    seconds: float
    identical: bool
    """Whether weights and optimizer came out bit for bit; of RL nobody asks for that."""


@contextmanager
def cloud_of_suite(folder: Path) -> Iterator[Cloud]:
    """A backend with a tiny model under a name; ended behind it, with all that it has started."""
    with home_of_suite(folder) as place:
        shutil.copytree(place.model, place.home / "models" / "tiny")
        endpoint = embedded.ensure_running(place.home)
        yield Cloud(place, endpoint.base_url, endpoint.api_key.get_secret_value())


def undisturbed_run(cloud: Cloud, recipe: str, seed: int) -> Outcome:
    """The same run without a proxy."""
    config = cloud.config(recipe, seed, cloud.place.folder / f"{recipe}-{seed}-{_UNDISTURBED}")
    with _adoptable(cloud, config):
        status = driver.wait(_start(cloud, recipe, config, None), RUN_TIMEOUT_S)
    assert status == 0, f"the undisturbed run ended with {status}:\n{_tail(config)}"
    return outcome(recipe, config, cloud.place.home)


def disturbed_run(cloud: Cloud, recipe: str, seed: int) -> ProxyRun:
    """One run through the proxy, and one without it to compare with."""
    expected = undisturbed_run(cloud, recipe, seed)
    cloud.place.forget_references()
    config = cloud.config(recipe, seed, cloud.place.folder / f"{recipe}-{seed}")
    started = time.monotonic()
    with FaultyProxy(cloud.url, LEGAL_FAULTS, seed=f"{recipe} {seed}") as proxy:
        with _adoptable(cloud, config):
            problems = list(_stopped_and_started_again(cloud, recipe, config, proxy.url, len(expected.trained) // 2))
        identical = False
        if not problems:
            problems = differences(recipe, config, cloud.place.home, expected)
            identical = is_identical(outcome(recipe, config, cloud.place.home), expected)
        with cloud.control() as control:
            problems += leaks(cloud.place.home, control, [run_id_of(config)])
        with cloud.control(proxy.url) as control:
            problems += _housekeeping(cloud, control, config)
    seconds = time.monotonic() - started
    return ProxyRun(recipe, seed, proxy.met, proxy.passed, tuple(problems), seconds, identical)


def report(runs: Iterable[ProxyRun]) -> dict[str, Any]:
    """Faults tried, survived and lost, in all, by endpoint, and by endpoint and fault. The faults of a run that went
    otherwise than the undisturbed one count as lost, all of them: nothing says which it was."""
    runs = list(runs)
    tried: Counter[tuple[str, str]] = sum((run.met for run in runs), Counter())
    lost: Counter[tuple[str, str]] = sum((run.met for run in runs if run.problems), Counter())
    endpoints: dict[str, Any] = {}
    for endpoint in LEGAL_FAULTS:
        faults = {}
        for legal in endpoint.legal:
            which = endpoint.name, legal.fault
            if tried[which]:
                faults[legal.fault] = {"section": legal.section, **_counts(tried[which], lost[which])}
        if faults:
            totals = (sum(each[name] for each in faults.values()) for name in ("tried", "lost"))
            endpoints[endpoint.name] = {**_counts(*totals), "faults": faults}
    return {
        **_counts(tried.total(), lost.total()),
        "runs": [
            {
                "recipe": run.recipe,
                "seed": run.seed,
                "faults": run.met.total(),
                "identical": run.identical,
                "seconds": round(run.seconds, 1),
                "problems": run.problems,
            }
            for run in runs
        ],
        "endpoints": endpoints,
    }


def _counts(tried: int, lost: int) -> dict[str, int]:
    return {"tried": tried, "survived": tried - lost, "lost": lost}


def _stopped_and_started_again(
    cloud: Cloud, recipe: str, config: Mapping[str, Any], url: str, steps: int
) -> Iterator[str]:
    """Run to the end, with a stop after so many steps; what went wrong on the way."""
    process = _start(cloud, recipe, config, url)
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while process.is_alive() and _num_trained(config) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGTERM)
    try:
        status = driver.wait(process, 120.0)
        if status != 128 + signal.SIGTERM:
            yield f"the first start ended with {status} instead of SIGTERM's status:\n{_tail(config)}"
            return
        status = driver.wait(_start(cloud, recipe, config, url), RUN_TIMEOUT_S)
    except TimeoutError as error:
        yield f"{error}:\n{_tail(config)}"
        return
    if status != 0:
        yield f"the second start ended with {status}:\n{_tail(config)}"


@contextmanager
def _adoptable(cloud: Cloud, config: Mapping[str, Any]) -> Iterator[None]:
    """The deployment that a config names, where it names one: somebody's, of another trainer. It is left by the run."""
    name = config.get("deployment", {}).get("deployment_id")
    if name is None:
        yield
        return
    wanted = DeploymentConfig(
        name,
        MODEL,
        accelerator_type="CPU",
        min_replica_count=1,
        extra_args=config["infra"]["extra_args"],
        hot_load_trainer_job="accounts/local/rlorTrainerJobs/somebodys",
    )
    with cloud.control() as control:
        control.deployments.create_or_get(wanted)
        control.deployments.wait_for_ready(name, timeout_s=120)
        try:
            yield
            found = control.deployment(name)
            assert found is not None
            assert found["state"] == "READY"
        finally:
            control.delete_deployment(name)


def _housekeeping(cloud: Cloud, control: ControlPlane, config: Mapping[str, Any]) -> Iterator[str]:
    """What is done beside a run: the janitor looks what there is, and a checkpoint is deleted."""
    run_id = run_id_of(config)
    for finding in survey(cloud.place.home, control, grace_s=0.0):
        if finding.run_id == run_id and finding.action != "keep":
            yield f"the janitor would {finding.action} {finding.resource_id}: {finding.reason}"
    commit = last_commit(config["log_path"])
    if commit is None or commit.source_job_id is None:
        yield "there is no checkpoint to delete"
        return
    control.delete_checkpoint(commit.source_job_id, commit.name, "state")
    left = [row["name"].rpartition("/")[2] for row in control.list_checkpoints(commit.source_job_id)]
    if commit.name in left:
        yield f"checkpoint {commit.name} was deleted, and is there: {left}"


def _start(cloud: Cloud, recipe: str, config: Mapping[str, Any], url: str | None) -> Any:
    return driver.start(recipe, config, log=log_of(config), environment=cloud.environment(url))


def _num_trained(config: Mapping[str, Any]) -> int:
    """Steps begun so far."""
    path = driver.journal(log_of(config))
    lines = path.read_text().splitlines() if path.exists() else []
    return len({event["step"] for event in map(json.loads, lines) if event["event"] == "trained"})


def _tail(config: Mapping[str, Any]) -> str:
    return log_of(config).read_text()[-3000:]


def main() -> int:
    recipe, seed = sys.argv[1], int(sys.argv[2])
    folder = Path(tempfile.mkdtemp(prefix=f"proxy-{recipe}-{seed}-"))
    with cloud_of_suite(folder / "suite") as cloud:
        run = disturbed_run(cloud, recipe, seed)
    for name, found in report([run])["endpoints"].items():
        faults = " ".join(f"{fault}:{counts['tried']}" for fault, counts in found["faults"].items())
        print(f"{name:25s} passed {run.passed[name]:4d}, faults {found['tried']:4d}: {faults}")
    print(f"{run.met.total()} faults in {run.seconds:.0f} s, identical: {run.identical}; all is in {folder}")
    print("\n".join(run.problems))
    return LOST if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
