"""Part `orchestration`: what Prefect and our own records cost a run of many short steps.

Runs the SFT recipe as a user does (`cookbook run sft`), on the embedded backend, with a tiny random model and a Prefect
server with a database of its own, all in a temporary folder. Measures the task runs that it opened, what Prefect's
database grew by, the resident memory of each process over time, and the share of the loop that was spent neither in
steps nor in rendering and tokenizing rows (which is measured afterwards, alone).
Prints a table in markdown; the exit status is 1 when a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.sft import machine
from cookbook import embedded
from cookbook.config import SFTConfig
from cookbook.data.epochs import START
from cookbook.data.sft import load_sft_data
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 8
STEPS_PER_EPOCH = 100
SAMPLE_EVERY_S = 1.0
FLUSH_S = 10.0
"""How long Prefect gets, after the run, to write the events that are still on their way."""
TASK_RUNS_LIMIT = 100
DATABASE_LIMIT_MB = 5.0
PREFECT_SERVER = "Prefect server"
MEMORY_LIMIT_KB_A_STEP = 1.0
"""From the middle of the run to its end. A run of a million steps may then grow by 1 GB."""


@dataclass(frozen=True)
class Variant:
    """A size of step."""

    name: str
    steps: int
    answer_chars: int
    hidden_size: int
    share_limit: float
    """Of the loop's wall time that may be spent outside of steps."""


VARIANTS = [
    Variant("50 ms", steps=2000, answer_chars=60, hidden_size=64, share_limit=0.05),
    Variant("1 s", steps=100, answer_chars=400, hidden_size=384, share_limit=0.01),
]


@dataclass(frozen=True)
class Sample:
    """Resident memory at one moment."""

    step: int
    rss_mb: dict[str, float]
    """Process -> MB."""


@dataclass(frozen=True)
class Measured:
    """What one run came to."""

    variant: Variant
    step_s: float
    """Mean seconds a step."""
    share: float
    """Of the loop's wall time that was not spent in steps."""
    rows_share: float
    """Of the loop's wall time that rendering and tokenizing rows takes."""
    task_runs: int
    database_mb: float
    """By which the run made Prefect's database larger."""
    memory: dict[str, list[tuple[int, float]]]
    """Process -> (step, MB) at a tenth of the run, at its middle, and at the end of the loop."""

    def limits(self) -> list[tuple[str, str, str, bool]]:
        """What was limited, what it came to, the limit, and whether it was kept."""
        share = self.variant.share_limit
        rows = [
            ("task runs", f"{self.task_runs}", f"< {TASK_RUNS_LIMIT}", self.task_runs < TASK_RUNS_LIMIT),
            (
                "growth of Prefect's database",
                f"{self.database_mb:.2f} MB",
                f"< {DATABASE_LIMIT_MB:g} MB",
                self.database_mb < DATABASE_LIMIT_MB,
            ),
            (
                "orchestration, of the loop's time",
                f"{max(0.0, self.share - self.rows_share):.1%} ({self.share:.1%} with reading rows)",
                f"<= {share:.0%}",
                self.share - self.rows_share <= share,
            ),
        ]
        for name, points in self.memory.items():
            (middle_step, middle), (end_step, end) = points[1:]
            growth = (end - middle) * 1e3 / max(1, end_step - middle_step)
            text = " -> ".join(f"{mb:.1f}" for _, mb in points) + f" MB ({growth:+.2f} KB a step)"
            is_ours = name != PREFECT_SERVER
            limit = f"<= {MEMORY_LIMIT_KB_A_STEP:g} KB a step" if is_ours else "none"
            rows.append((f"memory of the {name}", text, limit, growth <= MEMORY_LIMIT_KB_A_STEP or not is_ours))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=[variant.name for variant in VARIANTS], default=VARIANTS[0].name)
    parser.add_argument("--steps", type=int, help="default: of the variant")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave everything there")
    options = parser.parse_args()
    variant = next(variant for variant in VARIANTS if variant.name == options.variant)
    if options.steps is not None:
        variant = Variant(**{**vars(variant), "steps": options.steps})
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        measured = measure(variant, options.keep.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(variant, Path(folder))
    print(report(measured))
    sys.exit(0 if all(kept for *_, kept in measured.limits()) else 1)


def measure(variant: Variant, folder: Path) -> Measured:
    """Run the recipe once and watch it."""
    config = write_config(variant, folder)
    with prefect_server(folder) as (environment, server):
        database = Path(environment["PREFECT_HOME"]) / "prefect.db"
        before = size_of(database)
        process = subprocess.Popen(
            [sys.executable, "-m", "cookbook.cli", "run", "sft", "--config", str(config), "--json"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            samples = list(watch(process, server, folder))
        finally:
            embedded.stop(folder / "home")
        if process.returncode != 0:
            raise SystemExit(f"the run failed with status {process.returncode}")
        time.sleep(FLUSH_S)
        task_runs = int(httpx.post(f"{environment['PREFECT_API_URL']}/task_runs/count", json={}).json())
        grown = size_of(database) - before
    rows = metrics_of(folder)
    seconds = [row["perf/step_s"] for row in rows[1:]]
    wall = rows[-1]["time"] - rows[0]["time"]
    (folder / "samples.json").write_text(json.dumps([[sample.step, sample.rss_mb] for sample in samples]))
    return Measured(
        variant=variant,
        step_s=sum(seconds) / len(seconds),
        share=1 - sum(seconds) / wall,
        rows_share=read_seconds(config, folder) * len(seconds) / wall,
        task_runs=task_runs,
        database_mb=grown / 1e6,
        memory=memory_of(samples, variant.steps),
    )


def write_config(variant: Variant, folder: Path) -> Path:
    """The model, the rows and the config of a run; the config's path."""
    model = make_tiny_model(
        folder / "model", hidden_size=variant.hidden_size, max_position_embeddings=max(512, 2 * variant.answer_chars)
    )
    answer = "the quick brown fox jumps over the lazy dog, " * (variant.answer_chars // 45 + 1)
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(BATCH_SIZE * STEPS_PER_EPOCH):
            messages = [
                {"role": "user", "content": f"{number:06}?"},
                {"role": "assistant", "content": answer[: variant.answer_chars]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    epochs, rest = divmod(variant.steps, STEPS_PER_EPOCH)
    if rest:
        raise SystemExit(f"--steps must be a multiple of {STEPS_PER_EPOCH}, got {variant.steps}")
    config = folder / "config.yaml"
    values = {
        "log_path": str(folder / "run"),
        "base_model": str(model),
        "dataset": str(rows),
        "batch_size": BATCH_SIZE,
        "epochs": epochs,
        "weight_sync": {"dcp_save_interval": max(1, variant.steps // 4)},
        "infra": {"extra_args": ["--compute-dtype=float32", "--threads=1"]},
    }
    config.write_text(json.dumps(values))  # JSON is YAML
    return config


def read_seconds(config: Path, folder: Path) -> float:
    """Seconds in which a batch is rendered and tokenized: the median over an epoch."""
    settings = SFTConfig.model_validate(json.loads(config.read_text()))
    batches = load_sft_data(settings, folder / "home" / "models", folder / "counts").batches(START)
    times = []
    for _ in range(STEPS_PER_EPOCH):
        started = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextmanager
def prefect_server(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """A Prefect server with a database of its own: the environment of its clients, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "COOKBOOK_HOME": str(folder / "home"),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "prefect-server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_until_healthy(url, process, log)
        yield environment | {"PREFECT_API_URL": url}, process.pid
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"the Prefect server did not start:\n{log.read_text()[-3000:]}")


def size_of(database: Path) -> int:
    """Bytes of an SQLite database, after what is in its log was moved into it."""
    with sqlite3.connect(database, timeout=60) as connection:
        connection.execute("pragma wal_checkpoint(truncate)").fetchone()
    connection.close()
    return sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*") if "shm" not in path.name)


def watch(process: subprocess.Popen[bytes], server: int, folder: Path) -> Iterator[Sample]:
    """Samples of all processes until the run has ended."""
    find = finder(process.pid, server, folder)
    while process.poll() is None:
        rss = {name: rss_mb(pid) for name, pid in find().items()}
        yield Sample(step=last_step(folder), rss_mb={name: mb for name, mb in rss.items() if mb is not None})
        time.sleep(SAMPLE_EVERY_S)


def finder(flow: int, server: int, folder: Path) -> Callable[[], dict[str, int]]:
    """A function that names the processes that are there by now."""
    found = {"flow": flow, PREFECT_SERVER: server}

    def find() -> dict[str, int]:
        if "control plane" not in found and (status := embedded.status(folder / "home")) is not None:
            found["control plane"] = status.control_plane_pid
        for record in (folder / "home").glob("backend/*/jobs/*/worker.json"):
            found["trainer"] = int(json.loads(record.read_bytes())["pid"])
        return found

    return find


def rss_mb(pid: int) -> float | None:
    """Resident memory of a process without its children; None when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmRSS")), None)


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    try:
        with (folder / "run" / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are training steps."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "perf/step_s" in row]


def memory_of(samples: list[Sample], steps: int) -> dict[str, list[tuple[int, float]]]:
    """Process -> (step, MB) at a tenth of the run, at its middle, and before its last step, after which it saves."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name in ("flow", "trainer", "control plane", PREFECT_SERVER):
        seen = [(s.step, s.rss_mb[name]) for s in samples if name in s.rss_mb and s.step < steps]
        points[name] = [next(point for point in seen if point[0] >= share * steps) for share in (0.1, 0.5)]
        points[name].append(seen[-1])
    return points


def report(measured: Measured) -> str:
    """The result as markdown."""
    head = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    variant = measured.variant
    lines = [head, "", f"{variant.steps:,} steps of {1e3 * measured.step_s:.0f} ms ({variant.name})", ""]
    lines += ["| | measured | limit | |", "|---|---|---|---|"]
    for what, value, limit, kept in measured.limits():
        lines.append(f"| {what} | {value} | {limit} | {'pass' if kept else 'FAIL'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
